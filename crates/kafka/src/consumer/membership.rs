//! Callbacks of the client library on the polling thread: rebalances, statistics, errors.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rdkafka::{
    ClientContext, Statistics, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance},
    error::{KafkaError, RDKafkaErrorCode},
    statistics::{ConsumerGroup, Partition},
};

use super::{
    commit_reset,
    work::{PartitionWork, Shape},
};
use crate::{client_watchdog::Connectivity, library_log, stats};

pub(super) type Client = BaseConsumer<Membership>;

/// A member that has had no partitions for this many milliseconds, with a coordinator that answers,
/// counts as one that was assigned none.
const EMPTY_ASSIGNMENT_MS: i64 = 3_000;

/// Time that the work in progress of a revoked partition may take to finish.
const REVOKE_DEADLINE: Duration = Duration::from_secs(5);

/// Membership in a group, shared between the polling thread and the callbacks that run on it.
pub(super) struct Membership {
    pub topic: String,
    pub name: &'static str,
    /// Shape of the consumer, set once before the first poll.
    pub shape: std::sync::OnceLock<Arc<dyn Shape>>,
    owned: Mutex<Owned>,
    /// Increases whenever a partition is released.
    pub losses: AtomicU64,
    /// True if the client reports only changes of the assignment. Members without partitions then
    /// never get a report, because their assignment never changes.
    pub tells_changes_only: bool,
    /// True once the shape was notified of its assignment.
    joined: AtomicBool,
    /// Set when the polling thread has released all partitions for good. The library still calls
    /// back while the client is closed, which a successor's partitions must not notice.
    retired: AtomicBool,
    /// Number of records that the client has not passed on of partitions that are read, by its last
    /// statistics.
    pub unfetched: AtomicI64,
    /// Number of records past the commits, by its last statistics; -1 while that is unknown.
    pub lag: Arc<AtomicI64>,
    pub connectivity: Connectivity,
    /// Set when the member is excluded from the group and its client has to be replaced.
    pub excluded: AtomicBool,
}

#[derive(Default)]
pub(super) struct Owned {
    /// Partitions gained in a callback and not yet opened.
    pub gained: Vec<i32>,
    pub partitions: BTreeMap<i32, OwnedPartition>,
}

/// One partition that this member owns.
pub(super) struct OwnedPartition {
    pub work: Box<dyn PartitionWork>,
    pub generation: u64,
    /// Start that fetched records belong to; 0 while nothing is read.
    pub start: u64,
    pub paused: bool,
    /// Highest offset stored for commit; replayed records never move it back.
    pub stored: i64,
    /// The group's commit as it was looked up since the partition was assigned.
    pub committed: Option<i64>,
    /// The commit point at the last proof of ownership.
    pub proved: Option<i64>,
    /// True if the library's last statistics showed a commit beyond the end of the partition.
    pub commit_is_beyond_end: bool,
}

impl Membership {
    pub fn new(name: &'static str, topic: &str, tells_changes_only: bool, lag: Arc<AtomicI64>) -> Self {
        Self {
            topic: topic.to_owned(),
            name,
            shape: std::sync::OnceLock::new(),
            owned: Mutex::default(),
            losses: AtomicU64::new(0),
            tells_changes_only,
            joined: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            unfetched: AtomicI64::new(0),
            lag,
            connectivity: Connectivity::default(),
            excluded: AtomicBool::new(false),
        }
    }

