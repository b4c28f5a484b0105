//! Detects a member that was excluded from its group: it owns no partition, records wait, and
//! nobody commits them.
//!
//! The client library reports the same for a member that has no partitions because there are too
//! few, and for one that its group has removed and that never rejoins. A member without partitions
//! therefore checks the progress of its group now and then. For a classic group it also asks which
//! partitions have an owner. For a KIP-848 group the library cannot request that, so more checks
//! are needed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext, DefaultConsumerContext},
    error::KafkaError,
};

use super::{Subscription, membership::Client};
use crate::platform::kafka::{Config, off_runtime};

/// Interval between two checks of a member that owns nothing, before jitter of up to a half.
const INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of doublings of the interval while checks find nothing.
const MAX_CALM: u32 = 3;
/// Maximum number of doublings of the interval after replacements that brought no partition.
const MAX_VAIN: u32 = 5;
/// Number of consecutive checks that must find the same uncommitted records: [`CHECKS_CERTAIN`] if
/// the group reports that the partitions have no owner, [`CHECKS_UNCERTAIN`] if it does not report
/// owners.
const CHECKS_CERTAIN: u32 = 2;
const CHECKS_UNCERTAIN: u32 = 4;
/// Timeout of one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Result of one check of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Partitions without a known owner that have records past the group's commit, each with that
    /// commit.
    pub waiting: BTreeMap<i32, Option<i64>>,
    /// True if the group reports which partitions have owners.
    pub certain: bool,
}

/// Decides when a member is excluded. There is one per consumer, and it outlives the clients that
/// are replaced.
#[derive(Debug, Default)]
pub(super) struct Exclusion {
    /// Number of consecutive checks that found nothing.
    calm: u32,
    /// Number of replacements since the member last owned a partition.
    vain: u32,
    suspects: BTreeMap<i32, Option<i64>>,
    /// Number of consecutive checks that found a suspect.
    found: u32,
}

impl Exclusion {
    /// Returns the time until the next check, before jitter.
    pub fn pause(&self) -> Duration {
        // Once there is a suspect, checks follow at the shortest interval, except after futile
        // replacements.
        let calm = if self.found > 0 { 0 } else { self.calm.min(MAX_CALM) };
        INTERVAL * 2_u32.pow(calm.max(self.vain.min(MAX_VAIN)))
    }

    /// Resets the state, because the member owns partitions.
    pub fn owns(&mut self) {
        *self = Self::default();
    }

    /// Records a check; `None` is a failed one. Returns whether the member is excluded.
    pub fn take(&mut self, look: Option<Look>) -> bool {
        let Some(look) = look else { return false };
        let still = |(partition, commit): &(i32, Option<i64>)| self.suspects.get(partition) == Some(commit);
        let same: BTreeMap<_, _> =
            look.waiting.iter().map(|(&partition, &commit)| (partition, commit)).filter(still).collect();
        if !same.is_empty() {
            (self.suspects, self.found) = (same, self.found + 1);
        } else {
            self.found = u32::from(!look.waiting.is_empty());
            self.suspects = look.waiting;
        }
        self.calm = if self.suspects.is_empty() { self.calm.saturating_add(1) } else { 0 };
        let needed = if look.certain { CHECKS_CERTAIN } else { CHECKS_UNCERTAIN };
        if self.found < needed {
            return false;
        }
        (self.found, self.vain) = (0, self.vain.saturating_add(1));
        self.suspects.clear();
        true
    }
}

