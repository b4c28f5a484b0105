//! Timelines in Redis, as the projection keeps them: it adds to those that exist, takes out of them, and drops them.
//! Where Redis could not be told something, the epoch is raised in Postgres, and all timelines are of the past.

use std::{
    mem::take,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use redis::{Cmd, RedisError, Script, Value};
use sqlx::PgPool;
use tokio::sync::watch;
use uuid::Uuid;

use super::protocol::{Keys, LINGER_MS, Mark, Owner, mark, members, number};
use crate::platform::{
    clock,
    query::{Error, within},
    redis::Redis,
    unknown::Unknown,
};

/// Timelines of one round trip at most.
const TOGETHER: usize = 1_000;
/// After a failure Redis is not asked for so long, so that rows don't wait for its timeouts.
const SPARED: Duration = Duration::from_secs(1);
/// Between two looks at the epoch.
const LOOK: Duration = Duration::from_secs(1);
/// Timelines of one script, so that others don't wait long for it.
const OF_SCRIPT: usize = 200;
/// Of what timelines are clean, at most, while Redis cannot be told.
const MAX_UNSAID: usize = 100_000;
/// How often additions are made again because the epoch has moved.
const ATTEMPTS: usize = 3;

/// KEYS: epoch. ARGV: what it is to be at least.
const VOUCH: &str = r"
if (tonumber(redis.call('GET', KEYS[1])) or 0) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
";

/// KEYS: timelines. ARGV: how many ids stay of each; for each timeline how many ids come, and those. Adds where there is a
/// marker. What is too long is cut, a tenth at a time: below the last of them there may be single ids later, which came late.
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

/// A timeline's marker, where there is a timeline.
type Marked = Result<Option<Mark>, Unknown>;

/// What the projection does to timelines.
pub struct TimelineWriter {
    pool: PgPool,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    epoch: AtomicI64,
    failed: Mutex<Option<Instant>>,
    unsaid: Mutex<Vec<String>>,
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
        let (epoch, failed, unsaid) = (AtomicI64::new(0), Mutex::default(), Mutex::default());
        // As many as its builder keeps.
        Arc::new(Self { pool, keys, redis, epoch, failed, unsaid, timeline_ids: timeline_ids + 1, process })
    }

    /// Adds posts to the timelines that exist. To be called after the rows are committed: who builds a
    /// timeline sets its marker before reading them.
    pub async fn add(&self, additions: Vec<(Owner, Vec<i64>)>) -> Result<(), Error> {
        for part in additions.chunks(TOGETHER) {
            let told = match self.redis() {
                Some(mut redis) => self.try_to_add(&mut redis, part).await,
                None => Err(absent()),
            };
            self.settle_or_raise(told).await?;
        }
        Ok(())
    }

    /// Takes a post out of timelines.
    pub async fn remove(&self, owners: Vec<Owner>, post_id: i64) -> Result<(), Error> {
        let mut unknown = None;
        for part in owners.chunks(TOGETHER) {
            let told = match self.redis() {
                Some(mut redis) => self.try_to_remove(&mut redis, part, post_id).await,
                None => Err(absent()),
            };
            let removed = told.map(|found| unknown = unknown.take().or(found));
            self.settle_or_raise(removed).await?;
        }
        // Until it can be read, the post stays in the list of what is gone.
        unknown.map_or(Ok(()), |unknown| Err(unknown.into()))
    }

    /// Drops timelines; whoever builds one now starts over.
    pub async fn forget(&self, owners: Vec<Owner>) -> Result<(), Error> {
        for part in owners.chunks(TOGETHER) {
            let told = match self.redis() {
                Some(mut redis) => self.try_to_forget(&mut redis, part).await,
                None => Err(absent()),
            };
            self.settle_or_raise(told).await?;
        }
        Ok(())
    }

    /// Timelines are clean of this: the list of what is gone may forget it in a while.
    pub async fn clean_of(&self, gone: String) {
        {
            let mut unsaid = self.unsaid();
            // What is not said stays in the list for as long as a timeline that was there before.
            if unsaid.len() < MAX_UNSAID {
                unsaid.push(gone);
            }
        }
        let connected = self.redis();
        if let Some(mut redis) = connected
            && let Err(error) = self.say_clean(&mut redis).await
        {
            tracing::debug!(error = %error, "said again with the next look what timelines are clean of");
        }
    }

    /// What timelines are clean of, and Redis was not told yet.
    fn unsaid(&self) -> MutexGuard<'_, Vec<String>> {
        self.unsaid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn say_clean(&self, redis: &mut Redis) -> Result<(), RedisError> {
        let clean = take(&mut *self.unsaid());
        if clean.is_empty() {
            return Ok(());
        }
        let until = clock::now_ms() + LINGER_MS;
        let mut add = command("ZADD", &self.keys.gone_until());
        clean.iter().for_each(|gone| {
            add.arg(until).arg(gone);
        });
        let said = add.query_async::<()>(redis).await;
        if said.is_err() {
            self.unsaid().extend(clean);
        }
        said
    }

    fn redis(&self) -> Option<Redis> {
        let failed = *self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some_and(|failed| failed.elapsed() < SPARED) {
            return None;
        }
        self.redis.borrow().clone()
    }

    async fn settle_or_raise(&self, told: Result<(), RedisError>) -> Result<(), Error> {
        let Err(error) = told else { return Ok(()) };
        self.spare(&error);
        let raise = sqlx::query("UPDATE feed_timelines SET epoch = epoch + 1");
        counter!("postrider_feed_epochs_raised_total").increment(1);
        within(raise.execute(&self.pool)).await.map(|_| ())
    }

    fn spare(&self, error: &RedisError) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none_or(|failed| failed.elapsed() >= SPARED) {
            tracing::debug!(error = %error, "timelines were not told; they are made anew");
            *failed = Some(Instant::now());
        }
    }

    /// Markers of timelines, in the epoch that Redis has; `None` while nobody vouches for any.
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
        // A Cluster takes scripts with keys of one server only.
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
            // What went to timelines of another epoch does no harm there: nobody reads them, or they lack it, too.
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

    /// Returns what one of the timelines said that cannot be read, if any did; that one is left alone.
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
                // Its builder may have read the post before it was deleted.
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

    /// Vouches for timelines: Redis has the epoch that Postgres has, and did not go back to what it was.
    pub async fn keep_forever(self: Arc<Self>) {
        let mut beat = 0;
        loop {
            tokio::time::sleep(LOOK).await;
            let connected = self.redis.borrow().clone();
            let Some(mut redis) = connected else { continue };
            if let Err(problem) = self.look(&mut redis, &mut beat).await {
                tracing::debug!(problem, "the epoch of timelines could not be looked at");
            }
        }
    }

    async fn look(&self, redis: &mut Redis, beat: &mut i64) -> Result<(), String> {
        let in_postgres = sqlx::query_scalar("SELECT epoch FROM feed_timelines").fetch_one(&self.pool);
        let mut in_postgres: i64 = within(in_postgres).await.map_err(|error| error.to_string())?;
        let own = self.keys.beat(&self.process);
        let mut answers = redis.ask(vec![command("GET", &self.keys.epoch()), command("GET", &own)]).await.into_iter();
        let mut next = || {
            let answer = answers.next().unwrap_or(Ok(Value::Nil)).map_err(|error| error.to_string())?;
            Ok::<_, String>(number(&answer))
        };
        let (in_redis, found_beat) = (next()?, next()?);
        let went_back = *beat > 0 && found_beat.is_none_or(|found| found < *beat);
        // The number that Redis has lost, or went back from, may have timelines that lack something.
        if went_back || in_redis.is_none_or(|in_redis| in_redis > in_postgres) {
            let raise = "UPDATE feed_timelines SET epoch = greatest(epoch, $1) + 1 RETURNING epoch";
            let raise = sqlx::query_scalar(raise).bind(in_redis.unwrap_or(0)).fetch_one(&self.pool);
            in_postgres = within(raise).await.map_err(|error| error.to_string())?;
            counter!("postrider_feed_epochs_raised_total").increment(1);
            tracing::info!(epoch = in_postgres, "Redis lacks something: all timelines are made anew");
        }
        if in_redis.is_none_or(|in_redis| in_redis < in_postgres) {
            let script = Script::new(VOUCH);
            let mut vouch = script.key(self.keys.epoch());
            if let Err(error) = vouch.arg(in_postgres).invoke_async::<()>(redis).await {
                // A server that lacks memory for the number takes this: without an epoch, feeds are read from Postgres.
                let _ = command("DEL", &self.keys.epoch()).query_async::<()>(redis).await;
                return Err(error.to_string());
            }
        }
        gauge!("postrider_feed_timelines_epoch").set(in_postgres as f64);
        *beat += 1;
        let mut set = command("SET", &own);
        set.arg(*beat).arg("EX").arg(600);
        redis.ask(vec![set]).await.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
        self.say_clean(redis).await.map_err(|error| error.to_string())?;
        self.tidy(redis).await.map_err(|error| error.to_string())
    }

    /// Forgets what timelines have been clean of for long enough.
    async fn tidy(&self, redis: &mut Redis) -> Result<(), RedisError> {
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
    RedisError::from((redis::ErrorKind::Client, "the epoch of timelines moves too fast"))
}

fn absent() -> RedisError {
    RedisError::from((redis::ErrorKind::Io, "Redis is not connected, or failed just now"))
}

fn command(name: &str, key: &str) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(key);
    command
}
