//! The projection: batches of `messages` into the view, one partition at a time.
//!
//! Reading starts at the group's commit. What the view already has is not written again, but
//! records whose version decides are looked at again, because a crash may have come between the
//! view and the record that restates its newer value.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use metrics::{counter, gauge};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    Config, EXPIRES_HEADER, TOPIC, VERSION_HEADER,
    entry::{Entry, Marker, State},
    keys::Keys,
    plan::{Plan, plan},
    restate::Restater,
    script::{Scripts, Writes},
    standing::Standing,
};
use crate::platform::{
    clock,
    http::json,
    kafka::{
        self, Producer,
        batch::{Batch, Record},
        consumer::{Assignment, BatchHandler, Failure},
        event,
    },
    ops::Check,
    redis::Redis,
};

/// How long a deleted key is remembered: as long as the id of an idempotent write.
const DELETED_FOR: Duration = Duration::from_secs(86_400);

/// The kv room's part of the processor role.
pub struct Projector {
    pub(super) redis: tokio::sync::watch::Receiver<Option<Redis>>,
    pub(super) restater: Restater,
    pub(super) scripts: Scripts,
    config: Config,
    key_prefix: String,
    check: Check,
    standing: Mutex<Standing>,
}

/// Where one partition is.
pub struct Partition {
    pub(super) number: i32,
    pub(super) keys: Keys,
    /// As it stands in Redis, as far as we know.
    pub(super) marker: Marker,
    /// Records below were looked at by an earlier owner, restatements included.
    settled: i64,
}

impl Projector {
    pub fn new(
        config: Config,
        kafka: &kafka::Config,
        key_prefix: &str,
        redis: tokio::sync::watch::Receiver<Option<Redis>>,
        producer: Producer,
        check: Check,
    ) -> Arc<Self> {
        check.fail(Standing::default().problem().unwrap_or_default());
        Arc::new(Self {
            redis,
            restater: Restater::new(producer, kafka.topic(TOPIC)),
            scripts: Scripts::default(),
            config,
            key_prefix: key_prefix.to_owned(),
            check,
            standing: Mutex::default(),
        })
    }

    pub(super) fn redis(&self) -> Result<Redis, Failure> {
        self.redis.borrow().clone().ok_or_else(|| Failure::Retry("Redis is not connected yet".to_owned()))
    }

    /// Says how far a partition's view is, in readiness and metrics.
    fn report(&self, partition: i32, problem: Option<String>, remaining: i64) {
        gauge!("postrider_kv_rebuild_remaining_records", "partition" => partition.to_string()).set(remaining as f64);
        self.stand(|standing| {
            standing.behind.insert(partition, problem);
        });
    }

    /// Changes what is known, and with it what readiness says.
    fn stand(&self, change: impl FnOnce(&mut Standing)) {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut standing);
        match standing.problem() {
            None => self.check.pass(),
            Some(problem) => self.check.fail(problem),
        }
    }

    fn report_marker(&self, partition: &Partition) {
        match partition.marker.target {
            None => self.report(partition.number, None, 0),
            Some(target) => {
                let next = partition.marker.next;
                let text = format!("rebuilding the view, at offset {next} of {target}");
                self.report(partition.number, Some(text), target - next);
            }
        }
    }

    /// Compares and sets the marker; fails with `Restart` when it is not what we think.
    async fn mark(
        &self,
        partition: &mut Partition,
        expected: &str,
        marker: Marker,
        drop_view: bool,
    ) -> Result<(), Failure> {
        let mut redis = self.redis()?;
        let found = self.scripts.mark(&mut redis, &partition.keys, expected, &marker.encode(), drop_view).await;
        let (_, set) = found.map_err(unreachable)?;
        if !set {
            return Err(Failure::Restart("another writer moved the marker".to_owned()));
        }
        partition.marker = marker;
        self.report_marker(partition);
        Ok(())
    }

    async fn read_marker(&self, keys: &Keys) -> Result<Option<Marker>, Failure> {
        let mut redis = self.redis()?;
        let found: Option<Vec<u8>> = redis::cmd("HGET")
            .arg(&keys.view)
            .arg(super::keys::MARKER_FIELD)
            .query_async(&mut redis)
            .await
            .map_err(unreachable)?;
        Ok(found.as_deref().and_then(Marker::decode))
    }
}

/// Redis did not answer; it is tried again.
pub(super) fn unreachable(error: redis::RedisError) -> Failure {
    Failure::Retry(format!("Redis: {error}"))
}

impl BatchHandler for Projector {
    type Partition = Partition;

