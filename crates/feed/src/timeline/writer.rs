//! The projection's changes to timelines in Redis: it adds posts to timelines that exist, removes
//! posts, and drops timelines. If Redis misses a change, the writer raises the epoch in Postgres,
//! which makes all existing timelines obsolete.

use std::{
    mem::take,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use parking_lot::{Mutex, MutexGuard};
use postrider_postgres::query::{Error, within};
use postrider_redis::Redis;
use postrider_telemetry::unknown::Unknown;
use postrider_time::clock;
use redis::{Cmd, RedisError, Script, Value};
use sqlx::PgPool;
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    epoch,
    protocol::{Keys, LINGER_MS, Mark, Owner, mark, members, number},
};

/// Maximum number of timelines per round trip.
const TOGETHER: usize = 1_000;
/// Time for which Redis is not used after a failure, so that rows do not wait for its timeouts.
const COOL_DOWN: Duration = Duration::from_secs(1);
/// Interval between two checks of the epoch.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of timelines per script, so that other commands do not wait long for it.
const OF_SCRIPT: usize = 200;
/// Maximum number of members of the `gone` list whose expiry waits for Redis.
const MAX_PENDING: usize = 100_000;
/// Maximum number of attempts to read or change timelines while the epoch changes.
const ATTEMPTS: usize = 3;

/// Raises the epoch in Redis. KEYS: epoch. ARGV: its minimum value.
const VOUCH: &str = r"
if (tonumber(redis.call('GET', KEYS[1])) or 0) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
";

/// Adds ids to the timelines that have a marker. KEYS: timelines. ARGV: number of ids that a
/// timeline keeps; then, for each timeline, the number of new ids and the ids. A timeline that is a
/// tenth too long is cut to its length and its floor is raised; ids that arrive late may be added
/// below the floor.
const ADD: &str = r"
local kept, at = tonumber(ARGV[1]), 2
for _, key in ipairs(KEYS) do
  local count = tonumber(ARGV[at])
  local top = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')
  local kind, floor, merged = string.match(top[1] or '', '^([brw])(%d+)(.*)$')
  if kind then
    for place = at + 1, at + count do redis.call('ZADD', key, ARGV[place], ARGV[place]) end
    if kind ~= 'b' and redis.call('ZCARD', key) > kept + kept / 10 + 1 then
      redis.call('ZREMRANGEBYRANK', key, 0, -(kept + 2))
      local lowest = redis.call('ZRANGE', key, 0, 0)[1]
      if lowest ~= top[1] and tonumber(lowest) > tonumber(floor) then
        redis.call('ZREM', key, top[1])
        redis.call('ZADD', key, top[2], 'r' .. lowest .. merged)
      end
    end
  end
  at = at + count + 1
end
return 1
";

/// The marker of a timeline; `None` if there is no timeline.
type Marked = Result<Option<Mark>, Unknown>;