    pub fn owned(&self) -> MutexGuard<'_, Owned> {
        self.owned.lock()
    }

    /// Returns the owned partitions, each with the number of its ownership.
    pub fn generations(&self) -> BTreeMap<i32, u64> {
        let owned = self.owned();
        let opened = owned.partitions.iter().map(|(&partition, held)| (partition, held.generation));
        opened.chain(owned.gained.iter().map(|&partition| (partition, 0))).collect()
    }

    /// Notes what the group has committed of partitions that were owned before and after it was
    /// asked.
    pub fn note_commits(&self, commits: &BTreeMap<i32, i64>) {
        let mut owned = self.owned();
        for (partition, commit) in commits {
            if let Some(held) = owned.partitions.get_mut(partition) {
                held.committed = Some(*commit);
            }
        }
    }

    /// Returns an error if the task of a partition has died, because nothing would process the
    /// partition any more.
    pub fn assert_at_work(&self) -> Result<(), KafkaError> {
        let owned = self.owned();
        let Some((partition, _)) = owned.partitions.iter().find(|(_, held)| held.work.has_died()) else {
            return Ok(());
        };
        tracing::error!(consumer = self.name, partition, "task of a partition died");
        Err(KafkaError::Canceled)
    }

    /// Stores the commit point `done`. The client commits it within a second, and at a rebalance.
    pub fn store(&self, client: &Client, partition: i32, held: &mut OwnedPartition, done: i64) {
        if done <= held.stored {
            return;
        }
        match client.store_offset(&self.topic, partition, done - 1) {
            Ok(()) => held.stored = done,
            // The partition was revoked meanwhile; its next owner processes the records again.
            Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {}
            Err(error) => tracing::debug!(partition, error = %error, "cannot store offset"),
        }
    }

    /// Releases these partitions: lets their work in progress finish, up to a deadline, and stores
    /// their commit points.
    pub fn let_go(&self, client: &Client, partitions: &[i32]) {
        let mut leaving: Vec<(i32, OwnedPartition)> = Vec::new();
        {
            let mut owned = self.owned();
            owned.gained.retain(|gained| !partitions.contains(gained));
            for partition in partitions {
                leaving.extend(owned.partitions.remove(partition).map(|held| (*partition, held)));
            }
        }
        self.losses.fetch_add(1, Ordering::Relaxed);
        leaving.iter_mut().for_each(|(_, held)| held.work.close());
        let deadline = Instant::now() + REVOKE_DEADLINE;
        while leaving.iter().any(|(_, held)| !held.work.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        for (partition, mut held) in leaving {
            let (finished, done) = (held.work.is_finished(), held.work.commit_point());
            if !finished {
                tracing::warn!(
                    consumer = self.name,
                    partition,
                    "partition revoked before its work finished; the next owner repeats it"
                );
            }
            // From here on, running work cannot change the commit point.
            held.work.abandon();
            self.store(client, partition, &mut held, done);
        }
        if let Some(shape) = self.shape.get() {
            partitions.iter().for_each(|&partition| shape.revoked(partition));
        }
    }
}

impl Membership {
    /// Releases all partitions of this member, as when it ends.
    pub fn let_go_of_all(&self, client: &Client) {
        let partitions: Vec<i32> = {
            let owned = self.owned();
            owned.partitions.keys().chain(&owned.gained).copied().collect()
        };
        self.let_go(client, &partitions);
        if let Some(shape) = self.shape.get()
            && self.joined.swap(false, Ordering::Relaxed)
        {
            shape.left();
        }
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Notifies the shape of an empty assignment. If a group has more members than partitions, some
    /// members get none, and that is their assignment.
    fn detect_empty_assignment(&self, group: &ConsumerGroup) {
        let settled = group.state == "up" && group.stateage > EMPTY_ASSIGNMENT_MS && group.assignment_size == 0;
        let unchanged = group.rebalance_cnt == 0 || group.rebalance_age > EMPTY_ASSIGNMENT_MS;
        if self.tells_changes_only
            && !self.retired.load(Ordering::Relaxed)
            && settled
            && unchanged
            && let Some(shape) = self.shape.get()
            && !self.joined.swap(true, Ordering::Relaxed)
        {
            tracing::info!(consumer = self.name, topic = self.topic, "no partitions assigned to this member");
            shape.joined(&[]);
        }
    }
}

/// Returns how many records of a partition the client has not passed on. The library's
/// `consumer_lag` is no measure of that: it counts from the commit.
fn unfetched(partition: &Partition) -> i64 {
    let not_fetched = if partition.next_offset >= 0 { partition.ls_offset - partition.next_offset } else { 0 };
    not_fetched.max(0) + partition.fetchq_cnt
}

impl ClientContext for Membership {
    fn stats(&self, statistics: Statistics) {
        // A successor has its own.
        if self.retired.load(Ordering::Relaxed) {
            return;
        }
        let topic = statistics.topics.get(&self.topic);
        let partitions = || topic.into_iter().flat_map(|topic| topic.partitions.values());
        let mut owned = self.owned();
        for partition in partitions() {
            if let Some(held) = owned.partitions.get_mut(&partition.partition) {
                held.commit_is_beyond_end = commit_reset::is_beyond_end(partition, held.stored);
            }
        }
        let is_read = |partition: &&Partition| {
            owned.partitions.get(&partition.partition).is_some_and(|held| held.start != 0 && !held.paused)
        };
        self.unfetched.store(partitions().filter(is_read).map(unfetched).sum(), Ordering::Relaxed);
        drop(owned);
        let lags = partitions().map(|partition| partition.consumer_lag).filter(|&lag| lag >= 0);
        self.lag.store(lags.reduce(|sum, lag| sum + lag).unwrap_or(-1), Ordering::Relaxed);
        if let Some(group) = &statistics.cgrp {
            self.detect_empty_assignment(group);
        }
        self.connectivity.report(&statistics);
        stats::record(&statistics);
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        library_log::log(self.name, level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(consumer = self.name, error = %error, reason, "consumer client reported an error");
    }
}

impl ConsumerContext for Membership {
    fn pre_rebalance(&self, client: &Client, rebalance: &Rebalance<'_>) {
        let Rebalance::Revoke(list) = rebalance else { return };
        if self.retired.load(Ordering::Relaxed) {
            return;
        }
        let partitions = numbers(list);
        tracing::info!(consumer = self.name, topic = self.topic, ?partitions, "partitions revoked");
        self.let_go(client, &partitions);
        let owned = self.owned();
        if owned.partitions.is_empty()
            && owned.gained.is_empty()
            && let Some(shape) = self.shape.get()
        {
            self.joined.store(false, Ordering::Relaxed);
            shape.left();
        }
    }

