//! Detects partitions that no member of the group reads although records wait in them.
//!
//! That happens in two ways. A group can throw a member out that never gets back in, and of which
//! the client library says the same as of a member for which no partition is left. And an
//! assignment can get lost between the group and the library, after which the member reads only
//! some of its partitions. So each member looks now and then at the partitions that it does not
//! own, and rejoins the group when records wait in one and its commit stays as it is. Of a classic
//! group it also asks who owns what; the library cannot ask that of a KIP-848 group, so there it
//! takes more looks. Owners whose commit cannot move show that they are there: see
//! [`super::ownership_proof`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use postrider_time::backoff::Backoff;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::KafkaError,
    topic_partition_list::TopicPartitionListElem,
};

use super::{Subscription, membership::Client};
use crate::{Config, library_log::Plain, off_runtime};

/// Interval between two checks, before jitter of up to a half.
const INTERVAL: Duration = Duration::from_secs(10);
/// Doublings of the interval while there is nothing to find.
const MAX_CALM: u32 = 1;
/// Interval after replacements that have brought no partition.
const BACKOFF: Backoff = Backoff::doubling(INTERVAL, Duration::from_secs(320));
/// Checks that have to find the same where the group says that nobody owns the partition, or does
/// not say who does. The latter take longer than brokers wait for a member that has died (45 s,
/// unless they are told otherwise).
const CHECKS_CERTAIN: u32 = 2;
const CHECKS_UNCERTAIN: u32 = 6;
/// Timeout of one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A group's commit of a partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Commit {
    pub offset: Option<i64>,
    /// Changes while the partition has an owner: see [`super::ownership_proof`].
    pub metadata: String,
}

/// Result of one check of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Commits of partitions with records past them, without those partitions that have an owner.
    pub waiting: BTreeMap<i32, Commit>,
    /// Commits of the partitions of this member.
    pub own: BTreeMap<i32, i64>,
    /// True if the group reports which partitions have owners.
    pub certain: bool,
}

/// Decides when a member is excluded. There is one per consumer, and it outlives the clients that
/// are replaced.
#[derive(Debug, Default)]
pub(super) struct Exclusion {
    /// Number of consecutive checks that found nothing.
    calm: u32,
    /// Number of replacements since a check last found nothing.
    vain: u32,
    suspects: BTreeMap<i32, Commit>,
    /// Number of consecutive checks that found a suspect.
    found: u32,
    /// Number of checks on top, so that not all members of a group rejoin at the same time.
    extra: u32,
}

impl Exclusion {
    /// Returns the time until the next check, before jitter.
    pub fn pause(&self) -> Duration {
        // Once there is a suspect, checks follow at the shortest interval, except after futile
        // replacements.
        let calm = if self.found > 0 { 0 } else { self.calm.min(MAX_CALM) };
        BACKOFF.delay(calm.max(self.vain) + 1, 0.0)
    }

    /// Records a check; `None` is a failed one. Returns whether the member has to rejoin.
    pub fn take(&mut self, look: Option<Look>) -> bool {
        let Some(look) = look else { return false };
        if look.waiting.is_empty() {
            self.vain = 0;
        }
        let mut same = look.waiting.clone();
        same.retain(|partition, commit| self.suspects.get(partition) == Some(commit));
        if !same.is_empty() {
            (self.suspects, self.found) = (same, self.found + 1);
        } else {
            self.found = u32::from(!look.waiting.is_empty());
            self.suspects = look.waiting;
        }
        self.calm = if self.suspects.is_empty() { self.calm.saturating_add(1) } else { 0 };
        // An owner cannot prove itself where the group has no commit.
        let unproved = self.suspects.values().all(|commit| commit.offset.is_none());
        let needed = match (look.certain, unproved) {
            (true, _) => CHECKS_CERTAIN,
            (false, true) => 2 * CHECKS_UNCERTAIN,
            (false, false) => CHECKS_UNCERTAIN + self.extra,
        };
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
        let owned = client.context().generations();
        let look = ask(client.clone(), config, subscription, owned.keys().copied().collect()).await;
        if let Err(error) = &look {
            tracing::debug!(consumer = subscription.name, error = %error, "cannot check the group");
        }
        // An assignment or a revocation meanwhile makes the result worthless.
        let look = look.ok().filter(|_| client.context().generations() == owned);
        if let Some(look) = &look {
            client.context().note_commits(&look.own);
        }
        let waiting = look.as_ref().map(|look| look.waiting.clone()).unwrap_or_default();
        if exclusion.found == 0 {
            exclusion.extra = fastrand::u32(0..=2);
        }
        if exclusion.take(look) {
            let (consumer, topic, group) = (subscription.name, &subscription.topic, &subscription.group);
            let partitions: Vec<i32> = waiting.into_keys().collect();
            tracing::warn!(
                consumer,
                topic,
                group,
                ?partitions,
                "records wait in partitions that no member reads; rejoining the group"
            );
            client.context().excluded.store(true, Ordering::Relaxed);
        }
    }
}

