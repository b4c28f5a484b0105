//! Commits of a consumer group, compared with the records of a topic.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use rdkafka::{Offset, TopicPartitionList, consumer::Consumer, error::KafkaError};

use super::{
    Config,
    library_log::Plain,
    scan::{ScanError, Scanner, Span, retry},
};

/// Timeout of one request, and of a scan for records.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the part of each span that the group has not committed. Spans without such a part are
/// left out. Blocks, so it must be called off the runtime.
pub fn uncommitted(config: &Config, topic: &str, group: &str, spans: &[Span]) -> Result<Vec<Span>, KafkaError> {
    let client = config.observer("commits", group, Plain("commits"))?;
    let mut wanted = TopicPartitionList::new();
    for span in spans {
        wanted.add_partition(topic, span.partition);
    }
    let found = retry(Instant::now() + ANSWER_TIMEOUT, || client.committed_offsets(wanted.clone(), ANSWER_TIMEOUT))?;
    let committed: HashMap<i32, i64> = found
        .elements()
        .iter()
        .filter_map(|element| match element.offset() {
            Offset::Offset(offset) => Some((element.partition(), offset)),
            _ => None,
        })
        .collect();
    let left = spans.iter().map(|span| {
        let committed = committed.get(&span.partition).copied().unwrap_or(span.from);
        Span { from: committed.max(span.from), ..*span }
    });
    Ok(left.filter(|span| span.from < span.to).collect())
}

/// Returns whether the group has committed every record of these spans. Offsets without a record,
/// such as the marker at the end of a transaction, are never committed and do not count. Blocks.
pub fn has_committed(config: &Config, topic: &str, group: &str, spans: &[Span]) -> Result<bool, ScanError> {
    let left = uncommitted(config, topic, group, spans)?;
    if left.is_empty() {
        return Ok(true);
    }
    let mut found = false;
    Scanner::connect(config)?.read(topic, &left, Instant::now() + ANSWER_TIMEOUT, |_| {
        found = true;
        ControlFlow::Break(())
    })?;
    Ok(!found)
}