    async fn assigned(&self, assignment: Assignment) -> Result<(Partition, i64), Failure> {
        let number = assignment.partition;
        let keys = Keys::new(&self.key_prefix, self.config.epoch, number);
        let found = self.read_marker(&keys).await?;
        let marker = found.unwrap_or(Marker { next: assignment.low, written_s: 0, target: None });
        let expected = found.map(|marker| marker.encode()).unwrap_or_default();
        let settled = assignment.committed.unwrap_or(0);
        let mut partition = Partition { number, keys, marker, settled };
        let from = match plan(found, &assignment, clock::now_ms() / 1_000) {
            Plan::Continue => assignment.committed.unwrap_or(assignment.low).clamp(assignment.low, marker.next),
            Plan::CatchUp { target } => {
                tracing::warn!(
                    partition = number,
                    next = marker.next,
                    target,
                    "the view lost its newest part; catching up"
                );
                self.mark(&mut partition, &expected, Marker::new(marker.next, Some(target)), false).await?;
                marker.next
            }
            Plan::Rebuild { from, target } => {
                if target > from {
                    counter!("postrider_kv_rebuilds_total").increment(1);
                    tracing::warn!(
                        partition = number,
                        from,
                        target,
                        "the view is missing or stale; rebuilding it from the topic"
                    );
                }
                self.mark(&mut partition, &expected, Marker::new(from, Some(target)), true).await?;
                from
            }
            Plan::Refuse { applied } => {
                let high = assignment.high;
                let problem = format!(
                    "the topic ends at offset {high}, before {applied}, which was applied: it was replaced or truncated; raise `kv.epoch`, which rebuilds the view under a new group position"
                );
                self.report(number, Some(problem.clone()), 0);
                return Err(Failure::Retry(problem));
            }
        };
        self.report_marker(&partition);
        self.drop_older_epochs(number).await?;
        Ok((partition, from))
    }

    async fn apply(&self, partition: &mut Partition, batch: &Batch) -> Result<(), Failure> {
        let Some(next) = batch.next_offset() else { return Ok(()) };
        if next > partition.marker.next {
            self.write(partition, batch, next).await?;
        }
        let unsure = batch.iter().filter(|record| record.offset() >= partition.settled);
        let unsure = unsure.filter_map(|record| Some((record.key()?, Repeated::of(&record)?))).collect::<Vec<_>>();
        if !unsure.is_empty() {
            self.restate_newer(partition, &unsure).await?;
        }
        counter!("postrider_kv_projected_records_total").increment(batch.len() as u64);
        Ok(())
    }

    async fn caught_up(&self, partition: &mut Partition) -> Result<(), Failure> {
        if partition.marker.is_complete() {
            return Ok(());
        }
        let expected = partition.marker.encode();
        let complete = Marker::new(partition.marker.next, None);
        self.mark(partition, &expected, complete, false).await?;
        tracing::info!(partition = partition.number, next = complete.next, "the view is complete");
        Ok(())
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // Nothing may be written for hours, and Redis may lose everything in any second of them.
        if self.read_marker(&partition.keys).await? != Some(partition.marker) {
            return Err(Failure::Restart("the view is not as we left it".to_owned()));
        }
        if partition.marker.is_complete() { self.expire(partition).await } else { Ok(()) }
    }

    fn revoked(&self, partition: i32) {
        gauge!("postrider_kv_rebuild_remaining_records", "partition" => partition.to_string()).set(0.0);
        self.stand(|standing| {
            standing.behind.remove(&partition);
        });
    }

    fn joined(&self, gained: &[i32]) {
        self.stand(|standing| {
            standing.joined = true;
            standing.behind.extend(gained.iter().map(|&partition| (partition, Some("starting".to_owned()))));
        });
    }

    fn left(&self) {
        self.stand(|standing| standing.joined = false);
    }
}

impl Projector {
    /// Writes what the view lacks of a batch, together with the marker.
    async fn write(&self, partition: &mut Partition, batch: &Batch, next: i64) -> Result<(), Failure> {
        let mut writes = Writes::default();
        let now_ms = clock::now_ms();
        for record in batch.iter().filter(|record| record.offset() >= partition.marker.next) {
            add(&mut writes, &partition.keys, &record, now_ms);
        }
        let expected = partition.marker.encode();
        let marker = Marker::new(next, partition.marker.target);
        let mut redis = self.redis()?;
        let applied = self.scripts.apply(&mut redis, &partition.keys, &expected, &marker.encode(), writes).await;
        let (before, applied) = applied.map_err(unreachable)?;
        // An attempt whose answer was lost may have done it already.
        let done_before = Marker::decode(&before).is_some_and(|found| found.next == next);
        if !applied && !done_before {
            return Err(Failure::Restart("another writer, or a loss, moved the marker".to_owned()));
        }
        let was_complete = partition.marker.is_complete();
        partition.marker = if applied { marker } else { Marker::decode(&before).unwrap_or(marker) };
        if !was_complete {
            self.report_marker(partition);
        }
        Ok(())
    }

