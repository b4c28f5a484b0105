//! Our own topics: made with the right settings where that is allowed, checked everywhere.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
};

use super::{Config, broker::Broker, client_watchdog::count_replacement, replication::Replication};

/// Time that brokers have to create a topic.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time that they have to answer a question.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// What a topic of ours must be like.
#[derive(Debug, Clone)]
pub struct TopicSpec {
    /// The full name, prefix included.
    pub name: String,
    pub partitions: i32,
    /// Settings it is made with.
    pub settings: Vec<(&'static str, String)>,
    /// Settings without which its room does not work; a topic that differs is refused.
    pub required: Vec<(&'static str, &'static str)>,
    /// What to change when the partition count differs, for the message.
    pub remedy: String,
}

/// Why a topic cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    #[error("topic `{0}` does not exist and `kafka.topics.create` is off: create it with {1} partitions and {2}")]
    Missing(String, i32, String),
    #[error("topic `{topic}` has {found} partitions, but {wanted} are configured: {remedy}")]
    Partitions { topic: String, found: i32, wanted: i32, remedy: String },
    #[error(
        "topic `{topic}` has {setting}={found}, but {wanted} is needed: set it with kafka-configs.sh --alter --entity-type topics --entity-name {topic} --add-config {setting}={wanted}"
    )]
    Setting { topic: String, setting: &'static str, found: String, wanted: &'static str },
    #[error(
        "`kafka.topics.min_insync_replicas` is {wanted}, above the {replicas} replicas of topics: nothing could be written"
    )]
    Unwritable { wanted: i32, replicas: i32 },
    #[error("topic `{0}` cannot be created: {1}")]
    Refused(String, RDKafkaErrorCode),
    #[error(transparent)]
    Kafka(#[from] KafkaError),
}

impl TopicError {
    /// Whether waiting can help; otherwise somebody has to change something.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Kafka(error) if !matches!(error, KafkaError::AdminOp(_)) || is_unanswered(error))
    }
}

/// Whether brokers did not answer a question, or could not be asked it.
fn is_unanswered(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as E;
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    };
    let unanswered = [E::OperationTimedOut, E::RequestTimedOut, E::BrokerTransportFailure, E::AllBrokersDown];
    code.is_some_and(|code| unanswered.contains(&code))
}

/// Whether our own topics are as they must be. Until then nothing may be written to them: producers
/// make brokers create what is missing, with settings that are not ours.
#[derive(Debug, Clone, Default)]
pub struct TopicsReady(Arc<AtomicBool>);

impl TopicsReady {
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the broker takes in a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicLimits {
    /// Whether each record needs a key, because the topic is compacted.
    pub needs_key: bool,
    /// Largest batch in bytes (`max.message.bytes`).
    pub max_message_bytes: usize,
    /// How far a record's timestamp may be before and after the broker's clock, in milliseconds
    /// (`message.timestamp.before.max.ms`, `message.timestamp.after.max.ms`).
    pub max_before_ms: i64,
    pub max_after_ms: i64,
}

impl Default for TopicLimits {
    /// None, for a topic whose settings cannot be read.
    fn default() -> Self {
        Self { needs_key: false, max_message_bytes: usize::MAX, max_before_ms: i64::MAX, max_after_ms: i64::MAX }
    }
}

impl TopicLimits {
    fn read(settings: &HashMap<String, String>) -> Self {
        let number = |name: &str| settings.get(name).and_then(|value| value.parse::<i64>().ok()).filter(|&n| n >= 0);
        // Brokers older than 3.6 have one setting for both directions.
        let both = number("message.timestamp.difference.max.ms").unwrap_or(i64::MAX);
        let [before, after] = ["before", "after"].map(|way| number(&format!("message.timestamp.{way}.max.ms")));
        let takes_any_time = settings.get("message.timestamp.type").is_some_and(|kind| kind == "LogAppendTime");
        let bound = |found: Option<i64>| if takes_any_time { i64::MAX } else { found.unwrap_or(both) };
        Self {
            needs_key: is_compacted(settings),
            max_message_bytes: number("max.message.bytes").map_or(usize::MAX, |bytes| bytes as usize),
            max_before_ms: bound(before),
            max_after_ms: bound(after),
        }
    }
}

fn is_compacted(settings: &HashMap<String, String>) -> bool {
    settings.get("cleanup.policy").is_some_and(|policy| policy.split(',').any(|word| word.trim() == "compact"))
}

fn options(patience: Duration) -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(patience)).request_timeout(Some(patience))
}

