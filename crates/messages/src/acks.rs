//! Collects acknowledgements for a moment and stores them together.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use postrider_kafka::PartitionId;
use postrider_postgres::query::Error;
use tokio::sync::Notify;

use super::{cursor::Cursor, store::Store};

/// Time for which acknowledgements are collected.
const GATHER: Duration = Duration::from_millis(100);
/// Maximum number of positions per statement.
const CHUNK: usize = 1_000;

type Positions = HashMap<(Arc<str>, PartitionId), i64>;

/// Acknowledgements of a process, bounded by the receivers connected meanwhile.
#[derive(Default)]
pub struct Acks {
    positions: Mutex<Positions>,
    added: Notify,
}

impl Acks {
    /// Records that the receiver has everything up to the cursor.
    pub fn add(&self, receiver: &Arc<str>, cursor: &Cursor) {
        self.merge(cursor.partitions().map(|(partition_id, offset)| ((receiver.clone(), partition_id), offset)));
        self.added.notify_one();
    }

    fn merge(&self, positions: impl Iterator<Item = ((Arc<str>, PartitionId), i64)>) {
        let mut all = self.positions.lock();
        for (partition, offset) in positions {
            let known = all.entry(partition).or_insert(offset);
            *known = (*known).max(offset);
        }
    }

    /// Stores the collected acknowledgements. Those that fail are kept for the next call.
    pub async fn write(&self, store: &Store) -> Result<(), Error> {
        let gathered = std::mem::take(&mut *self.positions.lock());
        let mut positions: Vec<_> = gathered.into_iter().collect();
        while !positions.is_empty() {
            let chunk = positions.split_off(positions.len().saturating_sub(CHUNK));
            let rows: Vec<_> =
                chunk.iter().map(|((receiver, partition_id), at)| (&**receiver, *partition_id, *at)).collect();
            if let Err(error) = store.acknowledge(&rows).await {
                self.merge(positions.into_iter().chain(chunk));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stores acknowledgements as they arrive; runs forever.
    pub async fn write_forever(&self, store: &Store) {
        loop {
            self.added.notified().await;
            tokio::time::sleep(GATHER).await;
            while let Err(error) = self.write(store).await {
                tracing::debug!(error = %error, "storing acknowledgements failed, retrying");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