/// Reason why the timelines' epoch could not be checked.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error(transparent)]
    Postgres(#[from] Error),
    #[error(transparent)]
    Redis(#[from] RedisError),
}

/// Changes timelines for the projection.
pub struct TimelineWriter {
    pool: PgPool,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    epoch: AtomicI64,
    failed: Mutex<Option<Instant>>,
    pending: Mutex<Vec<String>>,
    timeline_ids: usize,
    process: String,
}

impl TimelineWriter {
    pub fn new(
        pool: PgPool,
        key_prefix: &str,
        redis: watch::Receiver<Option<Redis>>,
        timeline_ids: usize,
    ) -> Arc<Self> {
        let (keys, process) = (Keys::new(key_prefix), Uuid::from_u128(fastrand::u128(..)).simple().to_string());
        let (epoch, failed, pending) = (AtomicI64::new(0), Mutex::default(), Mutex::default());
        // The builder of a timeline keeps as many ids.
        Arc::new(Self { pool, keys, redis, epoch, failed, pending, timeline_ids: timeline_ids + 1, process })
    }

    /// Adds posts to the timelines that exist. Call it after the rows are committed: the builder of
    /// a timeline sets its marker before it reads the rows.
    pub async fn add(&self, additions: Vec<(Owner, Vec<i64>)>) -> Result<(), Error> {
        for part in additions.chunks(TOGETHER) {
            let added = match self.redis() {
                Some(mut redis) => self.try_to_add(&mut redis, part).await,
                None => Err(absent()),
            };
            self.settle_or_raise(added).await?;
        }
        Ok(())
    }

    /// Removes a post from timelines.
    pub async fn remove(&self, owners: Vec<Owner>, post_id: i64) -> Result<(), Error> {
        let mut unknown = None;
        for part in owners.chunks(TOGETHER) {
            let removed = match self.redis() {
                Some(mut redis) => self.try_to_remove(&mut redis, part, post_id).await,
                None => Err(absent()),
            };
            let removed = removed.map(|found| unknown = unknown.take().or(found));
            self.settle_or_raise(removed).await?;
        }
        // Until that timeline can be read, the post stays in the `gone` list.
        unknown.map_or(Ok(()), |unknown| Err(unknown.into()))
    }

    /// Drops timelines; a build that is running starts over.
    pub async fn forget(&self, owners: Vec<Owner>) -> Result<(), Error> {
        for part in owners.chunks(TOGETHER) {
            let dropped = match self.redis() {
                Some(mut redis) => self.try_to_forget(&mut redis, part).await,
                None => Err(absent()),
            };
            self.settle_or_raise(dropped).await?;
        }
        Ok(())
    }

    /// Records that timelines are clean of a member of the `gone` list, which then expires after
    /// [`LINGER_MS`].
    pub async fn clean_of(&self, gone: String) {
        {
            let mut pending = self.pending();
            // A member without this expiry stays in the list until all timelines built before its
            // change have expired.
            if pending.len() < MAX_PENDING {
                pending.push(gone);
            }
        }
        let connected = self.redis();
        if let Some(mut redis) = connected
            && let Err(error) = self.expire_pending(&mut redis).await
        {
            tracing::debug!(error = %error, "tombstone expiry not stored in redis, retrying");
        }
    }

    /// Returns the members of the `gone` list that timelines are clean of and whose expiry is not
    /// in Redis yet.
    fn pending(&self) -> MutexGuard<'_, Vec<String>> {
        self.pending.lock()
    }

    async fn expire_pending(&self, redis: &mut Redis) -> Result<(), RedisError> {
        let clean = take(&mut *self.pending());
        if clean.is_empty() {
            return Ok(());
        }
        let until = clock::now_ms() + LINGER_MS;
        let mut add = command("ZADD", &self.keys.gone_until());
        clean.iter().for_each(|gone| {
            add.arg(until).arg(gone);
        });
        let stored = add.query_async::<()>(redis).await;
        if stored.is_err() {
            self.pending().extend(clean);
        }
        stored
    }

    fn redis(&self) -> Option<Redis> {
        let failed = *self.failed.lock();
        if failed.is_some_and(|failed| failed.elapsed() < COOL_DOWN) {
            return None;
        }
        self.redis.borrow().clone()
    }

    async fn settle_or_raise(&self, changed: Result<(), RedisError>) -> Result<(), Error> {
        let Err(error) = changed else { return Ok(()) };
        self.note_failure(&error);
        epoch::raise(&self.pool).await
    }

    fn note_failure(&self, error: &RedisError) {
        let mut failed = self.failed.lock();
        if failed.is_none_or(|failed| failed.elapsed() >= COOL_DOWN) {
            tracing::debug!(error = %error, "timelines not updated, raising their epoch");
            *failed = Some(Instant::now());
        }
    }

    /// Reads the markers of timelines in the epoch that Redis has. Returns `None` if Redis has no
    /// epoch.
    async fn marks(&self, redis: &mut Redis, owners: &[Owner]) -> Result<Option<(i64, Vec<Marked>)>, RedisError> {
        for _ in 0..ATTEMPTS {
            let epoch = self.epoch.load(Ordering::Relaxed);
            let mut commands = vec![command("GET", &self.keys.epoch())];
            commands.extend(owners.iter().map(|owner| {
                let mut top = command("ZREVRANGE", &self.keys.timeline(epoch, owner));
                top.arg(0).arg(0);
                top
            }));
            let mut answers = redis.ask(commands).await.into_iter();
            let Some(found) = number(&answers.next().unwrap_or(Ok(Value::Nil))?) else { return Ok(None) };
            if found == epoch {
                let marks = answers.map(|answer| answer.map(|value| mark(&members(value))));
                return Ok(Some((epoch, marks.collect::<Result<_, _>>()?)));
            }
            self.epoch.store(found, Ordering::Relaxed);
        }
        Err(too_fast())
    }

    async fn try_to_add(&self, redis: &mut Redis, additions: &[(Owner, Vec<i64>)]) -> Result<(), RedisError> {
        // A Cluster accepts only scripts whose keys are on one server.
        let of_script = if redis.is_cluster() { 1 } else { OF_SCRIPT };
        for _ in 0..ATTEMPTS {
            let epoch = self.epoch.load(Ordering::Relaxed);
            let mut commands = vec![command("GET", &self.keys.epoch())];
            commands.extend(additions.chunks(of_script).map(|part| self.addition(epoch, part)));
            let mut answers = redis.ask(commands).await.into_iter();
            let Some(found) = number(&answers.next().unwrap_or(Ok(Value::Nil))?) else { return Ok(()) };
            if found == epoch {
                return answers.collect::<Result<Vec<_>, _>>().map(|_| ());
            }
            // Additions to timelines of another epoch are harmless: nobody reads those timelines,
            // or they lack the posts, too.
            self.epoch.store(found, Ordering::Relaxed);
        }
        Err(too_fast())
    }

    fn addition(&self, epoch: i64, additions: &[(Owner, Vec<i64>)]) -> Cmd {
        let mut add = redis::cmd("EVAL");
        add.arg(ADD).arg(additions.len());
        additions.iter().for_each(|(owner, _)| {
            add.arg(self.keys.timeline(epoch, owner));
        });
        add.arg(self.timeline_ids);
        for (_, ids) in additions {
            add.arg(ids.len()).arg(ids);
        }
        add
    }

    /// Removes a post from timelines. Returns one marker that cannot be read, if there was any; its
    /// timeline is left unchanged.
    async fn try_to_remove(
        &self,
        redis: &mut Redis,
        owners: &[Owner],
        post_id: i64,
    ) -> Result<Option<Unknown>, RedisError> {
        let Some((epoch, marks)) = self.marks(redis, owners).await? else { return Ok(None) };
        let (mut commands, mut unknown) = (Vec::new(), None);
        for (owner, mark) in owners.iter().zip(marks) {
            let key = self.keys.timeline(epoch, owner);
            match mark {
                Ok(None) => {}
                // The builder may have read the post before it was deleted.
                Ok(Some(Mark::Building(_))) => commands.push(command("DEL", &key)),
                Ok(Some(Mark::Ready { .. })) => {
                    let mut remove = command("ZREM", &key);
                    remove.arg(post_id);
                    commands.push(remove);
                }
                Err(found) => unknown = Some(found),
            }
        }
        if !commands.is_empty() {
            redis.ask(commands).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        }
        Ok(unknown)
    }

    async fn try_to_forget(&self, redis: &mut Redis, owners: &[Owner]) -> Result<(), RedisError> {
        let Some((epoch, _)) = self.marks(redis, &[]).await? else { return Ok(()) };
        let commands = owners.iter().map(|owner| command("DEL", &self.keys.timeline(epoch, owner))).collect();
        redis.ask(commands).await.into_iter().collect::<Result<Vec<_>, _>>().map(|_| ())
    }

    /// Keeps timelines valid: checks forever that Redis has the epoch of Postgres, and that Redis
    /// has not lost writes.
    pub async fn keep_forever(self: Arc<Self>) {
        let mut beat = 0;
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let connected = self.redis.borrow().clone();
            let Some(mut redis) = connected else { continue };
            if let Err(problem) = self.check(&mut redis, &mut beat).await {
                tracing::debug!(%problem, "timeline epoch check failed, retrying");
            }
        }
    }

    async fn check(&self, redis: &mut Redis, beat: &mut i64) -> Result<(), CheckError> {
        let in_postgres = sqlx::query_scalar("SELECT epoch FROM feed_timelines").fetch_one(&self.pool);
        let mut in_postgres: i64 = within(in_postgres).await?;
        let own = self.keys.beat(&self.process);
        let mut answers = redis.ask(vec![command("GET", &self.keys.epoch()), command("GET", &own)]).await.into_iter();
        let mut next = || answers.next().unwrap_or(Ok(Value::Nil)).map(|answer| number(&answer));
        let (in_redis, found_beat) = (next()?, next()?);
        let went_back = *beat > 0 && found_beat.is_none_or(|found| found < *beat);
        // Timelines of an epoch that Redis has lost, or whose writes it has lost, may lack posts.
        if went_back || in_redis.is_none_or(|in_redis| in_redis > in_postgres) {
            let raise = "UPDATE feed_timelines SET epoch = greatest(epoch, $1) + 1 RETURNING epoch";
            let raise = sqlx::query_scalar(raise).bind(in_redis.unwrap_or(0)).fetch_one(&self.pool);
            in_postgres = within(raise).await?;
            counter!("postrider_feed_epochs_raised_total").increment(1);
            tracing::info!(epoch = in_postgres, "redis lost data, rebuilding all timelines");
        }
        if in_redis.is_none_or(|in_redis| in_redis < in_postgres) {
            let script = Script::new(VOUCH);
            let mut vouch = script.key(self.keys.epoch());
            if let Err(error) = vouch.arg(in_postgres).invoke_async::<()>(redis).await {
                // A server that has no memory for the epoch accepts this. Without an epoch, feeds
                // are read from Postgres.
                let _ = command("DEL", &self.keys.epoch()).query_async::<()>(redis).await;
                return Err(error.into());
            }
        }
        gauge!("postrider_feed_timelines_epoch").set(in_postgres as f64);
        *beat += 1;
        let mut set = command("SET", &own);
        set.arg(*beat).arg("EX").arg(600);
        redis.ask(vec![set]).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        self.expire_pending(redis).await?;
        Ok(self.remove_expired(redis).await?)
    }

    /// Removes expired members from the `gone` list.
    async fn remove_expired(&self, redis: &mut Redis) -> Result<(), RedisError> {
        let mut due = command("ZRANGEBYSCORE", &self.keys.gone_until());
        due.arg("-inf").arg(clock::now_ms()).arg("LIMIT").arg(0).arg(TOGETHER);
        let due: Vec<String> = due.query_async(redis).await?;
        if due.is_empty() {
            return Ok(());
        }
        for key in [self.keys.gone(), self.keys.gone_until()] {
            let mut remove = command("ZREM", &key);
            remove.arg(&due);
            remove.query_async::<()>(redis).await?;
        }
        Ok(())
    }
}

fn too_fast() -> RedisError {
    RedisError::from((redis::ErrorKind::Client, "the epoch of timelines changed during every attempt"))
}

fn absent() -> RedisError {
    RedisError::from((redis::ErrorKind::Io, "Redis is not connected, or failed less than a second ago"))
}

fn command(name: &str, key: &str) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(key);
    command
}
