//! Feeds as they are read: out of Redis where it has them; else out of Postgres, a bounded number at a time, and what
//! was read there is kept in Redis.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, join_all},
};
use metrics::{Counter, counter};
use redis::Script;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use super::{
    Config,
    reads::{Head, Reads},
    timeline::{Asking, Question, Sight, TimelineReader},
    timeline::{BUILD_MS, Keys, List, MARK_SCORE, Mark, Owner, merge},
};
use crate::platform::{
    clock,
    http::{Code, Problem},
    query::Error,
    redis::{Config as RedisConfig, Redis},
};

/// Time to wait for a turn to read Postgres.
const TURN: Duration = Duration::from_secs(3);

/// KEYS: timeline. ARGV: marker, its score, how long it may stand in ms. 1 where there was nothing, or ids without a
/// marker, as an addition leaves them that comes just after the end of a timeline's time.
const BEGIN: &str = r"
local top = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if top[2] and tonumber(top[2]) >= tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
";

/// KEYS: timeline. ARGV: the builder's marker, their score, the marker that takes its place, how long the timeline lives in
/// ms, how many ids, then ids. What was added meanwhile stays, where there is room for it. An empty timeline lives for a
/// minute at most: its user may be one that somebody has made up.
const FILL: &str = r"
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
for at = 6, #ARGV do redis.call('ZADD', KEYS[1], ARGV[at], ARGV[at]) end
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[5])
if over > 0 then redis.call('ZREMRANGEBYRANK', KEYS[1], 0, over - 1) end
local marker = ARGV[3]
local floor, merged = string.match(marker, '^%a(%d+)(.*)$')
local lowest = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
if over > 0 and tonumber(lowest) > tonumber(floor) then marker = 'r' .. lowest .. merged end
redis.call('ZADD', KEYS[1], ARGV[2], marker)
local ms = tonumber(ARGV[4])
if redis.call('ZCARD', KEYS[1]) < 2 then ms = math.min(ms, 60000) end
redis.call('PEXPIRE', KEYS[1], ms)
return 1
";

/// KEYS: list, version, until. ARGV: now and the time at which members go at the latest, in ms, then members. A list that
/// is new must not have an old one's version.
const NOTE: &str = r"
local version = redis.call('INCR', KEYS[2])
if version == 1 then
  version = tonumber(ARGV[1])
  redis.call('SET', KEYS[2], ARGV[1])
end
for at = 3, #ARGV do
  redis.call('ZADD', KEYS[1], version, ARGV[at])
  redis.call('ZADD', KEYS[3], ARGV[2], ARGV[at])
end
return version
";

/// Where a page begins.
#[derive(Debug, Clone, Copy)]
pub enum Start {
    /// After so many of the newest.
    Offset(usize),
    /// Below this id.
    Before(i64),
}

/// A page of a feed.
#[derive(Debug)]
pub struct Page {
    pub ids: Vec<i64>,
    pub more: bool,
    /// Whether Redis had all of it.
    pub hit: bool,
}

/// A part of a timeline.
struct Part {
    list: List,
    /// Of which timeline in Redis, with its epoch; `None` where it was only now made.
    kept: Option<(i64, Owner)>,
}

/// What came of a flight; errors are shared as their sentence.
type BuildResult = Result<Arc<Head>, String>;
type SharedBuild = Shared<BoxFuture<'static, BuildResult>>;

/// Cheap to clone.
#[derive(Clone)]
pub struct Feeds {
    inner: Arc<Inner>,
}

struct Inner {
    reads: Reads,
    lookups: TimelineReader,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    turns: Semaphore,
    /// Timelines that are being filled, for all who want them.
    builds: Mutex<HashMap<Owner, SharedBuild>>,
    counters: Counters,
    config: Config,
}

/// Looked up once: pages are what is read most.
struct Counters {
    hits: Counter,
    misses: Counter,
    bypasses: Counter,
}

impl Counters {
    fn new() -> Self {
        let counter = |cache| counter!("postrider_feed_reads_total", "cache" => cache);
        Self { hits: counter("hit"), misses: counter("miss"), bypasses: counter("bypass") }
    }
}

