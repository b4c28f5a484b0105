//! Traits that a capability implements to consume a topic, and the types passed to them.

use std::{future::Future, sync::Arc, time::Duration};

use crate::{
    batch::{Batch, Record},
    dead_letter::Reason,
};

/// Reason why a batch handler could not finish.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A dependency is down: the runtime makes the same call again after a pause.
    #[error("{0}")]
    Retry(String),
    /// The handler's state of the partition is stale: the runtime starts over with `assigned`.
    #[error("restarting the partition: {0}")]
    Restart(String),
}

/// A record that can never be processed. It is dead-lettered, and its batch continues.
#[derive(Debug)]
pub struct Poison {
    pub offset: i64,
    pub reason: Reason,
}

/// Partition that a batch handler is assigned.
#[derive(Debug, Clone, Copy)]
pub struct Assignment {
    pub partition: i32,
    /// The group's committed offset.
    pub committed: Option<i64>,
    /// First offset of the log.
    pub low: i64,
    /// Offset that the next record will get.
    pub high: i64,
}

impl Assignment {
    /// Returns the group's committed offset. If the group has never committed, or the log no longer
    /// has that offset, returns the first offset of the log.
    pub fn resume(&self) -> i64 {
        self.committed.unwrap_or(self.low).max(self.low)
    }
}

/// Handler of the batch shape: gets the records of a partition in order, a batch at a time. For one
/// partition, it is called by one task at a time. `assigned` and `apply` are sufficient for most
/// capabilities.
pub trait BatchHandler: Send + Sync + 'static {
    /// The handler's state for one partition.
    type Partition: Send;

    /// Called when a partition is gained or the handler asked to start over. Returns the
    /// partition's state and the first offset to read; use [`Assignment::resume`] if the group's
    /// commit decides.
    fn assigned(&self, assignment: Assignment) -> impl Future<Output = Result<(Self::Partition, i64), Failure>> + Send;

    /// Applies the effect of a batch and returns the records that cannot be processed. Afterwards
    /// the batch may be committed. May be called again with the same records, so the effect must be
    /// idempotent.
    fn apply(
        &self,
        state: &mut Self::Partition,
        batch: &Batch,
    ) -> impl Future<Output = Result<Vec<Poison>, Failure>> + Send;

    /// Called when everything in the log has been handed over.
    fn caught_up(&self, _state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// Called every second, between batches.
    fn idle(&self, _state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// Called when the partition was revoked; the handler must not do anything more for it.
    fn revoked(&self, _partition: i32) {}

    /// Called when the group has assigned partitions to this member in addition to those it had.
    /// `gained` is empty if the group has more members than partitions.
    fn joined(&self, _gained: &[i32]) {}

    /// Called when all partitions are lost and the next assignment is not known yet.
    fn left(&self) {}
}

/// Handler of the keyed shape: gets records of one key in order, and records of different keys
/// concurrently.
pub trait KeyedHandler: Send + Sync + 'static {
    /// Returns the bytes that order a record: records of a partition with equal bytes are processed
    /// one after the other. A record with `None` waits for no other.
    fn ordering_key<'r>(&self, record: &Record<'r>) -> Option<&'r [u8]> {
        record.key()
    }

    /// Applies the effect of one record. The future is dropped if the partition is lost and the
    /// deadline for finishing has passed. The same record may be passed again after a crash or a
    /// rebalance.
    fn handle(&self, delivery: &Delivery) -> impl Future<Output = Outcome> + Send;

    /// Called once the dead letter of a record is stored.
    fn dead_lettered(&self, _delivery: &Delivery, _reason: &Reason) {}

    /// Called when the group has assigned partitions; see [`BatchHandler::joined`].
    fn joined(&self, _gained: &[i32]) {}

    /// Called when the partition was revoked.
    fn revoked(&self, _partition: i32) {}
}

/// Outcome of handling one record.
#[derive(Debug)]
pub enum Outcome {
    /// The effect was applied.
    Done,
    /// The attempt failed; the runtime retries the record after this time. Its key waits meanwhile,
    /// but other keys continue and no worker is occupied. Counts as an attempt.
    RetryAfter(Duration, Reason),
    /// A dependency is down. The runtime retries the record with its own backoff for as long as it
    /// takes. Does not count as an attempt.
    Hold(String),
    /// The record can never be processed and is dead-lettered.
    DeadLetter(Reason),
}

/// One record passed to a [`KeyedHandler`]. Cheap to clone, because it shares its batch.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub(super) batch: Arc<Batch>,
    pub(super) index: u32,
    pub(super) partition: i32,
    pub(super) topic: Arc<str>,
    pub(super) attempt: u32,
}

impl Delivery {
    pub fn record(&self) -> Record<'_> {
        self.batch.record(self.index as usize)
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Returns the number of this attempt, starting at 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}
