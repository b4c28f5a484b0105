//! Whether Kafka answers, and what it knows of a topic.
//!
//! A connection that drops is only a suspicion; a metadata request that nobody answers is proof.
//! While there is proof, writes are refused at once instead of waiting for their timeout.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    metadata::{Metadata, MetadataTopic},
};
use tokio_util::sync::CancellationToken;

use super::{Config, client_watchdog::count_replacement};
use crate::platform::ops::Check;

/// How often a healthy broker is asked.
const CALM: Duration = Duration::from_secs(3);
/// How often a silent one is.
const ANXIOUS: Duration = Duration::from_millis(250);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time for which a second client is tried beside the one that gets no answers, before a third takes its place.
const BESIDE: Duration = Duration::from_secs(4);

/// Cheap to clone; one per process.
#[derive(Clone)]
pub struct Broker {
    inner: Arc<Inner>,
}

type Client = BaseConsumer<Listener>;

struct Inner {
    /// Replaced when it gets no answer and another client does.
    client: ArcSwap<Client>,
    config: Config,
    probe_topic: String,
    up: AtomicBool,
    /// `None` while the last question was not answered.
    answers: Mutex<Option<Answers>>,
    suspicious: AtomicBool,
    check: Check,
    prober: ArcSwapOption<Thread>,
    /// Cancelled when the thread that asks has ended.
    died: CancellationToken,
}

/// Questions that were answered without one between them that was not: the first answer and the last.
#[derive(Clone, Copy)]
struct Answers {
    first: Instant,
    last: Instant,
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
            self.reason.store(Some(Arc::new(without_thread(message).to_owned())));
        }
    }

    /// Among these is that the account has no rights on the group, which the client looks up and never joins.
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "the metadata client reports a problem");
    }
}
impl ConsumerContext for Listener {}

/// Group of clients that only ask for metadata.
pub(super) const METADATA_GROUP: &str = "postrider-metadata";

/// Returns a message of the library without the thread that it begins with.
pub(super) fn without_thread(message: &str) -> &str {
    message.split_once("]: ").map_or(message, |(_, text)| text)
}

fn connect(config: &Config) -> Result<Client, KafkaError> {
    config.observer("metadata", METADATA_GROUP, Listener::default())
}