/// Asks with the member's client, and with one of its own where that gets no answer.
async fn ask(
    client: Arc<Client>,
    config: &Config,
    subscription: &Subscription,
    own: BTreeSet<i32>,
) -> Result<Look, KafkaError> {
    let classic = !client.context().tells_changes_only;
    let (topic, group, config) = (subscription.topic.clone(), subscription.group.clone(), config.clone());
    off_runtime(move || {
        look(&client, &topic, &group, classic, &own).or_else(|_| {
            let client = config.observer("lag", &group, Plain("exclusion"))?;
            look(&client, &topic, &group, classic, &own)
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
    own: &BTreeSet<i32>,
) -> Result<Look, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), ANSWER_TIMEOUT)?;
    let partitions = metadata.topics().iter().find(|found| found.name() == topic);
    let all: BTreeSet<i32> =
        partitions.into_iter().flat_map(|topic| topic.partitions()).map(|partition| partition.id()).collect();
    let owned = if classic { owned_partitions(client, topic, group)? } else { None };
    let certain = owned.is_some();
    let has_owner =
        |partition: &i32| own.contains(partition) || owned.as_ref().is_some_and(|owned| owned.contains(partition));
    let unowned: BTreeSet<i32> = all.iter().copied().filter(|partition| !has_owner(partition)).collect();
    let offsets = |partitions: &BTreeSet<i32>, offset: Offset| -> Result<TopicPartitionList, KafkaError> {
        let mut list = TopicPartitionList::new();
        partitions.iter().try_for_each(|&partition| list.add_partition_offset(topic, partition, offset))?;
        Ok(list)
    };
    let commits = commits(&client.committed_offsets(offsets(&all, Offset::Invalid)?, ANSWER_TIMEOUT)?);
    let own = own.iter().filter_map(|partition| Some((*partition, commits.get(partition)?.offset?))).collect();
    if unowned.is_empty() {
        return Ok(Look { waiting: BTreeMap::new(), own, certain });
    }
    // As times, `End` and `Beginning` mean the two ends of the log.
    let ends = offsets_by_partition(&client.offsets_for_times(offsets(&unowned, Offset::End)?, ANSWER_TIMEOUT)?);
    let begins =
        offsets_by_partition(&client.offsets_for_times(offsets(&unowned, Offset::Beginning)?, ANSWER_TIMEOUT)?);
    let behind = |partition: i32| {
        let (begin, end) = (begins.get(&partition)?, ends.get(&partition)?);
        let commit = commits.get(&partition).cloned().unwrap_or_default();
        (commit.offset.unwrap_or(*begin).max(*begin) < *end).then_some((partition, commit))
    };
    Ok(Look { waiting: unowned.iter().filter_map(|&partition| behind(partition)).collect(), own, certain })
}

/// Returns the commits by partition.
fn commits(list: &TopicPartitionList) -> BTreeMap<i32, Commit> {
    let commit = |element: &TopicPartitionListElem<'_>| {
        let offset = if let Offset::Offset(offset) = element.offset() { Some(offset) } else { None };
        (element.partition(), Commit { offset, metadata: element.metadata().to_owned() })
    };
    list.elements().iter().map(commit).collect()
}

/// Returns the offsets by partition, leaving out partitions without one.
fn offsets_by_partition(list: &TopicPartitionList) -> BTreeMap<i32, i64> {
    commits(list).into_iter().filter_map(|(partition, commit)| Some((partition, commit.offset?))).collect()
}

/// Returns the partitions that members of a classic group own; `None` if the group does not report
/// them.
fn owned_partitions<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    group: &str,
) -> Result<Option<BTreeSet<i32>>, KafkaError> {
    let groups = match client.fetch_group_list(Some(group), ANSWER_TIMEOUT) {
        // The library asks every broker, of which one may be away.
        Err(KafkaError::GroupListFetch(_)) => return Ok(None),
        groups => groups?,
    };
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
        waits_with(commit, "", certain)
    }

    fn waits_with(commit: i64, metadata: &str, certain: bool) -> Option<Look> {
        let commit = Commit { offset: Some(commit), metadata: metadata.to_owned() };
        Some(Look { waiting: BTreeMap::from([(3, commit)]), own: BTreeMap::new(), certain })
    }

    #[test]
    fn a_member_is_excluded_when_several_checks_find_the_same_records_waiting() {
        let mut exclusion = Exclusion::default();
        assert!(!exclusion.take(waits(7, true)));
        assert!(!exclusion.take(None), "a failed check does not count");
        assert!(exclusion.take(waits(7, true)));
        let mut exclusion = Exclusion::default();
        assert!(!(0..5).any(|_| exclusion.take(waits(7, false))), "a member may have died just now");
        assert!(exclusion.take(waits(7, false)));
    }

    #[test]
    fn an_owner_that_is_held_up_and_says_so_is_no_reason() {
        let mut exclusion = Exclusion::default();
        assert!(!(0..100).any(|second| exclusion.take(waits_with(7, &second.to_string(), false))));
    }

    #[test]
    fn a_commit_that_moves_and_a_log_that_is_done_are_no_reason() {
        let mut exclusion = Exclusion::default();
        assert!(!(0..100).any(|commit| exclusion.take(waits(commit, true))));
        assert!(!exclusion.take(Some(Look::default())));
        assert!(!exclusion.take(waits(99, true)), "a check without findings resets the count");
    }

    #[test]
    fn checks_become_rarer_for_spare_members_and_after_futile_replacements() {
        let mut exclusion = Exclusion::default();
        (0..50).for_each(|_| assert!(!exclusion.take(Some(Look::default()))));
        assert_eq!(exclusion.pause(), 2 * INTERVAL);
        exclusion.take(waits(7, true));
        assert_eq!(exclusion.pause(), INTERVAL);
        for _ in 0..20 {
            while !exclusion.take(waits(7, true)) {}
        }
        assert_eq!(exclusion.pause(), 32 * INTERVAL);
        exclusion.take(Some(Look::default()));
        assert_eq!(exclusion.pause(), 2 * INTERVAL);
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
