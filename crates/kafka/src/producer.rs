//! Producer for Kafka: idempotent, `acks=all`, with its own admission control and batching.
//!
//! `send` never waits: it accepts the record or rejects it. The receipt resolves when the broker
//! has answered, or when the delivery timeout leaves the outcome unknown. The producer replaces a
//! client that reports a fatal error, or that is stuck while Kafka answers other clients; until
//! then it rejects writes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use postrider_limits::memory::budgets;
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, BaseRecord, Producer as _, PurgeConfig},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    Config,
    adaptive_linger::{AdaptiveLinger, wait_for},
    admission::{self, Admission, Permit},
    broker::Broker,
    client_watchdog::{ClientWatchdog, Connectivity, Stuck},
    delivery::{Context, Metrics, Outcomes, Resend, classify},
    outgoing::{Outgoing, Purpose, Receipt, SendError, Stored},
    pending::{Answer, Pending, Waiting},
    record_size::{batch_bytes, batch_bytes_of},
};

/// Time that records in flight have to be confirmed after their client failed fatally. Records of a
/// stuck client are not waited for.
const FLUSH_AFTER_FATAL: Duration = Duration::from_secs(2);

/// Time that a client has to report the records that it was told to give up.
const REPORT_AFTER_PURGE: Duration = Duration::from_millis(500);

/// Writes records through one librdkafka client. Cheap to clone; all clones share the client.
#[derive(Clone)]
pub struct Producer {
    shared: Arc<Shared>,
    releaser: Thread,
}

struct Shared {
    purpose: Purpose,
    client: ArcSwap<BaseProducer<Context>>,
    admission: Arc<Admission>,
    linger: AdaptiveLinger<Waiting>,
    broker: Broker,
    config: Config,
    /// Set when the client has failed and is about to be replaced.
    fatal: Arc<AtomicBool>,
    watchdog: ClientWatchdog,
    outcomes: Arc<Outcomes>,
    /// Receives the records of batches that the broker rejected.
    resend: Option<Resend>,
    stop: AtomicBool,
    /// Cancelled when a thread or task of the producer has ended.
    died: CancellationToken,
    metrics: Metrics,
}

impl Producer {
    /// Starts the producer of postrider's own topics. It connects in the background and waits for a
    /// broker that is down. Must be called inside the runtime.
    pub fn start(config: &Config, broker: Broker) -> Result<Self, KafkaError> {
        Self::start_for(Purpose::Internal, config, broker, None, None)
    }

    /// Starts a producer whose batches have one record each, so that a rejected record fails alone.
    pub fn start_alone(config: &Config, broker: Broker) -> Result<Self, KafkaError> {
        Self::start_for(Purpose::Alone, config, broker, None, None)
    }

    /// Starts a producer. Pass another producer's `admission` to share its limit.
    pub(super) fn start_for(
        purpose: Purpose,
        config: &Config,
        broker: Broker,
        admission: Option<Arc<Admission>>,
        resend: Option<Resend>,
    ) -> Result<Self, KafkaError> {
        let limits = &config.producer;
        let budget = if purpose == Purpose::Internal { &budgets().producer } else { &budgets().producer_callers };
        let new_admission =
            || Admission::new(limits.max_in_flight_records, limits.max_in_flight_bytes.min(budget.bound()));
        let context = Context {
            broker: broker.clone(),
            connectivity: Connectivity::default(),
            fatal: Arc::default(),
            outcomes: Arc::default(),
            resend: resend.clone(),
            metrics: Metrics::of(purpose),
        };
        let (fatal, outcomes, metrics) = (context.fatal.clone(), context.outcomes.clone(), context.metrics.clone());
        let client = config.producer_client(purpose).create_with_context(context)?;
        let shared = Arc::new(Shared {
            purpose,
            client: ArcSwap::from_pointee(client),
            admission: admission.unwrap_or_else(new_admission),
            linger: AdaptiveLinger::default(),
            broker,
            config: config.clone(),
            fatal,
            watchdog: ClientWatchdog::default(),
            outcomes,
            resend,
            stop: AtomicBool::new(false),
            died: CancellationToken::new(),
            metrics,
        });
        let (polled, released) = (shared.clone(), shared.clone());
        let guard = || shared.died.clone().drop_guard();
        let (polling, releasing, announcing) = (guard(), guard(), guard());
        spawn("kafka-producer", move || (polled.poll_until_stopped(), polling).0)?;
        let releaser = spawn("kafka-linger", move || (released.release_until_stopped(), releasing).0)?;
        let outcomes = shared.outcomes.clone();
        tokio::spawn(async move { (outcomes.announce_until_closed().await, announcing).0 });
        Ok(Self { shared, releaser })
    }

    /// Returns a token that is cancelled when a part of the producer has ended, by [`Self::close`]
    /// or because it died.
    pub fn died(&self) -> CancellationToken {
        self.shared.died.clone()
    }

