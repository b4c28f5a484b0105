//! The one producer of a process: idempotent, `acks=all`, with admission of our own.
//!
//! `send` never waits: it hands the record over or refuses. The receipt resolves when the broker
//! has answered or when the delivery timeout leaves the outcome unknown. A fatal error of the
//! client makes the role unready while the client is replaced.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use metrics::{Counter, Histogram, counter, histogram};
use rdkafka::{
    ClientContext, Message, Statistics,
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext},
};
use tokio::sync::{Notify, oneshot};
use tracing::{Instrument, Span};

use super::{
    Config,
    admission::{Admission, Permit},
    broker::Broker,
    stats,
};

/// A record on its way to Kafka.
#[derive(Debug, Default)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    /// Chosen from the key's hash when absent.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
    pub headers: Option<OwnedHeaders>,
    /// Milliseconds since the epoch; the client's clock when absent.
    pub timestamp_ms: Option<i64>,
}

/// Where a record was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub partition: i32,
    pub offset: i64,
}

/// Why a record is not known to be stored.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SendError {
    #[error("the bound on records or bytes in flight is reached")]
    Full,
    #[error("no broker answers")]
    Unavailable,
    #[error("topic `{0}` does not exist")]
    UnknownTopic(String),
    #[error("the topic has no such partition")]
    UnknownPartition,
    #[error("the record is larger than the broker takes")]
    TooLarge,
    #[error("handed over, but not confirmed within the delivery timeout")]
    Unknown,
    #[error("{0}")]
    Rejected(RDKafkaErrorCode),
}

/// The answer to come for a record that was handed over.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Result<Stored, RDKafkaErrorCode>>);

impl Receipt {
    /// Waits for the broker's answer; bounded by the delivery timeout.
    pub async fn stored(self, topic: &str) -> Result<Stored, SendError> {
        // A span of its own only where the request has one.
        let answered =
            if Span::current().is_none() { self.0.await } else { self.0.instrument(publish_span(topic)).await };
        match answered {
            Ok(Ok(stored)) => Ok(stored),
            Ok(Err(code)) => Err(classify(code, topic)),
            Err(_) => Err(SendError::Unknown),
        }
    }
}

fn publish_span(topic: &str) -> Span {
    tracing::info_span!(
        "publish",
        otel.name = format!("publish {topic}"),
        otel.kind = "producer",
        messaging.system = "kafka",
        messaging.destination.name = topic,
    )
}

/// Cheap to clone; all clones share one client.
#[derive(Clone)]
pub struct Producer {
    shared: Arc<Shared>,
}

struct Shared {
    client: ArcSwap<BaseProducer<Context>>,
    admission: Arc<Admission>,
    broker: Broker,
    config: Config,
    fatal: Arc<AtomicBool>,
    outcomes: Arc<Outcomes>,
    stop: AtomicBool,
    metrics: Metrics,
}

#[derive(Clone)]
struct Metrics {
    stored: Counter,
    failed: Counter,
    refused: Counter,
    latency: Histogram,
}

