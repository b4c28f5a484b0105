//! Reading what a topic has now, from one offset to another, without a consumer group.

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

use super::Config;

/// How long an answer may take, and how long there may be nothing to read before the end is reached.
const PATIENCE: Duration = Duration::from_secs(10);

/// Offsets of one partition: `from`, and up to but without `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub partition: i32,
    pub from: i64,
    pub to: i64,
}

/// Why a topic could not be read to the end.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error("the deadline passed before the topic was read")]
    Deadline,
}

/// A client that reads. Its calls block: use it off the runtime, and drop it there.
pub struct Scanner {
    client: BaseConsumer<Quiet>,
}

/// What matters comes back from `read`, and that a partition ends is no error here.
struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "the reading client reports a problem");
    }
}
impl ConsumerContext for Quiet {}

impl Scanner {
    pub fn connect(config: &Config) -> Result<Self, KafkaError> {
        let mut properties = config.client("scan");
        properties
            // Demanded by the library, and never joined.
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

    /// What each partition of a topic has now; `None` when there is no such topic.
    pub fn spans(&self, topic: &str) -> Result<Option<Vec<Span>>, KafkaError> {
        use RDKafkaErrorCode as E;
        let metadata = self.client.fetch_metadata(Some(topic), PATIENCE)?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
        match found.error().map(E::from) {
            None => {}
            Some(E::UnknownTopicOrPartition | E::UnknownTopic | E::InvalidTopic) => return Ok(None),
            Some(code) => return Err(KafkaError::MetadataFetch(code)),
        }
        let spans = found.partitions().iter().map(|partition| {
            let partition = partition.id();
            let (from, to) = self.client.fetch_watermarks(topic, partition, PATIENCE)?;
            Ok(Span { partition, from, to })
        });
        spans.collect::<Result<_, _>>().map(Some)
    }

    /// Shows `visit` every record of these spans, in order within each partition, until it breaks.
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
        let (mut heard, mut problem) = (Instant::now(), KafkaError::Canceled);
        while !left.is_empty() {
            let Some(time_left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(ScanError::Deadline);
            };
            match self.client.poll(time_left.min(Duration::from_millis(200))) {
                Some(Ok(message)) => {
                    heard = Instant::now();
                    let Some(&to) = left.get(&message.partition()) else { continue };
                    if message.offset() < to && visit(&message).is_break() {
                        break;
                    }
                    if message.offset() + 1 >= to {
                        left.remove(&message.partition());
                    }
                }
                // The last offsets may be holes: of compaction, or of transactions.
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(left.remove(&partition)),
                Some(Err(error)) => problem = error,
                None => {}
            }
            // Connections are made again by the library; what lasts is a reason to give up.
            if heard.elapsed() > PATIENCE {
                return Err(match problem {
                    KafkaError::Canceled => KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut).into(),
                    problem => problem.into(),
                });
            }
        }
        self.client.unassign()?;
        Ok(())
    }
}
