//! The bound on idempotent writes that Redis remembers. Each write with an `Idempotency-Key` costs a key in
//! Redis for 36 hours, so that without a bound they would use up its memory, and with it the view.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use redis::{FromRedisValue, RedisError};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    entry::Marker,
    keys::{Keys, MARKER_FIELD},
};
use crate::platform::{
    bound::{Admitted, Bound},
    clock,
    http::{Code, Problem},
    redis::Redis,
};

/// The time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Seconds after which a refused write may come again: ids expire all the time.
const RETRY_AFTER_S: u32 = 60;

/// The bound on ids, as one api process knows it.
pub struct Ids {
    bound: Arc<Bound>,
    partitions: Vec<Partition>,
    redis: watch::Receiver<Option<Redis>>,
}

struct Partition {
    keys: Keys,
    /// The end of the log, as far as this process has written to it; 0 before its first write.
    written: AtomicI64,
}

impl Ids {
    pub fn new(limit: u64, partitions: Vec<Keys>, redis: watch::Receiver<Option<Redis>>) -> Arc<Self> {
        let partition = |keys| Partition { keys, written: AtomicI64::new(0) };
        let partitions = partitions.into_iter().map(partition).collect();
        Arc::new(Self { bound: Bound::new("idempotency_ids", limit), partitions, redis })
    }

    /// Admits a write with an idempotency key, or refuses it. One that is remembered already takes no room. Hold the result
    /// until the write is [noted](Self::note_written), or is none.
    pub async fn admit(&self, partition: i32, key: &[u8], id: Uuid) -> Result<Admitted, Problem> {
        if self.bound.has_room(1) || self.is_remembered(partition, key, id).await {
            return Ok(self.bound.admit(1));
        }
        self.bound.count_refusal();
        let detail = format!(
            "Redis remembers {} writes with an `Idempotency-Key`, the limit of `kv.max_idempotency_ids`; nothing was stored",
            self.bound.limit()
        );
        Err(Problem { retry_after_s: Some(RETRY_AFTER_S), ..Problem::new(Code::TooManyIdempotencyKeys, detail) })
    }

    /// Notes that a write of this process is in the log.
    pub fn note_written(&self, partition: i32, offset: i64) {
        if let Some(found) = usize::try_from(partition).ok().and_then(|number| self.partitions.get(number)) {
            found.written.fetch_max(offset + 1, Ordering::Relaxed);
        }
    }

    async fn is_remembered(&self, partition: i32, key: &[u8], id: Uuid) -> bool {
        let redis = self.redis.borrow().clone();
        let known = usize::try_from(partition).ok().and_then(|number| self.partitions.get(number));
        let (Some(mut redis), Some(known)) = (redis, known) else { return false };
        let mut exists = redis::cmd("EXISTS");
        exists.arg(known.keys.id(Uuid::new_v5(&id, key)));
        exists.query_async(&mut redis).await.unwrap_or(false)
    }

    /// Counts again and again; never ends by itself. While Redis does not answer, the last count holds, and what this
    /// process takes is added to it.
    pub async fn watch(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let redis = self.redis.borrow().clone();
            let Some(mut redis) = redis else { continue };
            let look = self.bound.look();
            match self.count(&mut redis).await {
                Ok(count) => self.bound.set(look, count),
                Err(error) => tracing::debug!(error = %error, "could not count idempotency ids"),
            }
        }
    }

    /// Ids that Redis has, and records that the projection has not read yet, since each may become one.
    async fn count(&self, redis: &mut Redis) -> Result<u64, RedisError> {
        let commands = self.partitions.iter().flat_map(|partition| {
            let (mut counts, mut marker) = (redis::cmd("HGETALL"), redis::cmd("HGET"));
            counts.arg(&partition.keys.id_counts);
            marker.arg(&partition.keys.view).arg(MARKER_FIELD);
            // In this order, so that what is read in between counts twice rather than not at all.
            [marker, counts]
        });
        let answers = redis.ask(commands.collect()).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let this_hour = clock::now_ms() / 3_600_000;
        let mut total = 0;
        for (pair, partition) in answers.chunks_exact(2).zip(&self.partitions) {
            let marker = Option::<Vec<u8>>::from_redis_value(pair[0].clone())?;
            let counts = Vec::<(i64, i64)>::from_redis_value(pair[1].clone())?;
            let remembered = counts.iter().filter(|(hour, _)| *hour >= this_hour).map(|(_, count)| count).sum::<i64>();
            total += remembered.max(0) as u64 + partition.unread(marker.as_deref());
        }
        Ok(total)
    }
}

impl Partition {
    /// Records of this process that a complete view has not got yet. A rebuild reads mostly records that are too old to be
    /// remembered.
    fn unread(&self, marker: Option<&[u8]>) -> u64 {
        let marker = marker.and_then(|marker| Marker::decode(marker).ok()).filter(Marker::is_complete);
        let written = self.written.load(Ordering::Relaxed);
        marker.map_or(0, |marker| u64::try_from(written - marker.next).unwrap_or(0))
    }
}