impl Producer {
    /// Connects in the background; a broker that is down now is waited for.
    pub fn start(config: &Config, broker: Broker) -> Result<Self, KafkaError> {
        let metrics = Metrics {
            stored: counter!("postrider_producer_records_total", "outcome" => "stored"),
            failed: counter!("postrider_producer_records_total", "outcome" => "failed"),
            refused: counter!("postrider_producer_records_total", "outcome" => "refused"),
            latency: histogram!("postrider_producer_delivery_duration_seconds"),
        };
        let fatal = Arc::new(AtomicBool::new(false));
        let outcomes = Outcomes::start();
        let client = connect(config, &broker, &fatal, &outcomes, &metrics)?;
        let limits = &config.producer;
        let shared = Arc::new(Shared {
            client: ArcSwap::from_pointee(client),
            admission: Admission::new(limits.max_in_flight_records, limits.max_in_flight_bytes),
            broker,
            config: config.clone(),
            fatal,
            outcomes,
            stop: AtomicBool::new(false),
            metrics,
        });
        let polled = shared.clone();
        std::thread::Builder::new()
            .name("kafka-producer".to_owned())
            .spawn(move || polled.poll_until_stopped())
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { shared })
    }

    /// Hands a record over, or refuses it; never waits.
    pub fn send(&self, record: Outgoing<'_>) -> Result<Receipt, SendError> {
        let (sender, receiver) = oneshot::channel();
        self.hand_over(record, Some(sender))?;
        Ok(Receipt(receiver))
    }

    /// Hands a record over whose outcome nobody waits for; failures are counted.
    pub fn send_and_forget(&self, record: Outgoing<'_>) -> Result<(), SendError> {
        self.hand_over(record, None)
    }

    fn hand_over(
        &self,
        record: Outgoing<'_>,
        answer: Option<oneshot::Sender<Result<Stored, RDKafkaErrorCode>>>,
    ) -> Result<(), SendError> {
        let shared = &*self.shared;
        let refused = |error| {
            shared.metrics.refused.increment(1);
            Err(error)
        };
        if !shared.broker.is_up() || shared.fatal.load(Ordering::Relaxed) {
            return refused(SendError::Unavailable);
        }
        let bytes = record.key.map_or(0, <[u8]>::len) + record.payload.map_or(0, <[u8]>::len) + 256;
        let Some(permit) = shared.admission.try_acquire(bytes) else { return refused(SendError::Full) };
        let pending = Box::new(Pending { _permit: permit, handed_over: Instant::now(), answer });
        let mut message: BaseRecord<'_, [u8], [u8], Box<Pending>> = BaseRecord::with_opaque_to(record.topic, pending);
        message.partition = record.partition;
        message.key = record.key;
        message.payload = record.payload;
        message.headers = record.headers;
        message.timestamp = record.timestamp_ms;
        match shared.client.load().send(message) {
            Ok(()) => Ok(()),
            Err((error, _)) => refused(match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::QueueFull) => SendError::Full,
                Some(code) => classify(code, record.topic),
                None => SendError::Unavailable,
            }),
        }
    }

    /// Records and bytes in flight now.
    pub fn in_flight(&self) -> (usize, usize) {
        self.shared.admission.in_flight()
    }

    /// Waits for everything in flight, then stops. Call it off the runtime, after intake ended.
    pub fn close(&self, deadline: Duration) {
        let client = self.shared.client.load_full();
        if let Err(error) = client.flush(deadline) {
            let (records, _) = self.in_flight();
            tracing::warn!(error = %error, records, "records were still unconfirmed at shutdown");
        }
        self.shared.outcomes.close();
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn poll_until_stopped(&self) {
        let mut measured = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            self.client.load_full().poll(Duration::from_millis(100));
            if self.fatal.load(Ordering::Relaxed) {
                self.replace();
            }
            if measured.elapsed() > Duration::from_secs(1) {
                measured = Instant::now();
                let (records, bytes) = self.admission.in_flight();
                metrics::gauge!("postrider_producer_in_flight_records").set(records as f64);
                metrics::gauge!("postrider_producer_in_flight_bytes").set(bytes as f64);
            }
        }
    }

    /// Replaces a client that reported a fatal error; its unconfirmed records end as unknown.
    fn replace(&self) {
        let old = self.client.load_full();
        let reason = old.client().fatal_error().map_or_else(String::new, |(code, text)| format!("{code}: {text}"));
        tracing::error!(reason, "the producer failed fatally and is being replaced");
        counter!("postrider_producer_replaced_total").increment(1);
        if let Err(error) = old.flush(Duration::from_secs(2)) {
            tracing::warn!(error = %error, "records of the failed producer end with an unknown outcome");
        }
        match connect(&self.config, &self.broker, &self.fatal, &self.outcomes, &self.metrics) {
            Ok(client) => {
                self.client.store(Arc::new(client));
                self.fatal.store(false, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!(error = %error, "cannot make a new producer yet");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn connect(
    config: &Config,
    broker: &Broker,
    fatal: &Arc<AtomicBool>,
    outcomes: &Arc<Outcomes>,
    metrics: &Metrics,
) -> Result<BaseProducer<Context>, KafkaError> {
    let context =
        Context { broker: broker.clone(), fatal: fatal.clone(), outcomes: outcomes.clone(), metrics: metrics.clone() };
    config.producer_client().create_with_context(context)
}

fn classify(code: RDKafkaErrorCode, topic: &str) -> SendError {
    use RDKafkaErrorCode as E;
    match code {
        E::UnknownTopicOrPartition | E::UnknownTopic => SendError::UnknownTopic(topic.to_owned()),
        E::UnknownPartition => SendError::UnknownPartition,
        E::MessageSizeTooLarge | E::InvalidMessageSize => SendError::TooLarge,
        E::MessageTimedOut
        | E::PurgeInflight
        | E::PurgeQueue
        | E::Fatal
        | E::RequestTimedOut
        | E::OutOfOrderSequenceNumber => SendError::Unknown,
        E::NotEnoughReplicasAfterAppend => SendError::Unknown,
        other => SendError::Rejected(other),
    }
}

/// Travels with a record through the client.
struct Pending {
    _permit: Permit,
    handed_over: Instant,
    answer: Option<oneshot::Sender<Result<Stored, RDKafkaErrorCode>>>,
}

/// Who waits for a record, and what became of it.
type Outcome = (Box<Pending>, Result<Stored, RDKafkaErrorCode>);

/// Collects what the client reports and wakes those who wait from within the runtime: waking
/// thousands of tasks one by one from a foreign thread costs more than the records do.
#[derive(Default)]
struct Outcomes {
    /// Bounded by admission: every element holds a permit.
    reported: Mutex<Vec<Outcome>>,
    more: Notify,
    closed: AtomicBool,
}

impl Outcomes {
    fn start() -> Arc<Self> {
        let outcomes = Arc::<Self>::default();
        let announcer = outcomes.clone();
        tokio::spawn(async move {
            while !announcer.closed.load(Ordering::Acquire) {
                announcer.more.notified().await;
                announcer.announce();
            }
        });
        outcomes
    }

    fn report(&self, outcome: Outcome) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.push(outcome);
        if reported.len() == 1 {
            drop(reported);
            self.more.notify_one();
        }
    }

    fn announce(&self) {
        let reported = std::mem::take(&mut *self.reported.lock().unwrap_or_else(PoisonError::into_inner));
        for (pending, outcome) in reported {
            if let Some(answer) = pending.answer {
                // The client may have gone; the record is stored all the same.
                let _ = answer.send(outcome);
            }
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.more.notify_one();
    }
}

struct Context {
    broker: Broker,
    fatal: Arc<AtomicBool>,
    outcomes: Arc<Outcomes>,
    metrics: Metrics,
}

impl ClientContext for Context {
    fn stats(&self, statistics: Statistics) {
        stats::record(&statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::Fatal) => self.fatal.store(true, Ordering::Relaxed),
            Some(RDKafkaErrorCode::AllBrokersDown) => self.broker.suspect(),
            _ => tracing::debug!(error = %error, reason, "the producer reports a problem"),
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Pending>;

    fn delivery(&self, result: &DeliveryResult<'_>, pending: Box<Pending>) {
        let outcome = match result {
            Ok(message) => Ok(Stored { partition: message.partition(), offset: message.offset() }),
            Err((error, _)) => Err(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown)),
        };
        match outcome {
            Ok(_) => self.metrics.stored.increment(1),
            Err(RDKafkaErrorCode::Fatal) => self.fatal.store(true, Ordering::Relaxed),
            Err(_) => self.metrics.failed.increment(1),
        }
        self.metrics.latency.record(pending.handed_over.elapsed());
        self.outcomes.report((pending, outcome));
    }
}
