//! Probes whether Kafka answers, and looks up topic metadata.
//!
//! A dropped connection is only a suspicion; an unanswered metadata request is proof. While Kafka
//! does not answer, writes are rejected at once instead of waiting for their timeout.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use postrider_health::Check;
use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    metadata::{Metadata, MetadataTopic},
};
use tokio_util::sync::CancellationToken;

use super::{Config, client_watchdog::count_replacement, library_log};

/// Probe interval while Kafka answers.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);
/// Probe interval while Kafka does not answer.
const PROBE_INTERVAL_DOWN: Duration = Duration::from_millis(250);
/// Timeout of one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Time after which an unanswered spare client is replaced by another one.
const SPARE_LIFETIME: Duration = Duration::from_secs(4);

/// Availability of Kafka and lookups of topic metadata. One per process; cheap to clone.
#[derive(Clone)]
pub struct Broker {
    inner: Arc<Inner>,
}

type Client = BaseConsumer<Listener>;

struct Inner {
    /// The metadata client. Replaced when it gets no answer and another client does.
    client: ArcSwap<Client>,
    config: Config,
    probe_topic: String,
    up: AtomicBool,
    /// `None` while the last probe was unanswered.
    answers: Mutex<Option<Answers>>,
    suspicious: AtomicBool,
    check: Check,
    prober: ArcSwapOption<Thread>,
    /// Cancelled when the probe thread has ended.
    died: CancellationToken,
}

/// Uninterrupted series of answered probes: the times of the first and the last answer.
#[derive(Clone, Copy)]
struct Answers {
    first: Instant,
    last: Instant,
    /// True if a probe went unanswered before the series.
    follows_outage: bool,
}

/// Keeps the client's last connection error: a failed request alone does not distinguish a wrong
/// password from a broker that is down.
#[derive(Default)]
struct Listener {
    reason: ArcSwapOption<String>,
}

impl ClientContext for Listener {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "metadata client reported an error");
        if (level as i32) <= RDKafkaLogLevel::Error as i32 {
            self.reason.store(Some(Arc::new(without_thread(message).to_owned())));
        }
    }

    /// Logged at debug level only: one of these errors is that the account has no rights on the
    /// group, which the client looks up but never joins.
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "metadata client reported an error");
    }
}
impl ConsumerContext for Listener {}

/// Consumer group id of clients that only request metadata.
pub(super) const METADATA_GROUP: &str = "postrider-metadata";

/// Returns a log message of the library without its leading thread name.
pub(super) fn without_thread(message: &str) -> &str {
    message.split_once("]: ").map_or(message, |(_, text)| text)
}

fn connect(config: &Config) -> Result<Client, KafkaError> {
    config.observer("metadata", METADATA_GROUP, Listener::default())
}

impl Broker {
    /// Starts the probe thread. `check` is the readiness check that shows the result.
    pub fn start(config: &Config, check: Check) -> Result<Self, KafkaError> {
        let inner = Arc::new(Inner {
            client: ArcSwap::from_pointee(connect(config)?),
            config: config.clone(),
            probe_topic: config.topic("messages"),
            // Until the first answer, writes are accepted and wait, as in any short outage.
            up: AtomicBool::new(true),
            answers: Mutex::new(None),
            suspicious: AtomicBool::new(true),
            check,
            prober: ArcSwapOption::empty(),
            died: CancellationToken::new(),
        });
        let (weak, guard) = (Arc::downgrade(&inner), inner.died.clone().drop_guard());
        let handle = std::thread::Builder::new()
            .name("kafka-probe".to_owned())
            .spawn(move || (probe(&weak), guard).0)
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        inner.prober.store(Some(Arc::new(handle.thread().clone())));
        Ok(Self { inner })
    }

    /// Returns a token that is cancelled when the probe thread has ended.
    pub fn died(&self) -> CancellationToken {
        self.inner.died.clone()
    }

    /// Returns whether the last probe was answered.
    pub fn is_up(&self) -> bool {
        self.inner.up.load(Ordering::Relaxed)
    }

    /// Returns the time since which every probe has been answered, if one was answered after
    /// `moment`. Otherwise requests a probe now.
    pub(super) fn up_since(&self, moment: Instant) -> Option<Instant> {
        let answers = (*self.inner.answers.lock())?;
        if answers.last < moment {
            self.suspect();
            return None;
        }
        Some(answers.first)
    }

    /// Returns the end of the last outage; `None` if there was none, or it goes on.
    pub(super) fn recovered_at(&self) -> Option<Instant> {
        let answers = *self.inner.answers.lock();
        answers.filter(|answers| answers.follows_outage).map(|answers| answers.first)
    }

    /// Requests a probe now, because something looks wrong.
    pub fn suspect(&self) {
        if !self.inner.suspicious.swap(true, Ordering::Relaxed)
            && let Some(thread) = &*self.inner.prober.load()
        {
            thread.unpark();
        }
    }