    fn post_rebalance(&self, client: &Client, rebalance: &Rebalance<'_>) {
        let Rebalance::Assign(list) = rebalance else { return };
        if self.retired.load(Ordering::Relaxed) {
            return;
        }
        let partitions = numbers(list);
        if !partitions.is_empty() {
            tracing::info!(consumer = self.name, topic = self.topic, ?partitions, "partitions assigned");
        }
        if let Err(error) = client.pause(list) {
            tracing::debug!(error = %error, "cannot pause new partitions");
        }
        // An empty assignment may be followed by partitions a moment later, so
        // `detect_empty_assignment` handles it.
        let handled_later = partitions.is_empty() && self.tells_changes_only;
        if let Some(shape) = self.shape.get().filter(|_| !handled_later) {
            self.joined.store(true, Ordering::Relaxed);
            shape.joined(&partitions);
        }
        self.owned().gained.extend(partitions);
    }

    fn commit_callback(&self, result: Result<(), KafkaError>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(consumer = self.name, error = %error, "commit failed, retrying");
        }
    }
}

fn numbers(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(rdkafka::topic_partition_list::TopicPartitionListElem::partition).collect()
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;

    use super::*;
    use crate::consumer::work::Opening;

    /// Writes down what it is called with.
    #[derive(Default)]
    struct Calls(Mutex<Vec<String>>);

    impl Shape for Calls {
        fn open(&self, _: Opening) -> Box<dyn PartitionWork> {
            unreachable!("nothing is opened here")
        }

        fn joined(&self, gained: &[i32]) {
            self.0.lock().push(format!("joined {gained:?}"));
        }

        fn revoked(&self, partition: i32) {
            self.0.lock().push(format!("revoked {partition}"));
        }

        fn left(&self) {
            self.0.lock().push("left".to_owned());
        }

        fn tick(&self) {}
    }

    #[test]
    fn a_client_that_is_closed_late_does_not_disturb_the_one_that_took_its_place() {
        let membership = Membership::new("test", "topic", true, Arc::default());
        let calls = Arc::<Calls>::default();
        let _ = membership.shape.set(calls.clone());
        let client: Client = ClientConfig::new().set("group.id", "test").create_with_context(membership).unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition("topic", 2);
        client.context().post_rebalance(&client, &Rebalance::Assign(&list));
        client.context().let_go_of_all(&client);
        let released = ["joined [2]", "revoked 2", "left"].map(str::to_owned);
        assert_eq!(*calls.0.lock(), released);
        client.context().pre_rebalance(&client, &Rebalance::Revoke(&list));
        client.context().post_rebalance(&client, &Rebalance::Assign(&list));
        assert_eq!(*calls.0.lock(), released);
    }

    #[test]
    fn records_that_wait_for_a_retry_and_transaction_markers_are_not_unfetched() {
        let statistics = |next_offset, ls_offset, fetchq_cnt| {
            unfetched(&Partition { next_offset, ls_offset, fetchq_cnt, consumer_lag: 9, ..Partition::default() })
        };
        assert_eq!(statistics(100, 100, 0), 0, "all of it is fetched, whatever is committed");
        assert_eq!(statistics(90, 100, 3), 13);
        assert_eq!(statistics(-1001, -1001, 0), 0, "nothing is known yet");
    }
}
