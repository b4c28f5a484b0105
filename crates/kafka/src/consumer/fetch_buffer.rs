//! Buffer for the fetched records of a partition until its work accepts them.

use metrics::histogram;

use super::{fetch_watchdog::FetchWatchdog, membership::OwnedPartition};
use crate::batch::Batch;

/// Batch of a partition that the next records are added to.
#[derive(Default)]
pub(super) struct FetchBuffer {
    /// Ownership (`generation`) and `start` that the records belong to; 0 while nothing may be
    /// read.
    pub generation: u64,
    pub start: u64,
    /// Start that the partition was last asked to be read for.
    pub starting: Option<u64>,
    pub batch: Batch,
    /// Set until a record of the partition, or the end of its log, arrives.
    pub fetch_watchdog: Option<FetchWatchdog>,
}

impl FetchBuffer {
    /// Hands the batch over if the partition's work has capacity; drops it if it belongs to an
    /// earlier ownership or start. Returns whether the buffer is empty afterwards.
    pub fn hand_over(&mut self, held: &mut OwnedPartition) -> bool {
        if self.batch.is_empty() {
            return true;
        }
        if self.generation != held.generation || self.start != held.start {
            self.batch = Batch::default();
            return true;
        }
        let size = self.batch.size();
        let taken = held.work.offer(&mut self.batch);
        if taken {
            histogram!("postrider_consumer_batch_records").record(size.1 as f64);
        }
        taken
    }
}
