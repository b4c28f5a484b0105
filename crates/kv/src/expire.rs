//! Writes tombstones for expired values, so that the topic shrinks.

use metrics::counter;
use postrider_kafka::consumer::Failure;
use postrider_time::clock;

use super::{project::Projector, view::Partition};

/// Maximum number of keys per query.
const LIMIT: usize = 500;
/// Maximum number of queries per call. The partition's records wait meanwhile, so a mass expiry
/// continues in the next call.
const QUERIES: usize = 10;

impl Projector {
    /// Writes tombstones for expired values. Reads hide these values as soon as they expire.
    pub(super) async fn expire(&self, partition: &Partition) -> Result<(), Failure> {
        let mut redis = self.redis()?;
        let now_ms = clock::now_ms();
        for _ in 0..QUERIES {
            let expired = partition.expired(&self.scripts, &mut redis, now_ms, LIMIT).await?;
            let send = |tombstone| self.restater.send(partition.number, tombstone);
            let receipts: Vec<_> = expired.tombstones.iter().map(send).collect();
            for receipt in receipts {
                self.restater.stored(receipt).await?;
            }
            counter!("postrider_kv_expired_records_total").increment(expired.tombstones.len() as u64);
            if expired.due < LIMIT {
                break;
            }
        }
        Ok(())
    }
}
