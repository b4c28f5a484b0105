//! Reads a topic from a position on, without a consumer group.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use rdkafka::{Message, Offset, TopicPartitionList, consumer::Consumer, error::KafkaError, message::BorrowedMessage};

use super::{
    Config,
    scan::{Scanner, Span, is_passing},
};

/// Timeout of a lookup of offsets.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to begin in each partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Beginning,
    End,
    Offset(i64),
    /// At the first record of this time or later, in milliseconds since the epoch.
    TimeMs(i64),
}

/// Reason why a topic cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error("topic `{0}` does not exist")]
    NoTopic(String),
    #[error("topic `{topic}` has no partition {partition}")]
    NoPartition { topic: String, partition: i32 },
}

/// Reader of a topic. Its calls block: use and drop it off the runtime.
pub struct Tail {
    scanner: Scanner,
    /// The ends of the partitions when the reader was opened, until they are reached.
    ahead: HashMap<i32, i64>,
}

impl Tail {
    /// Begins to read the topic, or one of its partitions.
    pub fn open(config: &Config, topic: &str, partition: Option<i32>, start: Start) -> Result<Self, TailError> {
        let scanner = Scanner::connect(config)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut spans = scanner.spans(topic, deadline)?.ok_or_else(|| TailError::NoTopic(topic.to_owned()))?;
        if let Some(partition) = partition {
            spans.retain(|span| span.partition == partition);
            if spans.is_empty() {
                return Err(TailError::NoPartition { topic: topic.to_owned(), partition });
            }
        }
        if let Start::TimeMs(time_ms) = start {
            scanner.move_to_time(topic, &mut spans, time_ms)?;
        }
        let (mut wanted, mut ahead) = (TopicPartitionList::new(), HashMap::new());
        for Span { partition, from, to } in spans {
            let from = match start {
                Start::Beginning | Start::TimeMs(_) => from,
                Start::End => to,
                Start::Offset(offset) => offset.clamp(from, to),
            };
            wanted.add_partition_offset(topic, partition, Offset::Offset(from))?;
            if from < to {
                ahead.insert(partition, to);
            }
        }
        scanner.client.assign(&wanted)?;
        Ok(Self { scanner, ahead })
    }

    /// Returns whether every record has been read that the topic had when the reader was opened.
    pub fn is_at_end(&self) -> bool {
        self.ahead.is_empty()
    }

    /// Waits for the next record and returns what `read` returns for it; `None` if there is none
    /// yet. A connection that breaks is opened again, so only other errors are returned.
    pub fn next<T>(
        &mut self,
        wait: Duration,
        read: impl FnOnce(&BorrowedMessage<'_>) -> T,
    ) -> Result<Option<T>, TailError> {
        match self.scanner.client.poll(wait) {
            None => Ok(None),
            Some(Ok(message)) => {
                let (partition, next) = (message.partition(), message.offset() + 1);
                if self.ahead.get(&partition).is_some_and(|&end| next >= end) {
                    self.ahead.remove(&partition);
                }
                Ok(Some(read(&message)))
            }
            // Compaction or transactions may have left gaps at the last offsets.
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                self.ahead.remove(&partition);
                Ok(None)
            }
            Some(Err(error)) if is_passing(&error) => Ok(None),
            Some(Err(error)) => Err(error.into()),
        }
    }
}