impl Feeds {
    pub fn new(
        config: Config,
        reads: Reads,
        redis_config: &RedisConfig,
        redis: watch::Receiver<Option<Redis>>,
    ) -> (Self, Asking) {
        let keys = Keys::new(&redis_config.key_prefix);
        let (lookups, asking) = TimelineReader::new(redis_config, redis.clone(), config.timelines_in_memory);
        let turns = Semaphore::new(config.max_postgres_reads.clamp(1, 1_000));
        let inner =
            Inner { reads, lookups, keys, redis, turns, builds: Mutex::default(), counters: Counters::new(), config };
        (Self { inner: Arc::new(inner) }, asking)
    }

    pub fn reads(&self) -> &Reads {
        &self.inner.reads
    }

    /// A page of a user's feed.
    pub async fn page(&self, user_id: &str, start: Start, limit: usize) -> Result<Page, Problem> {
        if let Some(page) = self.cached(user_id, start, limit).await? {
            let Counters { hits, misses, .. } = &self.inner.counters;
            if page.hit { hits } else { misses }.increment(1);
            return Ok(page);
        }
        self.inner.counters.bypasses.increment(1);
        let (before, skip) = match start {
            Start::Offset(skip) => (i64::MAX, skip),
            Start::Before(before) => (before, 0),
        };
        let _turn = self.inner.turn().await?;
        let ids =
            self.inner.reads.page(user_id, before, skip + limit + 1).await.map_err(|error| unreachable(&error))?;
        let more = ids.len() > skip + limit;
        Ok(Page { ids: ids.into_iter().skip(skip).take(limit).collect(), more, hit: false })
    }

    /// Out of timelines, which are filled where there are none. `None` when they do not reach so far, or cannot be used.
    async fn cached(&self, user_id: &str, start: Start, limit: usize) -> Result<Option<Page>, Problem> {
        let (before, skip) = match start {
            Start::Offset(skip) => (None, skip),
            Start::Before(before) => (Some(before), 0),
        };
        if skip + limit > self.inner.config.timeline_ids {
            return Ok(None);
        }
        let count = skip + limit + 1;
        let own = self.part(Owner::User(user_id.to_owned()), before, count).await?;
        let Some((own, merged)) = own else { return Ok(None) };
        let mut parts = vec![own];
        let others = merged.into_iter().map(|author| self.part(Owner::Author(author), before, count));
        for other in join_all(others).await {
            let Some((part, _)) = other? else { return Ok(None) };
            parts.push(part);
        }
        let hit = parts.iter().all(|part| part.kept.is_some());
        let (mut lists, kept): (Vec<List>, Vec<_>) = parts.into_iter().map(|part| (part.list, part.kept)).unzip();
        let page = merge(&mut lists, skip, limit);
        if page.is_none() && before.is_none() {
            self.inner.drop_short(&lists, kept).await;
        }
        Ok(page.map(|(ids, more)| Page { ids, more, hit }))
    }

    /// A part of a timeline, and whose else belongs to it.
    async fn part(
        &self,
        owner: Owner,
        before: Option<i64>,
        count: usize,
    ) -> Result<Option<(Part, Vec<String>)>, Problem> {
        let question = Question { owner: owner.clone(), before, count };
        match self.inner.lookups.ask(question).await {
            Sight::Ready { epoch, list, merged } => Ok(Some((Part { list, kept: Some((epoch, owner)) }, merged))),
            Sight::Unusable => Ok(None),
            Sight::Absent { epoch, gone } => {
                let head = self.build_once(owner, epoch).await?;
                let ids = head.ids.iter().copied().filter(|&id| before.is_none_or(|before| id < before));
                let (floor, whole) = head.floor(self.inner.kept());
                let mut list = List::new(ids.take(count).collect(), count, floor, whole);
                // The flight may have begun before they went.
                list.ids.retain(|id| !gone.contains(id));
                Ok(Some((Part { list, kept: None }, head.merged.clone())))
            }
        }
    }

    /// Fills a timeline, once for all who ask for it meanwhile.
    async fn build_once(&self, owner: Owner, epoch: i64) -> Result<Arc<Head>, Problem> {
        let flight = {
            let mut builds = self.inner.builds.lock().unwrap_or_else(PoisonError::into_inner);
            // What nobody waits for any more is begun anew.
            builds.retain(|_, flight| flight.peek().is_none() && flight.strong_count().is_some_and(|count| count > 1));
            builds
                .entry(owner.clone())
                .or_insert_with(|| {
                    let inner = self.inner.clone();
                    async move { inner.build(owner, epoch).await }.boxed().shared()
                })
                .clone()
        };
        flight.await.map_err(|detail| Problem::new(Code::PostgresUnavailable, detail))
    }

