//! Limits the idempotent writes stored in Redis. Each write with an `Idempotency-Key` costs a Redis
//! key for 36 hours; without a limit they could use up the memory that the view needs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use postrider_http::Problem;
use postrider_limits::bound::{Admitted, Bound};
use postrider_redis::Redis;
use postrider_time::clock;
use redis::{FromRedisValue, RedisError};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    entry::Marker,
    keys::{Keys, MARKER_FIELD},
};
use crate::codes;

/// Interval between counts.
const LOOK: Duration = Duration::from_secs(1);
/// Seconds after which a refused write may be retried, because ids expire continuously.
const RETRY_AFTER_S: u32 = 60;

/// The limit on ids and the latest count of an api process.
pub struct Ids {
    bound: Arc<Bound>,
    partitions: Vec<Partition>,
    redis: watch::Receiver<Option<Redis>>,
}

struct Partition {
    keys: Keys,
    /// End of the log as far as this process has written to it; 0 before its first write.
    written: AtomicI64,
}

impl Ids {
    pub fn new(limit: u64, partitions: Vec<Keys>, redis: watch::Receiver<Option<Redis>>) -> Arc<Self> {
        let partition = |keys| Partition { keys, written: AtomicI64::new(0) };
        let partitions = partitions.into_iter().map(partition).collect();
        Arc::new(Self { bound: Bound::new("idempotency_ids", limit), partitions, redis })
    }

    /// Admits a write with an idempotency key, or refuses it. A write whose id is already stored
    /// needs no space. Hold the result until the write is [noted](Self::note_written) or has
    /// failed.
    pub async fn admit(&self, partition: i32, key: &[u8], id: Uuid) -> Result<Admitted, Problem> {
        if self.bound.has_room(1) || self.is_stored(partition, key, id).await {
            return Ok(self.bound.admit(1));
        }
        self.bound.count_refusal();
        let detail = format!(
            "Redis stores {} idempotency keys, the limit (`kv.max_idempotency_ids`); nothing was stored",
            self.bound.limit()
        );
        Err(Problem { retry_after_s: Some(RETRY_AFTER_S), ..Problem::new(codes::TOO_MANY_IDEMPOTENCY_KEYS, detail) })
    }

    /// Records that a write of this process is in the log.
    pub fn note_written(&self, partition: i32, offset: i64) {
        if let Some(found) = usize::try_from(partition).ok().and_then(|number| self.partitions.get(number)) {
            found.written.fetch_max(offset + 1, Ordering::Relaxed);
        }
    }

    async fn is_stored(&self, partition: i32, key: &[u8], id: Uuid) -> bool {
        let redis = self.redis.borrow().clone();
        let known = usize::try_from(partition).ok().and_then(|number| self.partitions.get(number));
        let (Some(mut redis), Some(known)) = (redis, known) else { return false };
        let mut exists = redis::cmd("EXISTS");
        exists.arg(known.keys.id(Uuid::new_v5(&id, key)));
        exists.query_async(&mut redis).await.unwrap_or(false)
    }

    /// Counts ids repeatedly; runs forever. While Redis does not answer, the last count applies,
    /// plus the writes that this process admits.
    pub async fn watch(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let redis = self.redis.borrow().clone();
            let Some(mut redis) = redis else { continue };
            let look = self.bound.look();
            match self.count(&mut redis).await {
                Ok(count) => self.bound.set(look, count),
                Err(error) => tracing::debug!(error = %error, "counting idempotency ids failed"),
            }
        }
    }

    /// Counts the ids in Redis, and the records that the projection has not read yet, each of which
    /// may add one.
    async fn count(&self, redis: &mut Redis) -> Result<u64, RedisError> {
        let commands = self.partitions.iter().flat_map(|partition| {
            let (mut counts, mut marker) = (redis::cmd("HGETALL"), redis::cmd("HGET"));
            counts.arg(&partition.keys.id_counts);
            marker.arg(&partition.keys.view).arg(MARKER_FIELD);
            // In this order, so that an id stored in between counts twice rather than not at all.
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
    /// Returns the number of this process's records that a complete view has not applied yet. A
    /// rebuild does not count, because it reads mostly records whose ids are too old to be stored.
    fn unread(&self, marker: Option<&[u8]>) -> u64 {
        let marker = marker.and_then(|marker| Marker::decode(marker).ok()).filter(Marker::is_complete);
        let written = self.written.load(Ordering::Relaxed);
        marker.map_or(0, |marker| u64::try_from(written - marker.next).unwrap_or(0))
    }
}