/// Watches a member and marks its client as excluded if it is; the polling thread then has it
/// replaced. Never resolves.
pub(super) async fn watch(
    client: std::sync::Weak<Client>,
    config: &Config,
    subscription: &Subscription,
    exclusion: &mut Exclusion,
) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(exclusion.pause().mul_f64(1.0 + fastrand::f64() / 2.0)).await;
        let Some(client) = client.upgrade() else { return std::future::pending().await };
        if client.context().owns_something() {
            exclusion.owns();
            continue;
        }
        let look = ask(client.clone(), config, subscription).await;
        if let Err(error) = &look {
            tracing::debug!(consumer = subscription.name, error = %error, "cannot check the group");
        }
        let look = look.ok().filter(|_| !client.context().owns_something());
        let waiting = look.as_ref().map(|look| look.waiting.clone()).unwrap_or_default();
        if exclusion.take(look) {
            let (consumer, topic, group) = (subscription.name, &subscription.topic, &subscription.group);
            let partitions: Vec<i32> = waiting.into_keys().collect();
            tracing::warn!(
                consumer,
                topic,
                group,
                ?partitions,
                "member owns no partition while records wait uncommitted; rejoining the group"
            );
            client.context().excluded.store(true, Ordering::Relaxed);
        }
    }
}

/// Checks the group with the member's client, or with a new client if that gets no answer.
async fn ask(client: Arc<Client>, config: &Config, subscription: &Subscription) -> Result<Look, KafkaError> {
    let classic = !client.context().tells_changes_only;
    let (topic, group, config) = (subscription.topic.clone(), subscription.group.clone(), config.clone());
    off_runtime(move || {
        look(&client, &topic, &group, classic).or_else(|_| {
            let client = config.observer("lag", &group, DefaultConsumerContext)?;
            look(&client, &topic, &group, classic)
        })
    })
    .await
}

/// Checks a group with few requests, however many partitions the topic has. Blocks.
fn look<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    group: &str,
    classic: bool,
) -> Result<Look, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), ANSWER_TIMEOUT)?;
    let partitions = metadata.topics().iter().find(|found| found.name() == topic);
    let mut unowned: BTreeSet<i32> =
        partitions.into_iter().flat_map(|topic| topic.partitions()).map(|partition| partition.id()).collect();
    let owned = if classic { owned_partitions(client, topic, group)? } else { None };
    let certain = owned.is_some();
    unowned.retain(|partition| owned.as_ref().is_none_or(|owned| !owned.contains(partition)));
    if unowned.is_empty() {
        return Ok(Look { waiting: BTreeMap::new(), certain });
    }
    let offsets = |offset: Offset| -> Result<TopicPartitionList, KafkaError> {
        let mut list = TopicPartitionList::new();
        unowned.iter().try_for_each(|&partition| list.add_partition_offset(topic, partition, offset))?;
        Ok(list)
    };
    let committed = offsets_by_partition(&client.committed_offsets(offsets(Offset::Invalid)?, ANSWER_TIMEOUT)?);
    // Used as times, `End` and `Beginning` return the two ends of the log.
    let ends = offsets_by_partition(&client.offsets_for_times(offsets(Offset::End)?, ANSWER_TIMEOUT)?);
    let begins = offsets_by_partition(&client.offsets_for_times(offsets(Offset::Beginning)?, ANSWER_TIMEOUT)?);
    let behind = |partition: i32| {
        let (begin, end) = (begins.get(&partition)?, ends.get(&partition)?);
        let commit = committed.get(&partition).copied();
        (commit.unwrap_or(*begin).max(*begin) < *end).then_some((partition, commit))
    };
    Ok(Look { waiting: unowned.iter().filter_map(|&partition| behind(partition)).collect(), certain })
}

/// Returns the offsets by partition, leaving out partitions without one.
fn offsets_by_partition(list: &TopicPartitionList) -> BTreeMap<i32, i64> {
    let offset = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
        Offset::Offset(offset) => Some((element.partition(), offset)),
        _ => None,
    };
    list.elements().iter().filter_map(offset).collect()
}

