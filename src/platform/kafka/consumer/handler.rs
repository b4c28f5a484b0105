//! What a room implements, and what it is told.

use std::{future::Future, sync::Arc, time::Duration};

use crate::platform::kafka::{
    batch::{Batch, Record},
    dead_letter::Reason,
};

/// Why a batch handler could not finish.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A dependency is down: the same is tried again, after a pause.
    #[error("{0}")]
    Retry(String),
    /// The handler's idea of the partition is stale: it starts over with `assigned`.
    #[error("starting over: {0}")]
    Restart(String),
}

/// A record that can never have its effect: it goes to the dead letters, and its batch goes on.
#[derive(Debug)]
pub struct Poison {
    pub offset: i64,
    pub reason: Reason,
}

/// A partition as it is handed to a batch handler.
#[derive(Debug, Clone, Copy)]
pub struct Assignment {
    pub partition: i32,
    /// The group's committed offset.
    pub committed: Option<i64>,
    /// The first offset of the log.
    pub low: i64,
    /// The offset that the next record will get.
    pub high: i64,
}

impl Assignment {
    /// Where the group left off; the oldest record where it never was, or where that is gone.
    pub fn resume(&self) -> i64 {
        self.committed.unwrap_or(self.low).max(self.low)
    }
}

/// The batch shape: a partition's records in order, a batch at a time. Called for one partition
/// from one task at a time. `assigned` and `apply` are enough for a room.
pub trait BatchHandler: Send + Sync + 'static {
    /// The handler's state for one partition.
    type Partition: Send;

    /// A partition was gained, or its handler asked to start over. Returns the first offset to
    /// read; [`Assignment::resume`] where the group's commit decides.
    fn assigned(&self, assignment: Assignment) -> impl Future<Output = Result<(Self::Partition, i64), Failure>> + Send;

    /// Makes the effect of a batch and says which of its records cannot have one. Afterwards the
    /// batch may be committed. It may be called again for records that it has seen: the effect
    /// must be idempotent.
    fn apply(
        &self,
        state: &mut Self::Partition,
        batch: &Batch,
    ) -> impl Future<Output = Result<Vec<Poison>, Failure>> + Send;

    /// Everything that the log had was handed over.
    fn caught_up(&self, _state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// Called every second while there is nothing to apply.
    fn idle(&self, _state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// The partition is lost; nothing more may be done for it.
    fn revoked(&self, _partition: i32) {}

    /// The group has given this member its share, on top of what it had: these partitions are new.
    /// None where there are more members than partitions.
    fn joined(&self, _gained: &[i32]) {}

    /// All partitions are lost, and what comes next is not known yet.
    fn left(&self) {}
}

/// The keyed shape: records of a key one after the other, different keys side by side.
pub trait KeyedHandler: Send + Sync + 'static {
    /// Which records of a partition wait for each other: those with the same bytes here. A record
    /// with `None` waits for nobody.
    fn ordering_key<'r>(&self, record: &Record<'r>) -> Option<&'r [u8]> {
        record.key()
    }

    /// Makes the effect of one record. It is dropped where it stands when the partition is lost
    /// and the deadline for that has passed. The same record may come again, after a crash or a
    /// rebalance.
    fn handle(&self, delivery: &Delivery) -> impl Future<Output = Outcome> + Send;

    /// The group has given this member its share; see [`BatchHandler::joined`].
    fn joined(&self, _gained: &[i32]) {}

    /// The partition is lost.
    fn revoked(&self, _partition: i32) {}
}

/// How the handling of one record ended.
#[derive(Debug)]
pub enum Outcome {
    /// It has its effect.
    Done,
    /// It failed and is tried again after this time. Its key waits; others go on, and no worker
    /// is held meanwhile. Counts as an attempt.
    RetryAfter(Duration, Reason),
    /// Something that we depend on is down. Tried again with the runtime's own backoff, for as long
    /// as it takes; not counted as an attempt.
    Hold(String),
    /// It can never have its effect.
    DeadLetter(Reason),
}

/// One record on its way to a [`KeyedHandler`]. Cheap: it shares its batch.
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

    /// 1 for the first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}
