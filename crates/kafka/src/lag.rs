//! Lag of a consumer group, determined without joining it.

use std::time::{Duration, Instant};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};

use super::{Config, broker::ask, library_log::Plain, scan::retry};

/// Timeout of one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time for which lookups are repeated after errors that pass.
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);

/// Lag of a group in one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionLag {
    pub partition: i32,
    /// Committed offset; `None` if the group has never committed.
    pub committed: Option<i64>,
    /// The offset that the next record will get.
    pub end: i64,
    /// Number of offsets between the commit and the end, including gaps left by compaction and
    /// transactions.
    pub lag: i64,
    /// Record at the commit, which is the lowest unfinished one.
    pub oldest: Option<Oldest>,
}

/// Record that a group has to finish next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oldest {
    pub offset: i64,
    pub key: Option<String>,
    /// Milliseconds since the epoch.
    pub timestamp_ms: i64,
}

/// Returns the lag of every partition; `None` if the topic does not exist. Joins no group. Blocks,
/// so it must be called off the runtime.
pub fn of_group(config: &Config, topic: &str, group: &str) -> Result<Option<Vec<PartitionLag>>, KafkaError> {
    let client = config.observer("lag", group, Plain("lag"))?;
    let measured = retry(Instant::now() + RETRY_TIMEOUT, || measure(&client, topic))?;
    let Some(mut lags) = measured else { return Ok(None) };
    find_oldest(&client, topic, &mut lags)?;
    Ok(Some(lags))
}

/// Returns the lag of every partition, without the oldest record.
fn measure(client: &BaseConsumer<Plain>, topic: &str) -> Result<Option<Vec<PartitionLag>>, KafkaError> {
    let metadata = ask(client, topic, ANSWER_TIMEOUT)?;
    let partitions =
        metadata.topics().iter().find(|found| found.name() == topic).map_or(0, |found| found.partitions().len());
    if partitions == 0 {
        return Ok(None);
    }
    let mut wanted = TopicPartitionList::new();
    wanted.add_partition_range(topic, 0, partitions as i32 - 1);
    let committed = client.committed_offsets(wanted, ANSWER_TIMEOUT)?;
    let mut lags = Vec::with_capacity(partitions);
    for element in committed.elements() {
        let (low, end) = client.fetch_watermarks(topic, element.partition(), ANSWER_TIMEOUT)?;
        let committed = match element.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        };
        let lag = (end - committed.unwrap_or(low).max(low)).max(0);
        lags.push(PartitionLag { partition: element.partition(), committed, end, lag, oldest: None });
    }
    Ok(Some(lags))
}

/// Reads the first unfinished record of every partition that has one.
fn find_oldest(client: &BaseConsumer<Plain>, topic: &str, lags: &mut [PartitionLag]) -> Result<(), KafkaError> {
    let mut wanted = TopicPartitionList::new();
    for behind in lags.iter().filter(|behind| behind.lag > 0) {
        let from = behind.committed.map_or(Offset::Beginning, Offset::Offset);
        wanted.add_partition_offset(topic, behind.partition, from)?;
    }
    let mut missing = wanted.count();
    if missing == 0 {
        return Ok(());
    }
    client.assign(&wanted)?;
    let until = Instant::now() + ANSWER_TIMEOUT;
    while missing > 0 && Instant::now() < until {
        let Some(Ok(message)) = client.poll(Duration::from_millis(100)) else { continue };
        let Some(behind) = lags.iter_mut().find(|behind| behind.partition == message.partition()) else { continue };
        if behind.oldest.is_none() {
            missing -= 1;
            behind.oldest = Some(Oldest {
                offset: message.offset(),
                key: message.key().map(|key| String::from_utf8_lossy(key).into_owned()),
                timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            });
        }
    }
    Ok(())
}