/// Returns the partitions that members of a classic group own; `None` if the group does not report
/// them.
fn owned_partitions<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    group: &str,
) -> Result<Option<BTreeSet<i32>>, KafkaError> {
    let groups = client.fetch_group_list(Some(group), ANSWER_TIMEOUT)?;
    let Some(found) = groups.groups().iter().find(|found| found.name() == group) else { return Ok(None) };
    match found.state() {
        "Stable" => {}
        "Empty" => return Ok(Some(BTreeSet::new())),
        // The state of a KIP-848 group as well.
        "Dead" => return Ok(None),
        // A rebalance is in progress and will assign owners.
        _ => return Err(KafkaError::Canceled),
    }
    let mut owned = BTreeSet::new();
    for member in found.members() {
        let Some(partitions) = assigned(member.assignment().unwrap_or_default(), topic) else { return Ok(None) };
        owned.extend(partitions);
    }
    Ok(Some(owned))
}

/// Parses the partitions of a topic from a member's assignment: `ConsumerProtocolAssignment` of the
/// Kafka protocol, which begins with a version and the topics, each with a name and its partitions.
/// `None` if it cannot be parsed.
fn assigned(bytes: &[u8], topic: &str) -> Option<Vec<i32>> {
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (head, tail) = bytes.split_at_checked(count)?;
        *bytes = tail;
        Some(head)
    }
    fn number(bytes: &mut &[u8]) -> Option<i32> {
        take(bytes, 4)?.try_into().ok().map(i32::from_be_bytes)
    }
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    let (mut rest, mut found) = (bytes, Vec::new());
    take(&mut rest, 2)?;
    for _ in 0..number(&mut rest)? {
        let length = u16::from_be_bytes(take(&mut rest, 2)?.try_into().ok()?);
        let name = take(&mut rest, usize::from(length))?;
        for _ in 0..number(&mut rest)? {
            let partition = number(&mut rest)?;
            if name == topic.as_bytes() {
                found.push(partition);
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(commit: i64, certain: bool) -> Option<Look> {
        Some(Look { waiting: BTreeMap::from([(3, Some(commit))]), certain })
    }

    #[test]
    fn a_member_is_excluded_when_several_checks_find_the_same_records_waiting() {
        let mut exclusion = Exclusion::default();
        assert!(!exclusion.take(waits(7, true)));
        assert!(!exclusion.take(None), "a failed check does not count");
        assert!(exclusion.take(waits(7, true)));
        let mut exclusion = Exclusion::default();
        assert!(!(0..3).any(|_| exclusion.take(waits(7, false))), "an unknown owner may be slow");
        assert!(exclusion.take(waits(7, false)));
    }

    #[test]
    fn a_moving_commit_or_a_finished_log_does_not_exclude_a_member() {
        let mut exclusion = Exclusion::default();
        assert!(!(0..100).any(|commit| exclusion.take(waits(commit, true))));
        assert!(!exclusion.take(Some(Look::default())));
        assert!(!exclusion.take(waits(99, true)), "a check without findings resets the count");
    }

    #[test]
    fn checks_become_rarer_for_spare_members_and_after_futile_replacements() {
        let mut exclusion = Exclusion::default();
        (0..50).for_each(|_| assert!(!exclusion.take(Some(Look::default()))));
        assert_eq!(exclusion.pause(), 8 * INTERVAL);
        exclusion.take(waits(7, true));
        assert_eq!(exclusion.pause(), INTERVAL);
        for _ in 0..20 {
            while !exclusion.take(waits(7, true)) {}
        }
        assert_eq!(exclusion.pause(), 32 * INTERVAL);
        exclusion.owns();
        assert_eq!(exclusion.pause(), INTERVAL);
    }

    #[test]
    fn assignments_are_parsed_and_malformed_ones_rejected() {
        let bytes = b"\0\x01\0\0\0\x02\0\x01a\0\0\0\x01\0\0\0\x07\0\x01b\0\0\0\x02\0\0\0\0\0\0\0\x02\xff\xff\xff\xff";
        assert_eq!(assigned(bytes, "b"), Some(vec![0, 2]));
        assert_eq!(assigned(bytes, "c"), Some(vec![]));
        assert_eq!(assigned(b"", "b"), Some(vec![]));
        assert_eq!(assigned(&bytes[..20], "b"), None);
    }
}
