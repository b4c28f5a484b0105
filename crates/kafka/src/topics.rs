//! Creates postrider's own topics with the required settings, if allowed, and checks existing ones.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    error::{KafkaError, RDKafkaErrorCode},
};

use super::{
    Config, broker::Broker, client_watchdog::count_replacement, library_log::Plain, replication::Replication,
    topic_limits, topic_limits::TopicLimits,
};

/// Time that brokers have to answer an admin request. A busy machine stands still for seconds now
/// and then.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Required shape of one of postrider's own topics.
#[derive(Debug, Clone)]
pub struct TopicSpec {
    /// The full name, prefix included.
    pub name: String,
    pub partitions: i32,
    /// Settings that the topic is created with.
    pub settings: Vec<(&'static str, String)>,
    /// Settings that the topic's capability requires; a topic with other values is rejected.
    pub required: Vec<(&'static str, &'static str)>,
    /// Advice for the error message when the partition count differs.
    pub remedy: String,
}

/// Reason why a topic cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    #[error("topic `{0}` does not exist and `kafka.topics.create` is off: create it with {1} partitions and {2}")]
    Missing(String, i32, String),
    #[error("topic `{topic}` has {found} partitions, but {wanted} are configured: {remedy}")]
    Partitions { topic: String, found: i32, wanted: i32, remedy: String },
    #[error(
        "topic `{topic}` has {setting}={found}, but {setting}={wanted} is required: set it with kafka-configs.sh --alter --entity-type topics --entity-name {topic} --add-config {setting}={wanted}"
    )]
    Setting { topic: String, setting: &'static str, found: String, wanted: &'static str },
    #[error(
        "`kafka.topics.min_insync_replicas` is {wanted}, above the {replicas} replicas of new topics, so every write would fail: lower it, or raise `kafka.topics.replication_factor`"
    )]
    Unwritable { wanted: i32, replicas: i32 },
    #[error("topic `{0}` cannot be created: {1}")]
    Refused(String, RDKafkaErrorCode),
    #[error(transparent)]
    Kafka(#[from] KafkaError),
}

impl TopicError {
    /// Returns whether the error may pass without intervention. Otherwise an operator has to change
    /// something.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Kafka(error) if !matches!(error, KafkaError::AdminOp(_)) || is_unanswered(error))
    }
}

/// Returns whether the brokers could not be reached or did not answer in time.
fn is_unanswered(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as E;
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    };
    let unanswered = [E::OperationTimedOut, E::RequestTimedOut, E::BrokerTransportFailure, E::AllBrokersDown];
    code.is_some_and(|code| unanswered.contains(&code))
}

/// Flag that is set once postrider's own topics exist with the required settings. Until then
/// nothing may be written to them, because a producer makes the brokers create missing topics with
/// their default settings.
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

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(ADMIN_TIMEOUT)).request_timeout(Some(ADMIN_TIMEOUT))
}

fn connect(config: &Config) -> Result<Connected, KafkaError> {
    let mut properties = config.client("admin");
    properties.set("statistics.interval.ms", "0");
    Ok(Connected {
        client: config.with_overrides(properties).create_with_context(Plain("admin"))?,
        since: Instant::now(),
    })
}

/// Admin client that creates topics and reads their settings.
pub struct Admin {
    client: ArcSwap<Connected>,
    broker: Broker,
    config: Config,
}

struct Connected {
    client: AdminClient<Plain>,
    since: Instant,
}

impl Admin {
    pub fn new(config: &Config, broker: Broker) -> Result<Self, KafkaError> {
        Ok(Self { client: ArcSwap::from_pointee(connect(config)?), broker, config: config.clone() })
    }

    /// Returns the client; a new one after an outage, because the connections of the old one may
    /// have become silent without being closed, which only a timeout would show.
    fn client(&self) -> Arc<Connected> {
        if self.broker.recovered_at().is_some_and(|recovered| recovered >= self.client.load().since) {
            self.reconnect();
        }
        self.client.load_full()
    }

