//! Reads the records that a topic has now, from one offset to another, without a consumer group.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};

use super::{Config, broker::ask};

/// Timeout of one request, and of waiting for the next record before the end is reached.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time for which a lookup is repeated after errors that pass.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait before a lookup is repeated.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Offset range of one partition: `from` inclusive, `to` exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub partition: i32,
    pub from: i64,
    pub to: i64,
}

/// Reason why a topic could not be read to the end.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error("the deadline passed before the whole topic was read")]
    Deadline,
}

/// Client that reads topics. Its calls block: use and drop it off the runtime.
pub struct Scanner {
    pub(super) client: BaseConsumer<Quiet>,
}

/// Client context that logs at debug level only: `read` returns the errors that matter, and the end
/// of a partition is not an error.
pub(super) struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "scan client reported an error");
    }
}
impl ConsumerContext for Quiet {}

impl Scanner {
    pub fn connect(config: &Config) -> Result<Self, KafkaError> {
        let mut properties = config.client("scan");
        properties
            // The library requires a group; the client never joins it.
            .set("group.id", "postrider-scan")
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .set("auto.offset.reset", "earliest")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "50")
            .set("queued.max.messages.kbytes", "8192")
            .set("statistics.interval.ms", "0");
        Ok(Self { client: config.with_overrides(properties).create_with_context(Quiet)? })
    }

    /// Returns the offset range that each partition has now; `None` if the topic does not exist.
    /// Repeats the lookup, with new metadata, after errors that pass, such as those of a broker
    /// that has just started and does not lead its partitions yet.
    pub fn spans(&self, topic: &str, deadline: Instant) -> Result<Option<Vec<Span>>, KafkaError> {
        let deadline = deadline.min(Instant::now() + RETRY_TIMEOUT);
        retry(deadline, || self.look_up(topic))
    }

    fn look_up(&self, topic: &str) -> Result<Option<Vec<Span>>, KafkaError> {
        use RDKafkaErrorCode as E;
        let metadata = ask(&self.client, topic, ANSWER_TIMEOUT)?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
        match found.error().map(E::from) {
            None => {}
            Some(E::UnknownTopicOrPartition | E::UnknownTopic | E::InvalidTopic) => return Ok(None),
            Some(code) => return Err(KafkaError::MetadataFetch(code)),
        }
        let spans = found.partitions().iter().map(|partition| {
            let partition = partition.id();
            let (from, to) = self.client.fetch_watermarks(topic, partition, ANSWER_TIMEOUT)?;
            Ok(Span { partition, from, to })
        });
        spans.collect::<Result<_, _>>().map(Some)
    }

    /// Moves the beginning of each span to its first record of this time or later.
    pub(super) fn move_to_time(&self, topic: &str, spans: &mut [Span], time_ms: i64) -> Result<(), KafkaError> {
        let mut wanted = TopicPartitionList::new();
        for span in &*spans {
            wanted.add_partition_offset(topic, span.partition, Offset::Offset(time_ms))?;
        }
        let found = self.client.offsets_for_times(wanted, ANSWER_TIMEOUT)?;
        for span in spans {
            // Without such a record the answer is the end.
            span.from = match found.find_partition(topic, span.partition).map(|element| element.offset()) {
                Some(Offset::Offset(offset)) => offset.clamp(span.from, span.to),
                _ => span.to,
            };
        }
        Ok(())
    }

    /// Passes every record of these spans to `visit`, in order within each partition, until it
    /// breaks.
    pub fn read(
        &self,
        topic: &str,
        spans: &[Span],
        deadline: Instant,
        mut visit: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
    ) -> Result<(), ScanError> {
        let mut left: HashMap<i32, i64> = HashMap::new();
        let mut wanted = TopicPartitionList::new();
        for span in spans.iter().filter(|span| span.from < span.to) {
            left.insert(span.partition, span.to);
            wanted.add_partition_offset(topic, span.partition, Offset::Offset(span.from))?;
        }
        self.client.assign(&wanted)?;
        let (mut last_record_at, mut problem) = (Instant::now(), KafkaError::Canceled);
        while !left.is_empty() {
            let Some(time_left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(ScanError::Deadline);
            };
            match self.client.poll(time_left.min(Duration::from_millis(200))) {
                Some(Ok(message)) => {
                    last_record_at = Instant::now();
                    let Some(&to) = left.get(&message.partition()) else { continue };
                    if message.offset() < to && visit(&message).is_break() {
                        break;
                    }
                    if message.offset() + 1 >= to {
                        left.remove(&message.partition());
                    }
                }
                // Compaction or transactions may have left gaps at the last offsets.
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(left.remove(&partition)),
                Some(Err(error)) => problem = error,
                None => {}
            }
            // The library reconnects by itself; only a lasting problem ends the scan.
            if last_record_at.elapsed() > ANSWER_TIMEOUT {
                return Err(match problem {
                    KafkaError::Canceled => KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut).into(),
                    problem => problem.into(),
                });
            }
        }
        self.release()?;
        Ok(())
    }

    /// Ends reading; needed after `visit` broke only if the client is kept.
    pub(super) fn release(&self) -> Result<(), KafkaError> {
        self.client.unassign()
    }
}

/// Returns whether an error passes by itself: a broker is away or has just started, or a partition
/// has no leader yet.
pub(super) fn is_passing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as E;
    matches!(
        error.rdkafka_error_code(),
        Some(
            E::NotLeaderForPartition
                | E::LeaderNotAvailable
                | E::PreferredLeaderNotAvailable
                | E::ReplicaNotAvailable
                | E::OffsetNotAvailable
                | E::FencedLeaderEpoch
                | E::UnknownLeaderEpoch
                | E::CoordinatorLoadInProgress
                | E::CoordinatorNotAvailable
                | E::NotCoordinator
                | E::BrokerNotAvailable
                | E::BrokerTransportFailure
                | E::AllBrokersDown
                | E::WaitingForCoordinator
                | E::KafkaStorageError
                | E::NetworkException
                | E::OperationTimedOut
                | E::RequestTimedOut
        )
    )
}

/// Repeats a lookup until the deadline while its error is one that passes.
pub(super) fn retry<T>(deadline: Instant, mut look_up: impl FnMut() -> Result<T, KafkaError>) -> Result<T, KafkaError> {
    loop {
        match look_up() {
            Err(error) if is_passing(&error) && Instant::now() + RETRY_PAUSE < deadline => {
                tracing::debug!(error = %error, "lookup failed, repeating it");
                std::thread::sleep(RETRY_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_is_repeated_only_after_errors_that_pass_and_until_the_deadline() {
        use RDKafkaErrorCode as E;
        let attempts = |patience: Duration, errors: Vec<E>| {
            let (mut errors, mut count) = (errors.into_iter(), 0);
            let found = retry(Instant::now() + patience, || {
                count += 1;
                errors.next().map_or(Ok(count), |code| Err(KafkaError::MetadataFetch(code)))
            });
            (found.ok(), count)
        };
        let long = Duration::from_secs(60);
        assert_eq!(attempts(long, vec![E::NotLeaderForPartition, E::LeaderNotAvailable]), (Some(3), 3));
        assert_eq!(attempts(long, vec![E::NotCoordinator, E::TopicAuthorizationFailed]), (None, 2));
        assert_eq!(attempts(Duration::ZERO, vec![E::NotLeaderForPartition]), (None, 1));
    }
}
