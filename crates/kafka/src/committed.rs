//! Commits of a consumer group, compared with the records of a topic.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};

use super::{
    Config,
    library_log::Plain,
    scan::{ScanError, Scanner, Span, retry},
};

/// Timeout of one request, and of a scan for records.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Looks up how far a group is with the records of a topic. Its calls block: use and drop it off
/// the runtime.
pub struct Commits {
    config: Config,
    topic: String,
    client: BaseConsumer<Plain>,
    /// Client that looks for records; opened when it is needed.
    scanner: Option<Scanner>,
    /// Spans that were left at the last look.
    left: Vec<Span>,
}

impl Commits {
    pub fn connect(config: &Config, topic: &str, group: &str) -> Result<Self, KafkaError> {
        let client = config.observer("commits", group, Plain("commits"))?;
        Ok(Self { config: config.clone(), topic: topic.to_owned(), client, scanner: None, left: Vec::new() })
    }

    /// Returns the part of each span that the group has not committed. Spans without such a part
    /// are left out. A commit beyond the end of its partition, as a topic that was created again
    /// leaves it, counts as none: members of the group begin with the oldest record then.
    pub fn uncommitted(&self, spans: &[Span]) -> Result<Vec<Span>, KafkaError> {
        retry(Instant::now() + ANSWER_TIMEOUT, || self.look_up(spans))
    }

    fn look_up(&self, spans: &[Span]) -> Result<Vec<Span>, KafkaError> {
        let mut wanted = TopicPartitionList::new();
        for span in spans {
            wanted.add_partition(&self.topic, span.partition);
        }
        let found = self.client.committed_offsets(wanted, ANSWER_TIMEOUT)?;
        let committed: HashMap<i32, i64> = found
            .elements()
            .iter()
            .filter_map(|element| match element.offset() {
                Offset::Offset(offset) => Some((element.partition(), offset)),
                _ => None,
            })
            .collect();
        let mut left = Vec::new();
        for span in spans {
            let mut next = committed.get(&span.partition).copied().unwrap_or(span.from);
            // The partition may have grown since the span was taken.
            if next > span.to && next > self.end(span.partition)? {
                next = span.from;
            }
            left.push(Span { from: next.max(span.from), ..*span });
        }
        left.retain(|span| span.from < span.to);
        Ok(left)
    }

    /// Returns the offset that the next record of the partition will get.
    fn end(&self, partition: i32) -> Result<i64, KafkaError> {
        Ok(self.client.fetch_watermarks(&self.topic, partition, ANSWER_TIMEOUT)?.1)
    }

    /// Returns whether the group has committed every record of these spans. Offsets without a
    /// record, such as the marker at the end of a transaction, are never committed and do not
    /// count: they are looked for once the commits stand still.
    pub fn have_passed(&mut self, spans: &[Span]) -> Result<bool, ScanError> {
        let left = self.uncommitted(spans)?;
        let moved = std::mem::replace(&mut self.left, left) != self.left;
        if self.left.is_empty() || moved {
            return Ok(self.left.is_empty());
        }
        let scanner = match self.scanner.take() {
            Some(scanner) => scanner,
            None => Scanner::connect(&self.config)?,
        };
        let mut found = false;
        scanner.read(&self.topic, &self.left, Instant::now() + ANSWER_TIMEOUT, |_| {
            found = true;
            ControlFlow::Break(())
        })?;
        // Without an assignment, the client fetches nothing until the next look.
        scanner.release()?;
        self.scanner = Some(scanner);
        Ok(!found)
    }
}
