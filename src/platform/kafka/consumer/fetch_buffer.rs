//! What is read of a partition, on its way to the partition's work.

use metrics::histogram;

use super::{membership::OwnedPartition, progress::FetchWatchdog};
use crate::platform::kafka::batch::Batch;

/// The batch of a partition that the next records go into.
#[derive(Default)]
pub(super) struct FetchBuffer {
    /// Of the ownership and the start that it belongs to; 0 while nothing may be read.
    pub generation: u64,
    pub start: u64,
    pub batch: Batch,
    /// Until something is heard of the partition: a record, or that there is none.
    pub fetch_watchdog: Option<FetchWatchdog>,
}

impl FetchBuffer {
    /// Hands the batch over where the partition's work has room. Returns whether nothing is left of it here.
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