impl Broker {
    /// Starts asking. `check` is what readiness shows.
    pub fn start(config: &Config, check: Check) -> Result<Self, KafkaError> {
        let inner = Arc::new(Inner {
            client: ArcSwap::from_pointee(connect(config)?),
            config: config.clone(),
            probe_topic: config.topic("messages"),
            // Until the first answer writes are let through and wait, as at any short break.
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

    /// Returns what is cancelled when nobody asks any more.
    pub fn died(&self) -> CancellationToken {
        self.inner.died.clone()
    }

    /// Whether the last question was answered.
    pub fn is_up(&self) -> bool {
        self.inner.up.load(Ordering::Relaxed)
    }

    /// Returns since when every question has been answered, if one was after `moment`; else one is asked now.
    pub(super) fn up_since(&self, moment: Instant) -> Option<Instant> {
        let answers = (*self.inner.answers.lock().unwrap_or_else(PoisonError::into_inner))?;
        if answers.last < moment {
            self.suspect();
            return None;
        }
        Some(answers.first)
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

    /// Returns the fewest replicas that a partition of a topic has, and the number of brokers; `None` when the topic does
    /// not exist.
    pub async fn replicas(&self, topic: &str) -> Result<Option<(i32, i32)>, KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || {
            let metadata = inner.client.load_full().fetch_metadata(Some(&topic), PATIENCE)?;
            let partitions =
                metadata.topics().iter().find(|found| found.name() == topic).map(MetadataTopic::partitions);
            let fewest = partitions.and_then(|found| found.iter().map(|one| one.replicas().len() as i32).min());
            Ok(fewest.map(|replicas| (replicas, metadata.brokers().len() as i32)))
        })
        .await
    }

    /// The id of some broker of the cluster.
    pub async fn any_broker_id(&self) -> Option<i32> {
        let inner = self.inner.clone();
        let id = super::off_runtime(move || {
            let metadata = inner.client.load_full().fetch_metadata(Some(&inner.probe_topic), PATIENCE)?;
            Ok(metadata.brokers().first().map(rdkafka::metadata::MetadataBroker::id))
        });
        id.await.ok().flatten()
    }

    /// First and next offset of a partition, off the runtime.
    pub async fn watermarks(&self, topic: &str, partition: i32) -> Result<(i64, i64), KafkaError> {
        let (inner, topic) = (self.inner.clone(), topic.to_owned());
        super::off_runtime(move || inner.client.load_full().fetch_watermarks(&topic, partition, PATIENCE)).await
    }
}

impl Inner {
    fn partitions(&self, topic: &str) -> Result<Option<i32>, KafkaError> {
        let metadata = self.client.load_full().fetch_metadata(Some(topic), PATIENCE)?;
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

/// Asks for metadata. An answer without brokers is none: it is what a broker says that has just started, and the
/// client has forgotten all brokers when it has read it (librdkafka #5301).
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

/// A second client that is asked while the first one gets no answers.
struct Spare {
    client: Client,
    since: Instant,
}

/// Asks whether Kafka answers, until the last [`Broker`] is dropped.
fn probe(weak: &Weak<Inner>) {
    let mut spare: Option<Spare> = None;
    while let Some(inner) = weak.upgrade() {
        let client = inner.client.load_full();
        let mut answer = ask(&client, &inner.probe_topic, PATIENCE);
        // Nothing is ever consumed: polling only makes the client say what it has to say.
        for _ in 0..20 {
            drop(client.poll(Duration::ZERO));
        }
        drop(client);
        match &answer {
            Ok(_) => spare.take().into_iter().for_each(super::discard),
            Err(_) => answer = inner.ask_beside(&mut spare).unwrap_or(answer),
        }
        inner.conclude(answer);
        let calm = inner.up.load(Ordering::Relaxed);
        drop(inner);
        std::thread::park_timeout(if calm { CALM } else { ANXIOUS });
    }
}

impl Inner {
    /// Asks with a client of its own, which takes the place of the one that gets no answers when it gets one. A spare
    /// client is given up after a while as well: it may lose its way just like the first.
    fn ask_beside(&self, spare: &mut Option<Spare>) -> Option<Result<Metadata, KafkaError>> {
        if spare.as_ref().is_none_or(|spare| spare.since.elapsed() >= BESIDE) {
            let next = connect(&self.config).ok().map(|client| Spare { client, since: Instant::now() });
            super::discard(std::mem::replace(spare, next));
        }
        let answer = ask(&spare.as_ref()?.client, &self.probe_topic, PATIENCE);
        if answer.is_ok() {
            let found = spare.take()?;
            count_replacement("metadata", "disconnected");
            super::discard(self.client.swap(Arc::new(found.client)));
        }
        Some(answer)
    }

    fn conclude(&self, answer: Result<Metadata, KafkaError>) {
        let was_up = self.up.swap(answer.is_ok(), Ordering::Relaxed);
        let client = self.client.load_full();
        let listener = client.context();
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Ok(_) => {
                let now = Instant::now();
                answers.get_or_insert(Answers { first: now, last: now }).last = now;
                if !was_up {
                    tracing::info!("Kafka answers again");
                }
                self.suspicious.store(false, Ordering::Relaxed);
                listener.reason.store(None);
                self.check.pass();
            }
            Err(error) => {
                *answers = None;
                // Kept over several attempts: the client says the same thing only once in a while.
                let reason = listener.reason.load_full().map_or_else(|| error.to_string(), |text| (*text).clone());
                if was_up {
                    tracing::warn!(reason, "Kafka does not answer; writes are refused until it does");
                }
                self.check.fail(format!("no broker answers: {reason}"));
            }
        }
    }
}
