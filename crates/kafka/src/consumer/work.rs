//! Interface between the polling thread and the two shapes of consumers.

use std::time::Duration;

use postrider_time::backoff::{Backoff, Growth, Jitter};
use serde::Serialize;

use crate::batch::Batch;

/// Way of processing a consumer's partitions: in batches, or by key.
pub(super) trait Shape: Send + Sync + 'static {
    /// Creates the work of a partition that was gained. The shape requests when and where to read
    /// it.
    fn open(&self, opening: Opening) -> Box<dyn PartitionWork>;

    fn joined(&self, gained: &[i32]);

    fn revoked(&self, partition: i32);

    fn left(&self);

    /// Called by the polling thread in every round, about every 20 ms or more often.
    fn tick(&self);
}

/// Work on one partition from the time it is gained until it is released. Used by the polling
/// thread only; never blocks.
pub(super) trait PartitionWork: Send {
    /// Called when reading begins for this start; batches offered from now on belong to it.
    fn begun(&mut self, _start: u64) {}

    /// Takes the batch if there is capacity, and replaces it by an empty one for the next records.
    /// Returns whether the batch was taken.
    fn offer(&mut self, batch: &mut Batch) -> bool;

    /// Returns whether there is enough capacity to resume a paused partition, given that the client
    /// library fetches its prefetched records again.
    fn has_room(&self) -> bool;

    /// Called when everything in the log has been handed over.
    fn caught_up(&mut self);

    /// Returns the commit point: all records below it are finished. -1 if not known yet.
    fn commit_point(&self) -> i64;

    /// Starts no more records; those in progress continue.
    fn close(&mut self);

    /// Returns whether no work is in progress.
    fn is_finished(&self) -> bool;

    /// Returns whether a handler is processing records.
    fn is_running(&self) -> bool;

    /// Returns whether the task of the partition ended before the partition was revoked, for
    /// example because it panicked.
    fn has_died(&self) -> bool {
        false
    }

    /// Drops work that is still in progress.
    fn abandon(&mut self);

    fn span(&mut self) -> PartitionSpan;
}

/// Records and bytes between a partition's commit point and the last record read.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PartitionSpan {
    pub records: usize,
    pub bytes: usize,
    pub holder: Option<Holder>,
}

/// Record that holds a commit point: the lowest unfinished one.
#[derive(Debug, Clone, Serialize)]
pub struct Holder {
    pub offset: i64,
    pub key: Option<String>,
    #[serde(rename = "held_for_seconds", serialize_with = "seconds")]
    pub held_for: Duration,
    /// Number of failed attempts.
    pub attempts: u32,
    /// Last failure; empty if there was none.
    pub error: String,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// Request of a partition's work that the polling thread reads from an offset. Batches handed over
/// under an earlier start are stale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub partition: i32,
    pub generation: u64,
    pub start: u64,
    /// First offset to read; `None` is the group's commit.
    pub offset: Option<i64>,
}

/// Description of a partition that was gained, passed to the shape.
pub(super) struct Opening {
    pub partition: i32,
    /// Distinguishes this ownership from earlier ones.
    pub generation: u64,
    pub starts: std::sync::mpsc::Sender<Start>,
}

impl Opening {
    pub fn begin_at_commit(&self) {
        let start = Start { partition: self.partition, generation: self.generation, start: 1, offset: None };
        // The polling thread outlives the work that it opens, except in a crash.
        let _ = self.starts.send(start);
    }
}

/// Waits between the attempts at a record or batch whose handler lacks a dependency.
const HOLD: Backoff = Backoff {
    base: Duration::from_millis(100),
    cap: Duration::from_secs(2),
    growth: Growth::Exponential,
    jitter: Jitter::Equal,
};

/// Returns the wait after so many failures in a row.
pub(super) fn hold_pause(failures: u32) -> Duration {
    HOLD.delay(failures, fastrand::f64())
}