    /// Accepts a record or rejects it; never waits.
    pub fn send(&self, record: Outgoing<'_>) -> Result<Receipt, SendError> {
        let (sender, receiver) = oneshot::channel();
        self.take(record, sender)?;
        let deadline = Instant::now() + Duration::from_millis(self.shared.config.producer.delivery_timeout_ms);
        Ok(Receipt { outcome: receiver, deadline })
    }

    /// Accepts a record and waits until it is stored.
    pub async fn store(&self, record: Outgoing<'_>) -> Result<Stored, SendError> {
        let topic = record.topic;
        self.send(record)?.stored(topic).await
    }

    /// Accepts a record whose outcome nobody waits for; failures are only counted. The record
    /// bypasses the adaptive linger, so its order relative to lingering records is not kept.
    pub fn send_and_forget(&self, record: Outgoing<'_>) -> Result<(), SendError> {
        let permit = self.admit(&record, Admission::try_acquire_aside)?;
        self.shared.hand_over(record, Pending::new(permit, None))
    }

    /// Accepts a record that another producer's client has returned, with its pending answer.
    pub(super) fn take_over(&self, waiting: Waiting) {
        waiting.use_with(|record, pending| {
            // `hand_over` has already reported a rejection.
            let _ = self.shared.hand_over(record, pending);
        });
    }

    /// Returns the limit on what is in flight.
    pub(super) fn admission(&self) -> Arc<Admission> {
        self.shared.admission.clone()
    }

    /// Takes a permit for a record, if the record is not too large and Kafka is up.
    fn admit(
        &self,
        record: &Outgoing<'_>,
        acquire: impl FnOnce(&Arc<Admission>, usize) -> Option<Permit>,
    ) -> Result<Permit, SendError> {
        let shared = &*self.shared;
        let bytes = admission::weight(record.key, record.payload);
        let limit = shared.config.producer.max_message_bytes as usize + record.extra_bytes;
        // The size is exact only where it matters: a record that the broker rejects delays the
        // others in its batch, but most records are far below the limit.
        let batch = if bytes > limit / 2 { batch_bytes(record) } else { 0 };
        let admitted = if batch > limit {
            Err(SendError::too_large(batch, Some(limit)))
        } else if !self.is_up() {
            Err(SendError::Unavailable)
        } else {
            acquire(&shared.admission, bytes).ok_or(SendError::Full)
        };
        admitted.inspect_err(|_| shared.metrics.refused.increment(1))
    }

    fn take(&self, record: Outgoing<'_>, answer: Answer) -> Result<(), SendError> {
        let shared = &*self.shared;
        let permit = self.admit(&record, Admission::try_acquire)?;
        let pending = Pending::new(permit, Some(answer));
        if shared.linger.is_idle() && wait_for(shared.admission.peak()).is_zero() {
            return shared.hand_over(record, pending);
        }
        if shared.linger.push(Waiting::new(record, pending)) {
            self.releaser.unpark();
        }
        Ok(())
    }

    /// Returns whether Kafka answers and the client works.
    pub fn is_up(&self) -> bool {
        self.shared.broker.is_up() && !self.shared.fatal.load(Ordering::Relaxed)
    }

    /// Returns the records and bytes in flight.
    pub fn in_flight(&self) -> (usize, usize) {
        self.shared.admission.in_flight()
    }

    /// Returns whether the limit on what is in flight would admit a record of this size now.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.shared.admission.has_room(bytes)
    }

    /// Waits up to `deadline` for everything in flight, then stops. Must be called off the runtime,
    /// after intake has ended.
    pub fn close(&self, deadline: Duration) {
        let shared = &*self.shared;
        let until = Instant::now() + deadline;
        while !shared.linger.is_idle() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Err(error) = shared.client.load_full().flush(until.saturating_duration_since(Instant::now())) {
            let (records, _) = self.in_flight();
            tracing::warn!(error = %error, records, "shutting down with unconfirmed records");
        }
        shared.stop.store(true, Ordering::Release);
        self.releaser.unpark();
        shared.outcomes.close();
    }
}

impl Shared {
    /// Hands over lingering records, a batch at a time; after the stop, hands over the last batch
    /// and returns.
    fn release_until_stopped(&self) {
        loop {
            let stopping = self.stop.load(Ordering::Acquire);
            if self.linger.is_idle() && !stopping {
                std::thread::park();
                continue;
            }
            std::thread::sleep(wait_for(self.admission.peak()));
            self.linger.release(|waiting| {
                waiting.use_with(|record, pending| {
                    // `hand_over` has already reported a rejection.
                    let _ = self.hand_over(record, pending);
                });
            });
            if stopping {
                return;
            }
        }
    }