    /// For each record the key's entry, and the first offset of its idempotent write. One pipeline:
    /// all of it is in one slot.
    async fn ask(&self, partition: &Partition, unsure: &[(&[u8], Repeated)]) -> Result<Vec<Option<Vec<u8>>>, Failure> {
        let mut question = redis::pipe();
        for (key, repeated) in unsure {
            question.cmd("HGET").arg(&partition.keys.view).arg(*key);
            question.cmd("GET").arg(partition.keys.id(repeated.id.unwrap_or(Uuid::nil())));
        }
        question.query_async(&mut self.redis()?).await.map_err(unreachable)
    }

    /// Views of earlier epochs are nobody's any more.
    async fn drop_older_epochs(&self, partition: i32) -> Result<(), Failure> {
        let mut redis = self.redis()?;
        for epoch in 0..self.config.epoch {
            let old = Keys::new(&self.key_prefix, epoch, partition);
            redis::cmd("UNLINK")
                .arg(&old.view)
                .arg(&old.ends)
                .query_async::<()>(&mut redis)
                .await
                .map_err(unreachable)?;
        }
        Ok(())
    }

    /// Where the view has a newer version of a key than the record that was just read, the topic's
    /// last word on that key is wrong: it is said again.
    async fn restate_newer(&self, partition: &Partition, unsure: &[(&[u8], Repeated)]) -> Result<(), Failure> {
        let answers = self.ask(partition, unsure).await?;
        for ((key, repeated), answer) in unsure.iter().zip(answers.chunks(2)) {
            let first: Option<i64> =
                answer.get(1).and_then(Option::as_deref).and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
            let version = first.unwrap_or(repeated.version);
            let Some(entry) = answer.first().and_then(Option::as_deref).and_then(Entry::decode) else { continue };
            if entry.version > version && entry.version < repeated.offset {
                counter!("postrider_kv_restated_records_total").increment(1);
                self.restater.restate(partition.number, key, &entry).await?;
            }
        }
        Ok(())
    }
}

/// A record that repeats an earlier write, or may.
#[derive(Debug, Clone, Copy)]
struct Repeated {
    offset: i64,
    /// Of the write it repeats, as far as the record itself says.
    version: i64,
    /// Set for a write with an idempotency key, whose first offset the view remembers.
    id: Option<Uuid>,
}

impl Repeated {
    fn of(record: &Record<'_>) -> Option<Self> {
        let text = |name| record.header(name).and_then(|value| std::str::from_utf8(value).ok());
        let version: Option<i64> = text(VERSION_HEADER).and_then(|digits| digits.parse().ok());
        let id = text(event::ID).and_then(|id| Uuid::try_parse(id).ok()).filter(|id| id.get_version_num() == 5);
        if version.is_none() && id.is_none() {
            return None;
        }
        let id = if version.is_some() { None } else { id };
        Some(Self { offset: record.offset(), version: version.unwrap_or(record.offset()), id })
    }
}

/// Adds what one record changes.
fn add(writes: &mut Writes, keys: &Keys, record: &Record<'_>, now_ms: i64) {
    let Some(key) = record.key().filter(|key| !key.is_empty()) else {
        return poison(record, "no key");
    };
    let expires = record.header(EXPIRES_HEADER).and_then(|text| std::str::from_utf8(text).ok()?.parse::<i64>().ok());
    let state = match record.value() {
        None => State::Deleted,
        Some(value) if json::parse::<&RawValue>(value).is_err() => return poison(record, "not JSON"),
        Some(value) => State::Value { value, expires_ms: expires },
    };
    let ends = match state {
        State::Deleted => Some(now_ms + DELETED_FOR.as_millis() as i64),
        State::Value { expires_ms, .. } => expires_ms,
    };
    match Repeated::of(record) {
        None => writes.set(key, Entry { version: record.offset(), state }.encode()),
        Some(repeated) => {
            let entry = Entry { version: repeated.version, state }.encode();
            let id_key = repeated.id.map(|id| keys.id(id));
            writes.set_unless_newer(key, &entry, repeated.version, id_key);
        }
    }
    if let Some(at_ms) = ends {
        writes.ends(key, at_ms);
    }
}

/// A record that no push can have written is passed over, and counted.
fn poison(record: &Record<'_>, reason: &'static str) {
    counter!("postrider_kv_poison_records_total", "reason" => reason).increment(1);
    tracing::warn!(offset = record.offset(), reason, "a record in the kv topic is not a push; it is passed over");
}