fn connect(config: &Config) -> Result<AdminClient<DefaultClientContext>, KafkaError> {
    let mut properties = config.client("admin");
    properties.set("statistics.interval.ms", "0");
    config.with_overrides(properties).create()
}

/// The client for what is done to topics rather than with them.
pub struct Admin {
    client: ArcSwap<AdminClient<DefaultClientContext>>,
    broker: Broker,
    config: Config,
}

impl Admin {
    pub fn new(config: &Config, broker: Broker) -> Result<Self, KafkaError> {
        Ok(Self { client: ArcSwap::from_pointee(connect(config)?), broker, config: config.clone() })
    }

    /// Passes the outcome of an operation on. Where it failed although Kafka answers others, the next one gets a new
    /// client.
    fn checked<T>(&self, outcome: Result<T, KafkaError>) -> Result<T, KafkaError> {
        if outcome.as_ref().is_err_and(is_unanswered)
            && self.broker.is_up()
            && let Ok(client) = connect(&self.config)
        {
            count_replacement("admin", "unanswered");
            super::discard(self.client.swap(Arc::new(client)));
        }
        outcome
    }

    /// Makes what is missing and checks what is there. All that somebody has to change is said at
    /// once; an error that passes by itself ends it.
    pub async fn ensure(&self, specs: &[TopicSpec]) -> Result<(), Vec<TopicError>> {
        let mut problems = Vec::new();
        for spec in specs {
            match self.ensure_one(spec).await {
                Ok(()) => {}
                Err(error) if error.is_transient() => return Err(vec![error]),
                Err(error) => problems.push(error),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    async fn ensure_one(&self, spec: &TopicSpec) -> Result<(), TopicError> {
        let partitions = match self.broker.partitions(&spec.name).await? {
            Some(partitions) => partitions,
            None => self.create_ours(spec).await?,
        };
        if partitions != spec.partitions {
            return Err(TopicError::Partitions {
                topic: spec.name.clone(),
                found: partitions,
                wanted: spec.partitions,
                remedy: spec.remedy.clone(),
            });
        }
        self.check_settings(spec).await
    }

    async fn create_ours(&self, spec: &TopicSpec) -> Result<i32, TopicError> {
        if !self.config.topics.create {
            let settings = spec.settings.iter().map(|(name, value)| format!("{name}={value}"));
            let settings = settings.collect::<Vec<_>>().join(" ");
            return Err(TopicError::Missing(spec.name.clone(), spec.partitions, settings));
        }
        let replication = TopicReplication::Fixed(self.config.topics.replication_factor);
        let mut topic = NewTopic::new(&spec.name, spec.partitions, replication);
        for (name, value) in &spec.settings {
            topic = topic.set(name, value);
        }
        let min_insync = self.min_insync().await?.map(|count| count.to_string());
        if let Some(count) = &min_insync {
            topic = topic.set("min.insync.replicas", count);
        }
        self.create(topic).await?;
        tracing::info!(topic = spec.name, partitions = spec.partitions, "created a topic");
        self.await_partitions(&spec.name).await
    }

    /// Returns the `min.insync.replicas` that our topics are made with; `None` leaves it to the broker, where its default
    /// replication cannot be read.
    async fn min_insync(&self) -> Result<Option<i32>, TopicError> {
        let topics = &self.config.topics;
        let replicas = match topics.replication_factor {
            count if count > 0 => Some(count),
            _ => match self.broker_setting("default.replication.factor").await {
                Ok(setting) => setting.and_then(|value| value.parse().ok()),
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => None,
            },
        };
        let wanted = match replicas {
            Some(replicas) => topics.min_insync(replicas),
            None if topics.min_insync_replicas > 0 => topics.min_insync_replicas,
            None => return Ok(None),
        };
        match replicas {
            Some(replicas) if wanted > replicas => Err(TopicError::Unwritable { wanted, replicas }),
            _ => Ok(Some(wanted)),
        }
    }

    /// Returns how each of our topics is replicated, without those that do not exist or cannot be looked up.
    pub async fn replication<'a>(&self, specs: &'a [TopicSpec]) -> Vec<(&'a TopicSpec, Replication)> {
        let mut found = Vec::new();
        for spec in specs {
            let Ok(Some((replicas, brokers))) = self.broker.replicas(&spec.name).await else { continue };
            let settings = self.describe(&ResourceSpecifier::Topic(&spec.name)).await.unwrap_or_default();
            let min_insync = settings.get("min.insync.replicas").and_then(|value| value.parse().ok());
            found.push((spec, Replication { replicas, brokers, min_insync }));
        }
        found
    }

    /// Creates a topic of somebody else with the broker's own defaults.
    pub async fn create_with_defaults(&self, name: &str) -> Result<(), TopicError> {
        self.create(NewTopic::new(name, -1, TopicReplication::Fixed(-1))).await?;
        self.await_partitions(name).await.map(|_| ())
    }

    async fn create(&self, topic: NewTopic<'_>) -> Result<(), TopicError> {
        let client = self.client.load_full();
        let results = self.checked(client.create_topics([&topic], &options(PATIENCE)).await)?;
        for result in results {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => return Err(TopicError::Refused(name, code)),
            }
        }
        Ok(())
    }

    /// A fresh topic is known to the controller before every broker has heard of it.
    async fn await_partitions(&self, name: &str) -> Result<i32, TopicError> {
        for _ in 0..50 {
            if let Some(partitions) = self.broker.partitions(name).await? {
                return Ok(partitions);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(TopicError::Kafka(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)))
    }

    async fn check_settings(&self, spec: &TopicSpec) -> Result<(), TopicError> {
        if spec.required.is_empty() {
            return Ok(());
        }
        let found = self.describe(&ResourceSpecifier::Topic(&spec.name)).await?;
        for &(setting, wanted) in &spec.required {
            let value = found.get(setting).cloned().unwrap_or_default();
            if value != wanted {
                return Err(TopicError::Setting { topic: spec.name.clone(), setting, found: value, wanted });
            }
        }
        Ok(())
    }

    /// Whether brokers make unknown topics by themselves; `None` when we may not know.
    pub async fn broker_creates_topics(&self) -> Option<bool> {
        let setting = self.broker_setting("auto.create.topics.enable").await.ok()?;
        setting.map(|value| value == "true")
    }

    /// A setting of some broker; `None` where brokers have none of that name.
    pub async fn broker_setting(&self, name: &str) -> Result<Option<String>, TopicError> {
        let no_broker = KafkaError::MetadataFetch(RDKafkaErrorCode::AllBrokersDown);
        let broker = self.broker.any_broker_id().await.ok_or(no_broker)?;
        Ok(self.describe(&ResourceSpecifier::Broker(broker)).await?.remove(name))
    }

    /// Whether a topic keeps only the newest record of a key.
    pub async fn is_compacted(&self, topic: &str) -> Result<bool, TopicError> {
        Ok(is_compacted(&self.describe(&ResourceSpecifier::Topic(topic)).await?))
    }

    /// Returns what the broker takes in a topic. Without the right to read its settings, nothing is known of that.
    pub async fn limits(&self, topic: &str) -> Result<TopicLimits, TopicError> {
        match self.describe(&ResourceSpecifier::Topic(topic)).await {
            Ok(settings) => Ok(TopicLimits::read(&settings)),
            Err(TopicError::Kafka(KafkaError::AdminOp(
                RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed,
            ))) => Ok(TopicLimits::default()),
            Err(error) => Err(error),
        }
    }

    async fn describe(&self, resource: &ResourceSpecifier<'_>) -> Result<HashMap<String, String>, TopicError> {
        let client = self.client.load_full();
        let described = self.checked(client.describe_configs([resource], &options(ANSWER_PATIENCE)).await)?;
        let mut settings = HashMap::new();
        for result in described {
            let resource = result.map_err(KafkaError::AdminOp)?;
            settings.extend(resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))));
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(settings: &[(&str, &str)]) -> TopicLimits {
        TopicLimits::read(&settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn limits_are_read_from_the_settings_of_newer_and_older_brokers() {
        let newer = [
            ("cleanup.policy", "compact,delete"),
            ("max.message.bytes", "10000"),
            ("message.timestamp.type", "CreateTime"),
            ("message.timestamp.before.max.ms", "9223372036854775807"),
            ("message.timestamp.after.max.ms", "3600000"),
        ];
        let expected = TopicLimits {
            needs_key: true,
            max_message_bytes: 10_000,
            max_before_ms: i64::MAX,
            max_after_ms: 3_600_000,
        };
        assert_eq!(limits(&newer), expected);
        let older = limits(&[("cleanup.policy", "delete"), ("message.timestamp.difference.max.ms", "60000")]);
        assert_eq!(older, TopicLimits { max_before_ms: 60_000, max_after_ms: 60_000, ..TopicLimits::default() });
        let brokers_time = [newer[3], newer[4], ("message.timestamp.type", "LogAppendTime")];
        assert_eq!(limits(&brokers_time), TopicLimits::default());
        assert_eq!(limits(&[]), TopicLimits::default());
    }
}