    /// Passes one record to the client library. The library rejects some records immediately; those
    /// are reported as failed.
    fn hand_over(&self, record: Outgoing<'_>, mut pending: Box<Pending>) -> Result<(), SendError> {
        pending.timestamp_ms = record.timestamp_ms;
        let mut message: BaseRecord<'_, [u8], [u8], Box<Pending>> = BaseRecord::with_opaque_to(record.topic, pending);
        message.partition = record.partition;
        message.key = record.key;
        message.payload = record.payload;
        message.headers = record.headers;
        message.timestamp = record.timestamp_ms;
        self.client.load().send(message).map_err(|(error, message)| {
            self.metrics.refused.increment(1);
            let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
            let bytes = || batch_bytes_of(message.key, message.payload, message.headers.as_ref());
            let refusal = classify(code, record.topic, bytes);
            self.outcomes.report(message.delivery_opaque, Err(refusal.clone()));
            refusal
        })
    }

    fn poll_until_stopped(&self) {
        let mut measured = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            self.client.load_full().poll(Duration::from_millis(100));
            if self.fatal.load(Ordering::Relaxed) {
                self.replace("fatal");
            } else if let Some(stuck) = self.find_stuck() {
                self.fatal.store(true, Ordering::Relaxed);
                self.replace(stuck.label());
            }
            if measured.elapsed() > Duration::from_secs(1) {
                measured = Instant::now();
                if self.purpose == Purpose::Alone {
                    // The producer of callers' records, which shares this limit, reports it.
                    continue;
                }
                self.admission.roll_peak();
                let (records, bytes) = self.admission.in_flight();
                let client = self.purpose.client();
                metrics::gauge!("postrider_producer_in_flight_records", "client" => client).set(records as f64);
                metrics::gauge!("postrider_producer_in_flight_bytes", "client" => client).set(bytes as f64);
            }
        }
    }

    /// Returns the reason if the client is stuck although Kafka answers others.
    fn find_stuck(&self) -> Option<Stuck> {
        let client = self.client.load();
        self.watchdog.look(&client.context().connectivity, |reported| self.broker.up_since(reported))
    }

    /// Creates a client with the same properties as the current one.
    fn connect(&self) -> Result<BaseProducer<Context>, KafkaError> {
        let context = Context {
            broker: self.broker.clone(),
            connectivity: Connectivity::default(),
            fatal: self.fatal.clone(),
            outcomes: self.outcomes.clone(),
            resend: self.resend.clone(),
            metrics: self.metrics.clone(),
        };
        self.config.producer_client(self.purpose).create_with_context(context)
    }

    /// Replaces a failed client. The outcome of its unconfirmed records is unknown.
    fn replace(&self, reason: &'static str) {
        let old = self.client.load_full();
        if let Some((code, text)) = old.client().fatal_error() {
            tracing::error!(%code, reason = text, "producer failed fatally, replacing its client");
        }
        let flush_timeout = if old.client().fatal_error().is_some() { FLUSH_AFTER_FATAL } else { Duration::ZERO };
        if let Err(error) = old.flush(flush_timeout) {
            let (records, _) = self.admission.in_flight();
            tracing::warn!(error = %error, records, "outcome of the failed client's records is unknown");
        }
        // A record that the old client kept could be stored after later ones of the same key.
        old.purge(PurgeConfig::default().queue().inflight());
        if let Err(error) = old.flush(REPORT_AFTER_PURGE) {
            tracing::debug!(error = %error, "the failed client has not yet reported all its records");
        }
        match self.connect() {
            Ok(client) => {
                self.watchdog.replaced(self.purpose.client(), reason);
                self.client.store(Arc::new(client));
                // Records that were on their way to the old client meanwhile.
                old.purge(PurgeConfig::default().queue().inflight());
                self.fatal.store(false, Ordering::Relaxed);
                super::discard(old);
            }
            Err(error) => {
                tracing::error!(error = %error, "cannot create a new producer client, retrying");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<Thread, KafkaError> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    spawned.map(|handle| handle.thread().clone()).map_err(|error| KafkaError::ClientCreation(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_health::Health;

    #[tokio::test]
    async fn a_replaced_client_keeps_no_record_that_it_could_send_later() {
        // Nothing listens on this port.
        let config = Config { brokers: vec!["127.0.0.1:1".to_owned()], ..Config::default() };
        let producer =
            Producer::start(&config, Broker::start(&config, Health::default().check("kafka")).unwrap()).unwrap();
        let shared = producer.shared.clone();
        let old = shared.client.load_full();
        let (answer, outcome) = oneshot::channel();
        let record = Outgoing { topic: "orders", payload: Some(b"1"), ..Outgoing::default() };
        let permit = shared.admission.try_acquire(1).unwrap();
        shared.hand_over(record, Pending::new(permit, Some(answer))).unwrap();
        shared.replace("test");
        // The old client still exists, and has given up the record.
        let outcome = tokio::time::timeout(Duration::from_secs(20), outcome).await;
        assert!(matches!(outcome.unwrap().unwrap(), Err(SendError::Unknown)));
        drop(old);
        producer.close(Duration::ZERO);
    }
}
