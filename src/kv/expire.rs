//! What expires also gets a tombstone, so that the topic shrinks.

use metrics::counter;

use super::{
    project::{Partition, Projector, unreachable},
    script::Due,
};
use crate::platform::{clock, kafka::lanes::Failure};

/// Values looked at in one go.
const LIMIT: usize = 500;
/// When a value is looked at again whose tombstone was written but is not back yet, in ms.
const AGAIN_MS: i64 = 30_000;

impl Projector {
    /// Writes tombstones for values whose time is over. Reads hide them from the first moment.
    pub(super) async fn expire(&self, partition: &Partition) -> Result<(), Failure> {
        let mut redis = self.redis()?;
        let now_ms = clock::now_ms();
        loop {
            let question = Due { marker: partition.marker.encode(), now_ms, again_ms: now_ms + AGAIN_MS, limit: LIMIT };
            let due = self.scripts.due(&mut redis, &partition.keys, &question).await.map_err(unreachable)?;
            // Whatever the view has seen of these keys is over.
            let version = partition.marker.next - 1;
            let mut receipts = Vec::with_capacity(due.len());
            for key in &due {
                receipts.push(self.restater.expire(partition.number, key, version));
            }
            let written = receipts.len();
            for receipt in receipts {
                self.restater.stored(receipt).await?;
            }
            counter!("postrider_kv_expired_records_total").increment(written as u64);
            if written < LIMIT {
                return Ok(());
            }
        }
    }
}
