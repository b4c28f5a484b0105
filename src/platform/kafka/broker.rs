//! Whether Kafka answers, and what it knows of a topic.
//!
//! A connection that drops is only a suspicion; a metadata request that nobody answers is proof.
//! While there is proof, writes are refused at once instead of waiting for their timeout.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::Thread,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
};

use super::Config;
use crate::platform::ops::Check;

/// How often a healthy broker is asked.
const CALM: Duration = Duration::from_secs(3);
/// How often a silent one is.
const ANXIOUS: Duration = Duration::from_millis(250);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Cheap to clone; one per process.
#[derive(Clone)]
pub struct Broker {
    inner: Arc<Inner>,
}

struct Inner {
    client: BaseConsumer<Listener>,
    probe_topic: String,
    up: AtomicBool,
    suspicious: AtomicBool,
    check: Check,
    prober: ArcSwapOption<Thread>,
}

/// Keeps what the client last said of a connection: a failed question itself does not tell a wrong
/// password from a broker that is down.
#[derive(Default)]
struct Listener {
    reason: ArcSwapOption<String>,
}

impl ClientContext for Listener {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "the metadata client reports a problem");
        if (level as i32) <= RDKafkaLogLevel::Error as i32 {
            let text = message.split_once("]: ").map_or(message, |(_, text)| text);
            self.reason.store(Some(Arc::new(text.to_owned())));
        }
    }

    /// Among these is that the account has no rights on the group, which the client looks up and never joins.
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "the metadata client reports a problem");
    }
}
impl ConsumerContext for Listener {}

impl Broker {
    /// Starts asking. `check` is what readiness shows.
    pub fn start(config: &Config, check: Check) -> Result<Self, KafkaError> {
        let mut properties = config.client("metadata");
        // A consumer that never subscribes: the one kind of client whose questions create no topic.
        properties
            .set("allow.auto.create.topics", "false")
            .set("statistics.interval.ms", "0")
            .set("group.id", "postrider-metadata");
        let client: BaseConsumer<Listener> =
            config.with_overrides(properties).create_with_context(Listener::default())?;
        let inner = Arc::new(Inner {
            client,
            probe_topic: config.topic("messages"),
            // Until the first answer writes are let through and wait, as at any short break.
            up: AtomicBool::new(true),
            suspicious: AtomicBool::new(true),
            check,
            prober: ArcSwapOption::empty(),
        });
        let weak = Arc::downgrade(&inner);
        let handle = std::thread::Builder::new()
            .name("kafka-probe".to_owned())
            .spawn(move || probe(&weak))
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        inner.prober.store(Some(Arc::new(handle.thread().clone())));
        Ok(Self { inner })
    }

    /// Whether the last question was answered.
    pub fn is_up(&self) -> bool {
        self.inner.up.load(Ordering::Relaxed)
    }

    /// Something looks wrong: ask now rather than later.
    pub fn suspect(&self) {
        if !self.inner.suspicious.swap(true, Ordering::Relaxed)
            && let Some(thread) = &*self.inner.prober.load()
        {
            thread.unpark();
        }
    }

    /// The number of partitions of a topic, `None` when it does not exist. Creates nothing.
    /// Waits for the broker up to two seconds, off the runtime.
    pub async fn partitions(&self, topic: &str) -> Result<Option<i32>, KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || inner.partitions(&topic)).await
    }

    /// The id of some broker of the cluster.
    pub async fn any_broker_id(&self) -> Option<i32> {
        let inner = self.inner.clone();
        let id = super::off_runtime(move || {
            let metadata = inner.client.fetch_metadata(Some(&inner.probe_topic), PATIENCE)?;
            Ok(metadata.brokers().first().map(rdkafka::metadata::MetadataBroker::id))
        });
        id.await.ok().flatten()
    }

    /// First and next offset of a partition, off the runtime.
    pub async fn watermarks(&self, topic: &str, partition: i32) -> Result<(i64, i64), KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || inner.client.fetch_watermarks(&topic, partition, PATIENCE)).await
    }
}

impl Inner {
    fn partitions(&self, topic: &str) -> Result<Option<i32>, KafkaError> {
        let metadata = self.client.fetch_metadata(Some(topic), PATIENCE)?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
        match found.error().map(RDKafkaErrorCode::from) {
            None => Ok(Some(found.partitions().len() as i32)),
            Some(
                RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::InvalidTopic,
            ) => Ok(None),
            Some(code) => Err(KafkaError::MetadataFetch(code)),
        }
    }
}

fn probe(weak: &Weak<Inner>) {
    while let Some(inner) = weak.upgrade() {
        let answer = inner.client.fetch_metadata(Some(&inner.probe_topic), PATIENCE);
        let was_up = inner.up.swap(answer.is_ok(), Ordering::Relaxed);
        let listener = inner.client.context();
        // Nothing is ever consumed: polling only makes the client say what it has to say.
        for _ in 0..20 {
            drop(inner.client.poll(Duration::ZERO));
        }
        match answer {
            Ok(_) => {
                if !was_up {
                    tracing::info!("Kafka answers again");
                }
                inner.suspicious.store(false, Ordering::Relaxed);
                listener.reason.store(None);
                inner.check.pass();
            }
            Err(error) => {
                // Kept over several attempts: the client says the same thing only once in a while.
                let reason = listener.reason.load_full().map_or_else(|| error.to_string(), |text| (*text).clone());
                if was_up {
                    tracing::warn!(reason, "Kafka does not answer; writes are refused until it does");
                }
                inner.check.fail(format!("no broker answers: {reason}"));
            }
        }
        let calm = inner.up.load(Ordering::Relaxed);
        drop(inner);
        std::thread::park_timeout(if calm { CALM } else { ANXIOUS });
    }
}
