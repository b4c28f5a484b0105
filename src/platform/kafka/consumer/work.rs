//! What the polling thread asks of a way to work on partitions.

use std::time::Duration;

use serde::Serialize;

use crate::platform::kafka::batch::Batch;

/// BatchConsumer one after the other, or keys side by side.
pub(super) trait Shape: Send + Sync + 'static {
    /// A partition was gained. The shape says when and where to read it.
    fn open(&self, opening: Opening) -> Box<dyn PartitionWork>;

    fn joined(&self, gained: &[i32]);

    fn revoked(&self, partition: i32);

    fn left(&self);

    /// Called by the polling thread at least every 20 ms.
    fn tick(&self);
}

/// One partition, from being gained to being let go. Used by the polling thread only; never blocks.
pub(super) trait PartitionWork: Send {
    /// Reading begins for this start; what is offered from now on belongs to it.
    fn begun(&mut self, _start: u64) {}

    /// Takes the batch when there is room, and leaves an empty one for the next records in its place.
    fn offer(&mut self, batch: &mut Batch) -> bool;

    /// Whether there is room enough that a paused partition is worth resuming: the client library
    /// fetches anew what it had.
    fn has_room(&self) -> bool;

    /// Everything that the log had was handed over.
    fn caught_up(&mut self);

    /// Everything below has its effect; -1 where nothing is known yet.
    fn commit_point(&self) -> i64;

    /// Begins nothing more; what is in hand goes on.
    fn close(&mut self);

    /// Whether nothing is in hand.
    fn is_finished(&self) -> bool;

    /// Whether a handler has something in hand.
    fn is_running(&self) -> bool;

    /// Whether what works on the partition ended before the partition was taken away, as when it panicked.
    fn has_died(&self) -> bool {
        false
    }

    /// Drops what is still in hand.
    fn abandon(&mut self);

    fn span(&mut self) -> PartitionSpan;
}

/// What a partition has between its commit point and what was read last.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PartitionSpan {
    pub records: usize,
    pub bytes: usize,
    pub holder: Option<Holder>,
}

/// The record that holds a commit point: the lowest unfinished one.
#[derive(Debug, Clone, Serialize)]
pub struct Holder {
    pub offset: i64,
    pub key: Option<String>,
    #[serde(rename = "held_for_seconds", serialize_with = "seconds")]
    pub held_for: Duration,
    /// Attempts that failed.
    pub attempts: u32,
    /// The last failure; empty where there was none.
    pub error: String,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// A request of a partition's work to the polling thread: to read from here on. What was handed
/// over before, under another start, is stale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub partition: i32,
    pub generation: u64,
    pub start: u64,
    /// `None` is where the group committed.
    pub offset: Option<i64>,
}

/// What a shape gets to know of a partition that was gained.
pub(super) struct Opening {
    pub partition: i32,
    /// Tells this ownership from earlier ones.
    pub generation: u64,
    pub starts: std::sync::mpsc::Sender<Start>,
}

impl Opening {
    pub fn begin_at_commit(&self) {
        let start = Start { partition: self.partition, generation: self.generation, start: 1, offset: None };
        // The polling thread outlives what it opens, except in a crash.
        let _ = self.starts.send(start);
    }
}