    /// Notes what timelines may be wrong about, before the change is answered. Where Redis cannot be reached,
    /// readers cannot reach it either, and what they may still see is mended by the projection.
    pub async fn note_gone(&self, members: impl IntoIterator<Item = String>) {
        let connected = self.inner.redis.borrow().clone();
        let Some(mut redis) = connected else { return };
        let keys = &self.inner.keys;
        let script = Script::new(NOTE);
        let mut note = script.key(keys.gone());
        // By then no timeline is left that was made before.
        let (now_ms, twice) = (clock::now_ms(), 2 * self.inner.config.timeline_ttl_ms);
        note.key(keys.gone_version()).key(keys.gone_until()).arg(now_ms).arg(now_ms.saturating_add_unsigned(twice));
        members.into_iter().for_each(|member| {
            note.arg(member);
        });
        if let Err(error) = note.invoke_async::<()>(&mut redis).await {
            tracing::warn!(error = %error, "timelines were not told of a deletion; the projection tells them");
        }
    }
}

impl Inner {
    /// Ids of a timeline: one more than pages reach, to tell whether there are more.
    fn kept(&self) -> usize {
        self.config.timeline_ids + 1
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Problem> {
        let busy = || Problem::new(Code::TooManyReads, "feeds are read from Postgres, and too many wait for that");
        tokio::time::timeout(TURN, self.turns.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())
    }

    /// Timelines that end before the page does: what they held was deleted. Whoever asks next makes them anew.
    async fn drop_short(&self, lists: &[List], kept: Vec<Option<(i64, Owner)>>) {
        let connected = self.redis.borrow().clone();
        let Some(mut redis) = connected else { return };
        let floor = lists.iter().map(|list| list.floor).max();
        let short = lists.iter().zip(kept).filter(|(list, _)| Some(list.floor) == floor);
        let drops = short.filter_map(|(_, kept)| {
            let (epoch, owner) = kept?;
            Some(redis::cmd("DEL").arg(self.keys.timeline(epoch, &owner)).to_owned())
        });
        for dropped in redis.ask(drops.collect()).await {
            if let Err(error) = dropped {
                tracing::debug!(error = %error, "a timeline that is too short was not dropped");
            }
        }
    }

    async fn build(&self, owner: Owner, epoch: i64) -> BuildResult {
        let _turn = self.turn().await.map_err(|problem| problem.detail)?;
        counter!("postrider_feed_timelines_built_total").increment(1);
        let token = Mark::Building(fastrand::u64(..)).encode();
        let key = self.keys.timeline(epoch, &owner);
        // The marker first: what is fanned out from now on is added to it.
        let begun = self.begin(&key, &token).await;
        let limit = self.kept();
        let head = match &owner {
            Owner::User(user) => self.reads.head(user, limit).await,
            Owner::Author(author) => {
                self.reads.of_author(author, limit).await.map(|ids| Head { ids, merged: Vec::new(), end: 0 })
            }
        };
        let head = head.map_err(|error| error.to_string())?;
        if begun {
            self.fill(&key, &token, &head).await;
        }
        Ok(Arc::new(head))
    }

    async fn begin(&self, key: &str, token: &str) -> bool {
        let connected = self.redis.borrow().clone();
        let Some(mut redis) = connected else { return false };
        let script = Script::new(BEGIN);
        let mut begin = script.key(key);
        begin.arg(token).arg(MARK_SCORE).arg(BUILD_MS);
        begin.invoke_async::<i64>(&mut redis).await.is_ok_and(|made| made == 1)
    }

    async fn fill(&self, key: &str, token: &str, head: &Head) {
        let connected = self.redis.borrow().clone();
        let Some(mut redis) = connected else { return };
        let (floor, whole) = head.floor(self.kept());
        let ready = Mark::Ready { floor, whole, merged: head.merged.clone() };
        let script = Script::new(FILL);
        let mut fill = script.key(key);
        fill.arg(token).arg(MARK_SCORE).arg(ready.encode());
        fill.arg(self.config.timeline_ttl().as_millis() as u64).arg(self.kept());
        head.ids.iter().for_each(|id| {
            fill.arg(id);
        });
        if let Err(error) = fill.invoke_async::<()>(&mut redis).await {
            tracing::debug!(error = %error, "a timeline was not kept");
        }
    }
}

/// What is said when Postgres cannot be read.
pub fn unreachable(error: &Error) -> Problem {
    Problem::new(Code::PostgresUnavailable, error.to_string())
}