    /// Returns the number of partitions of a topic; `None` if the topic does not exist. Creates
    /// nothing. Waits for the broker up to two seconds, off the runtime.
    pub async fn partitions(&self, topic: &str) -> Result<Option<i32>, KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || inner.partitions(&topic)).await
    }

    /// Returns the smallest number of replicas of a topic's partitions, and the number of brokers;
    /// `None` if the topic does not exist.
    pub async fn replicas(&self, topic: &str) -> Result<Option<(i32, i32)>, KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || {
            let metadata = inner.client.load_full().fetch_metadata(Some(&topic), ANSWER_TIMEOUT)?;
            let partitions =
                metadata.topics().iter().find(|found| found.name() == topic).map(MetadataTopic::partitions);
            let fewest = partitions.and_then(|found| found.iter().map(|one| one.replicas().len() as i32).min());
            Ok(fewest.map(|replicas| (replicas, metadata.brokers().len() as i32)))
        })
        .await
    }

    /// Returns the id of any one broker of the cluster.
    pub async fn any_broker_id(&self) -> Option<i32> {
        let inner = self.inner.clone();
        let id = super::off_runtime(move || {
            let metadata = inner.client.load_full().fetch_metadata(Some(&inner.probe_topic), ANSWER_TIMEOUT)?;
            Ok(metadata.brokers().first().map(rdkafka::metadata::MetadataBroker::id))
        });
        id.await.ok().flatten()
    }

    /// Returns the first and the next offset of a partition. Runs off the runtime.
    pub async fn watermarks(&self, topic: &str, partition: i32) -> Result<(i64, i64), KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || inner.client.load_full().fetch_watermarks(&topic, partition, ANSWER_TIMEOUT)).await
    }
}

impl Inner {
    fn partitions(&self, topic: &str) -> Result<Option<i32>, KafkaError> {
        let metadata = self.client.load_full().fetch_metadata(Some(topic), ANSWER_TIMEOUT)?;
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

/// Requests metadata. Treats a response without brokers as a failure: a broker that has just
/// started sends it, and the client then forgets all brokers (librdkafka #5301).
pub(super) fn ask<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    patience: Duration,
) -> Result<Metadata, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), patience)?;
    if metadata.brokers().is_empty() {
        return Err(KafkaError::MetadataFetch(RDKafkaErrorCode::AllBrokersDown));
    }
    Ok(metadata)
}

/// Makes a client deliver its pending events, such as errors, to its context.
pub(super) fn deliver_events<C: ConsumerContext>(client: &BaseConsumer<C>) {
    for _ in 0..20 {
        drop(client.poll(Duration::ZERO));
    }
}

/// Second client that is probed while the first one gets no answers.
struct Spare {
    client: Client,
    since: Instant,
}

/// Probes Kafka until the last [`Broker`] is dropped.
fn probe(weak: &Weak<Inner>) {
    let mut spare: Option<Spare> = None;
    while let Some(inner) = weak.upgrade() {
        let client = inner.client.load_full();
        let mut answer = ask(&client, &inner.probe_topic, ANSWER_TIMEOUT);
        // The client consumes nothing: polling only makes it deliver its pending events.
        for _ in 0..20 {
            drop(client.poll(Duration::ZERO));
        }
        drop(client);
        match &answer {
            Ok(_) => spare.take().into_iter().for_each(super::discard),
            Err(_) => answer = inner.probe_with_spare(&mut spare).unwrap_or(answer),
        }
        inner.update_status(answer);
        let up = inner.up.load(Ordering::Relaxed);
        drop(inner);
        std::thread::park_timeout(if up { PROBE_INTERVAL } else { PROBE_INTERVAL_DOWN });
    }
}

impl Inner {
    /// Probes with the spare client, which replaces the first client as soon as it gets an answer.
    /// A spare client is itself replaced after a while, because it can get stuck like the first
    /// one.
    fn probe_with_spare(&self, spare: &mut Option<Spare>) -> Option<Result<Metadata, KafkaError>> {
        if spare.as_ref().is_none_or(|spare| spare.since.elapsed() >= SPARE_LIFETIME) {
            let next = connect(&self.config).ok().map(|client| Spare { client, since: Instant::now() });
            super::discard(std::mem::replace(spare, next));
        }
        let answer = ask(&spare.as_ref()?.client, &self.probe_topic, ANSWER_TIMEOUT);
        if answer.is_ok() {
            let found = spare.take()?;
            count_replacement("metadata", "disconnected");
            super::discard(self.client.swap(Arc::new(found.client)));
        }
        Some(answer)
    }

    fn update_status(&self, answer: Result<Metadata, KafkaError>) {
        let was_up = self.up.swap(answer.is_ok(), Ordering::Relaxed);
        let client = self.client.load_full();
        let listener = client.context();
        let mut answers = self.answers.lock();
        match answer {
            Ok(_) => {
                let now = Instant::now();
                answers.get_or_insert(Answers { first: now, last: now, follows_outage: !was_up }).last = now;
                if !was_up {
                    tracing::info!(client_errors = library_log::take(), "kafka reachable again");
                }
                self.suspicious.store(false, Ordering::Relaxed);
                listener.reason.store(None);
                self.check.pass();
            }
            Err(error) => {
                *answers = None;
                // The reason is kept over several probes, because the client reports the same error
                // only now and then.
                let reason = listener.reason.load_full().map_or_else(|| error.to_string(), |text| (*text).clone());
                if was_up {
                    tracing::warn!(reason, "kafka does not answer, rejecting writes until it does");
                }
                self.check.fail(format!("no broker answers: {reason}"));
            }
        }
    }
}
