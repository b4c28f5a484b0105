//! Passes the client's delivery reports to the tasks that wait for them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use metrics::{Counter, Histogram, counter, histogram};
use parking_lot::Mutex;
use rdkafka::{
    ClientContext, Message, Statistics,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedHeaders, BorrowedMessage, DeliveryResult},
    producer::ProducerContext,
};
use tokio::sync::{Notify, mpsc};

use super::{
    broker::Broker,
    client_watchdog::Connectivity,
    library_log,
    outgoing::{Outgoing, Purpose, SendError, Stored},
    pending::{Pending, Waiting},
    record_size::batch_bytes_of,
    stats,
};

/// Channel for the records of rejected batches. Bounded by admission: each record holds a permit.
pub(super) type Resend = mpsc::UnboundedSender<Waiting>;

/// Maps a broker's error code to the error that the writer gets. `bytes` returns the record's size.
pub(super) fn classify(code: RDKafkaErrorCode, topic: &str, bytes: impl FnOnce() -> usize) -> SendError {
    use RDKafkaErrorCode as E;
    match code {
        E::QueueFull => SendError::Full,
        E::UnknownTopicOrPartition | E::UnknownTopic => SendError::UnknownTopic(topic.to_owned()),
        E::UnknownPartition => SendError::UnknownPartition,
        E::MessageSizeTooLarge | E::InvalidMessageSize => SendError::too_large(bytes(), None),
        // The library does not know whether the record was stored.
        E::MessageTimedOut
        | E::PurgeInflight
        | E::PurgeQueue
        | E::Fatal
        | E::RequestTimedOut
        | E::OutOfOrderSequenceNumber
        | E::NotEnoughReplicasAfterAppend => SendError::Unknown,
        other => SendError::Rejected(other),
    }
}

/// Returns whether the error concerns the whole batch, so that this record may have been rejected
/// only because of another one. No record of such a batch is stored.
fn concerns_whole_batch(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as E;
    matches!(
        code,
        E::InvalidDifferentRecord
            | E::InvalidRecord
            | E::InvalidTimestamp
            | E::MessageSizeTooLarge
            | E::InvalidMessageSize
    )
}

/// Metrics of a producer.
#[derive(Clone)]
pub(super) struct Metrics {
    stored: Counter,
    failed: Counter,
    resent: Counter,
    pub refused: Counter,
    latency: Histogram,
}

impl Metrics {
    pub fn of(purpose: Purpose) -> Self {
        let client = purpose.client();
        let outcome = |word| counter!("postrider_producer_records_total", "client" => client, "outcome" => word);
        Self {
            stored: outcome("stored"),
            failed: outcome("failed"),
            resent: outcome("resent"),
            refused: outcome("refused"),
            latency: histogram!("postrider_producer_delivery_duration_seconds", "client" => client),
        }
    }
}

/// A pending record and its outcome.
type Outcome = (Box<Pending>, Result<Stored, SendError>);

/// Collects the client's reports and answers the waiting tasks from inside the runtime: waking
/// thousands of tasks one by one from another thread costs more than the records do.
#[derive(Default)]
pub(super) struct Outcomes {
    /// Bounded by admission: every element holds a permit.
    reported: Mutex<Vec<Outcome>>,
    more: Notify,
    closed: AtomicBool,
}

impl Outcomes {
    pub fn report(&self, pending: Box<Pending>, outcome: Result<Stored, SendError>) {
        if pending.answer.is_none() {
            return;
        }
        let mut reported = self.reported.lock();
        reported.push((pending, outcome));
        let first = reported.len() == 1;
        drop(reported);
        if first {
            self.more.notify_one();
        }
    }

    /// Answers waiting tasks as reports arrive, until closed.
    pub async fn announce_until_closed(self: Arc<Self>) {
        while !self.closed.load(Ordering::Acquire) {
            self.more.notified().await;
            self.announce();
        }
    }

    /// Answers every task whose record has an outcome.
    fn announce(&self) {
        let reported = std::mem::take(&mut *self.reported.lock());
        for (pending, outcome) in reported {
            if let Some(answer) = pending.answer {
                // The caller may have disconnected; the record is stored regardless.
                let _ = answer.send(outcome);
            }
        }
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.more.notify_one();
    }
}

/// Callbacks of the client library, called on the polling thread.
pub(super) struct Context {
    pub broker: Broker,
    /// Connectivity of this client alone.
    pub connectivity: Connectivity,
    pub fatal: Arc<AtomicBool>,
    pub outcomes: Arc<Outcomes>,
    pub resend: Option<Resend>,
    pub metrics: Metrics,
}

impl Context {
    /// Sends a record of a rejected batch to [`Resend`]. Returns it if the rejection is final.
    fn resend(
        &self,
        code: RDKafkaErrorCode,
        message: &BorrowedMessage<'_>,
        pending: Box<Pending>,
    ) -> Option<Box<Pending>> {
        let Some(resend) = self.resend.as_ref().filter(|_| concerns_whole_batch(code)) else { return Some(pending) };
        let record = Outgoing {
            topic: message.topic(),
            partition: Some(message.partition()),
            key: message.key(),
            payload: message.payload(),
            headers: message.headers().map(BorrowedHeaders::detach),
            timestamp_ms: pending.timestamp_ms,
            extra_bytes: 0,
        };
        self.metrics.resent.increment(1);
        resend.send(Waiting::new(record, pending)).err().map(|unsent| unsent.0.into_pending())
    }
}

impl ClientContext for Context {
    fn stats(&self, statistics: Statistics) {
        self.connectivity.report(&statistics);
        stats::record(&statistics);
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        library_log::log("producer", level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::Fatal) => self.fatal.store(true, Ordering::Relaxed),
            Some(RDKafkaErrorCode::AllBrokersDown) => self.broker.suspect(),
            _ => tracing::debug!(error = %error, reason, "producer client reported an error"),
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Pending>;

    fn delivery(&self, result: &DeliveryResult<'_>, pending: Box<Pending>) {
        let (pending, outcome) = match result {
            Ok(message) => {
                self.metrics.stored.increment(1);
                (pending, Ok(Stored { partition: message.partition(), offset: message.offset() }))
            }
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                let Some(pending) = self.resend(code, message, pending) else { return };
                self.metrics.failed.increment(1);
                if code == RDKafkaErrorCode::Fatal {
                    self.fatal.store(true, Ordering::Relaxed);
                }
                let bytes = || batch_bytes_of(message.key(), message.payload(), message.headers());
                (pending, Err(classify(code, message.topic(), bytes)))
            }
        };
        self.metrics.latency.record(pending.accepted.elapsed());
        self.outcomes.report(pending, outcome);
    }
}