    /// Replaces the client. Returns false if there is no new one to be had.
    fn reconnect(&self) -> bool {
        let next = connect(&self.config).map(|next| super::discard(self.client.swap(Arc::new(next))));
        next.is_ok()
    }

    /// Returns the outcome unchanged. If the operation went unanswered although Kafka answers other
    /// clients, replaces the client, so the next operation uses a new one.
    fn checked<T>(&self, outcome: Result<T, KafkaError>) -> Result<T, KafkaError> {
        if outcome.as_ref().is_err_and(is_unanswered) && self.broker.is_up() && self.reconnect() {
            count_replacement("admin", "unanswered");
        }
        outcome
    }

    /// Creates missing topics and checks existing ones. Returns all problems that need an operator
    /// at once; a transient error ends the check immediately and is returned alone.
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
            None => self.create_from_spec(spec).await?,
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

    async fn create_from_spec(&self, spec: &TopicSpec) -> Result<i32, TopicError> {
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
        tracing::info!(topic = spec.name, partitions = spec.partitions, "created topic");
        self.await_partitions(&spec.name).await
    }

    /// Returns the `min.insync.replicas` that new topics are created with. `None` leaves it to the
    /// broker, when the broker's default replication factor cannot be read.
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

    /// Returns the replication of each of these topics. Topics that do not exist or cannot be
    /// looked up are left out.
    pub async fn replication<'a>(&self, specs: &'a [TopicSpec]) -> Vec<(&'a str, Replication)> {
        let mut found = Vec::new();
        for spec in specs {
            let Ok(Some((replicas, brokers))) = self.broker.replicas(&spec.name).await else { continue };
            let settings = self.describe(&ResourceSpecifier::Topic(&spec.name)).await.unwrap_or_default();
            let min_insync = settings.get("min.insync.replicas").and_then(|value| value.parse().ok());
            found.push((&*spec.name, Replication { replicas, brokers, min_insync }));
        }
        found
    }

    /// Creates a topic that is not postrider's own, with the broker's defaults.
    pub async fn create_with_defaults(&self, name: &str) -> Result<(), TopicError> {
        self.create(NewTopic::new(name, -1, TopicReplication::Fixed(-1))).await?;
        self.await_partitions(name).await.map(|_| ())
    }

    async fn create(&self, topic: NewTopic<'_>) -> Result<(), TopicError> {
        let client = self.client();
        let results = self.checked(client.client.create_topics([&topic], &options()).await)?;
        for result in results {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => return Err(TopicError::Refused(name, code)),
            }
        }
        Ok(())
    }

    /// Waits up to 2.5 s plus lookup times until the broker reports a new topic: the controller
    /// knows it before every broker does.
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

    /// Returns whether the brokers create unknown topics automatically; `None` if the setting
    /// cannot be read.
    pub async fn broker_creates_topics(&self) -> Option<bool> {
        let setting = self.broker_setting("auto.create.topics.enable").await.ok()?;
        setting.map(|value| value == "true")
    }

    /// Returns a setting of any one broker; `None` if brokers have no setting of that name.
    pub async fn broker_setting(&self, name: &str) -> Result<Option<String>, TopicError> {
        let no_broker = KafkaError::MetadataFetch(RDKafkaErrorCode::AllBrokersDown);
        let broker = self.broker.any_broker_id().await.ok_or(no_broker)?;
        Ok(self.describe(&ResourceSpecifier::Broker(broker)).await?.remove(name))
    }

    /// Returns whether a topic is compacted, so that it keeps only the newest record of each key.
    pub async fn is_compacted(&self, topic: &str) -> Result<bool, TopicError> {
        Ok(topic_limits::has_policy(&self.describe(&ResourceSpecifier::Topic(topic)).await?, "compact"))
    }

    /// Returns the limits of a topic. If postrider may not read the topic's settings, returns no
    /// limits.
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
        let client = self.client();
        let described = self.checked(client.client.describe_configs([resource], &options()).await)?;
        let mut settings = HashMap::new();
        for result in described {
            let resource = result.map_err(KafkaError::AdminOp)?;
            settings.extend(resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))));
        }
        Ok(settings)
    }
}
