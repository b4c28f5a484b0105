//! View of one partition: applies batches to it, and decides which records must be restated or
//! expire.
//!
//! This module does not read the clock or write to Kafka, so that tests can control time and topic.

use postrider_kafka::{
    batch::{Batch, Record},
    consumer::Failure,
};
use postrider_redis::Redis;
use uuid::Uuid;

use super::{
    entry::{Entry, Marker},
    keys::{Keys, MARKER_FIELD},
    record::{self, Repeated, Unfit, ViewLocation},
    restate::Restatement,
    script::{Due, Scripts, Writes},
};

/// Time after which the projection checks a value again whose tombstone it has written but not
/// read, in ms.
const RECHECK_MS: i64 = 30_000;

/// A partition during one ownership.
pub struct Partition {
    pub number: i32,
    /// Number of partitions of the topic.
    pub partitions: i32,
    pub keys: Keys,
    /// Marker that the projection expects in Redis.
    pub marker: Marker,
    /// Commit point at the assignment: an earlier owner finished the records below, including
    /// restatements.
    pub settled: i64,
}

/// Result of one search for expired values.
pub struct Expired {
    /// Number of due keys: expired values, and deleted keys that the view dropped.
    pub due: usize,
    /// Tombstones to append.
    pub tombstones: Vec<Restatement>,
}

/// Returns the failure for a Redis error; the caller retries.
pub fn unreachable(error: redis::RedisError) -> Failure {
    Failure::Retry(format!("Redis: {error}"))
}

impl Partition {
    pub fn location(&self) -> ViewLocation<'_> {
        ViewLocation { keys: &self.keys, partition: self.number, partitions: self.partitions }
    }

    /// Compares and sets the marker. Fails with `Restart` if Redis has a different one.
    pub async fn mark(
        &mut self,
        scripts: &Scripts,
        redis: &mut Redis,
        expected: &str,
        marker: Marker,
        drop_view: bool,
    ) -> Result<(), Failure> {
        let found = scripts.mark(redis, &self.keys, expected, &marker.encode(), drop_view).await;
        let (_, set) = found.map_err(unreachable)?;
        if !set {
            return Err(Failure::Restart("another writer changed the marker".to_owned()));
        }
        self.marker = marker;
        Ok(())
    }

    /// Writes the part of a batch that the view lacks, together with the marker. Returns the
    /// invalid records.
    pub async fn write(
        &mut self,
        scripts: &Scripts,
        redis: &mut Redis,
        batch: &Batch,
        now_ms: i64,
    ) -> Result<Vec<(i64, Unfit)>, Failure> {
        let Some(next) = batch.next_offset() else { return Ok(Vec::new()) };
        let (mut writes, mut unfit) = (Writes::default(), Vec::new());
        for record in batch.iter().filter(|record| record.offset() >= self.marker.next) {
            if let Err(found) = record::add(&mut writes, &self.location(), &record, now_ms) {
                unfit.push((record.offset(), found));
            }
        }
        unfit.retain(|(offset, _)| *offset >= self.settled);
        let marker = self.marker.advanced(next, batch.last_timestamp_ms());
        let applied = scripts.apply(redis, &self.keys, &self.marker.encode(), &marker.encode(), writes).await;
        let (before, applied) = applied.map_err(unreachable)?;
        // An earlier attempt whose response was lost may have applied the batch.
        let done_before = Marker::decode(&before).ok().filter(|found| found.next == next);
        self.marker = match (applied, done_before) {
            (true, _) => marker,
            (false, Some(found)) => found,
            (false, None) => {
                return Err(Failure::Restart("another writer or a data loss changed the marker".to_owned()));
            }
        };
        Ok(unfit)
    }

    /// Returns what must be restated after a batch: the newest entry of each key for which a record
    /// of the batch is not the newest, or may be mistaken for the newest by a later rebuild.
    pub async fn restatements(&self, redis: &mut Redis, batch: &Batch) -> Result<Vec<Restatement>, Failure> {
        let unsure = batch.iter().filter(|record| record.offset() >= self.settled);
        let unsure: Vec<_> =
            unsure.filter_map(|record: Record<'_>| Some((record.key()?, Repeated::of(&record)?))).collect();
        if unsure.is_empty() {
            return Ok(Vec::new());
        }
        let answers = self.ask(redis, &unsure).await?;
        let marker = self.marker.encode();
        let mut restatements = Vec::new();
        for ((key, repeated), ((found, entry), first)) in unsure.iter().zip(answers) {
            if found.as_deref() != Some(marker.as_bytes()) {
                // An outdated entry would be restated as the newest.
                return Err(Failure::Restart("the view changed while it was read".to_owned()));
            }
            let entry = entry.as_deref().map(Entry::decode).transpose();
            let Some(entry) = entry.map_err(|unknown| Failure::Retry(unknown.to_string()))? else { continue };
            let unsettled = match repeated.id {
                // After the first write was compacted, a rebuild would take the duplicate for a new
                // write.
                Some(_) => first.as_deref().and_then(first_offset).is_some_and(|first| first < repeated.offset),
                None => entry.version > repeated.version,
            };
            if unsettled && entry.version < repeated.offset {
                restatements.push(Restatement::of_entry(key, &entry, self.marker.next - 1));
            }
        }
        Ok(restatements)
    }

    /// Finds values that have expired by `now_ms`, and drops deleted keys past their retention; at
    /// most `limit` keys.
    pub async fn expired(
        &self,
        scripts: &Scripts,
        redis: &mut Redis,
        now_ms: i64,
        limit: usize,
    ) -> Result<Expired, Failure> {
        let question = Due { marker: self.marker.encode(), now_ms, again_ms: now_ms + RECHECK_MS, limit };
        let (due, fields) = scripts.due(redis, &self.keys, &question).await.map_err(unreachable)?;
        // The tombstone covers every write of its key that the view has applied.
        let tombstone = |key: &Vec<u8>| Restatement::of_expired(key, self.marker.next - 1);
        Ok(Expired { due, tombstones: fields.iter().map(tombstone).collect() })
    }

    /// Reads for each record the marker, the key's entry and the first offset of its idempotent
    /// write. One pipeline suffices, because all keys share a slot.
    async fn ask(&self, redis: &mut Redis, unsure: &[(&[u8], Repeated)]) -> Result<Vec<Found>, Failure> {
        let mut question = redis::pipe();
        for (key, repeated) in unsure {
            question.cmd("HMGET").arg(&self.keys.view).arg(MARKER_FIELD).arg(*key);
            question.cmd("GET").arg(self.keys.id(repeated.id.unwrap_or(Uuid::nil())));
        }
        question.query_async(redis).await.map_err(unreachable)
    }
}

/// Marker and entry of a key, and the stored state of an idempotent write.
type Found = ((Option<Vec<u8>>, Option<Vec<u8>>), Option<Vec<u8>>);

/// Parses the first offset of an idempotent write from `<offset>:<last seen>`.
fn first_offset(memory: &[u8]) -> Option<i64> {
    std::str::from_utf8(memory).ok()?.split(':').next()?.parse().ok()
}
