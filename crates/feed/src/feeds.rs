//! Reads of feeds: from Redis if it has the timelines, otherwise from Postgres with bounded
//! concurrency. Timelines read from Postgres are stored in Redis.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, join_all},
};
use metrics::{Counter, counter};
use parking_lot::Mutex;
use postrider_http::{Code, Problem};
use postrider_redis::{Config as RedisConfig, Redis};
use postrider_time::clock;
use redis::{RedisError, Script};
use sqlx::PgPool;
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::Instant,
};

use super::{
    Config,
    reads::{Head, Reads},
    timeline::{Asking, Question, Sight, TimelineReader},
    timeline::{BUILD_MS, Keys, List, MARK_SCORE, Mark, NewestEpoch, Owner, Raises, SEEN_AFTER, merge},
};
use crate::codes;

/// Maximum time that a read waits for a permit to read Postgres.
const TURN: Duration = Duration::from_secs(3);

/// Time within which what is gone is noted in Redis, before the epoch of all timelines is raised:
/// a connection that broke is back by then.
const NOTE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that one attempt may take.
const NOTE_ATTEMPT: Duration = Duration::from_millis(500);
const NOTE_RETRY: Duration = Duration::from_millis(20);

/// Sets a builder's marker. KEYS: timeline. ARGV: marker, its score, TTL in ms. Returns 1 if there
/// was no timeline, or only ids without a marker: an addition that arrives just after a timeline
/// expired leaves such ids.
const BEGIN: &str = r"
local top = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if top[2] and tonumber(top[2]) >= tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
";

/// Fills a timeline. KEYS: timeline. ARGV: the builder's marker, the score of markers, the marker
/// that replaces it, TTL of the timeline in ms, maximum number of ids, then ids. Ids that were
/// added in between are kept as far as the maximum allows. The TTL of an empty timeline is at most
/// a minute, because a client may have made up its user.
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

/// Adds members to the `gone` list. KEYS: list, version, until. ARGV: the current time and the
/// latest time at which the members expire, in ms, then members. A new list starts with the current
/// time as its version, so that it never has a version of an earlier list.
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

/// Start of a page.
#[derive(Debug, Clone, Copy)]
pub enum Start {
    /// After this number of newest posts.
    Offset(usize),
    /// Below this post id.
    Before(i64),
}

/// A page of a feed.
#[derive(Debug)]
pub struct Page {
    pub ids: Vec<i64>,
    pub more: bool,
    /// True if Redis had all of the page.
    pub hit: bool,
}

/// A part of a timeline.
struct Part {
    list: List,
    /// Epoch and owner of the timeline in Redis that the part was read from; `None` if the timeline
    /// was just built.
    kept: Option<(i64, Owner)>,
}

/// Result of a single-flight build; an error is shared as its text.
type BuildResult = Result<Arc<Head>, String>;
type SharedBuild = Shared<BoxFuture<'static, BuildResult>>;

/// Reads feeds. Cheap to clone.
#[derive(Clone)]
pub struct Feeds {
    inner: Arc<Inner>,
}

struct Inner {
    reads: Reads,
    pool: PgPool,
    raises: Raises,
    /// Time at which something that is gone was last not noted.
    note_failed: Mutex<Option<Instant>>,
    lookups: TimelineReader,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    turns: Semaphore,
    /// Single-flight builds of timelines that are running.
    builds: Mutex<HashMap<Owner, SharedBuild>>,
    counters: Counters,
    config: Config,
}

/// Counters of reads, looked up once because pages are read most.
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
        pool: PgPool,
        newest: Arc<NewestEpoch>,
        redis_config: &RedisConfig,
        redis: watch::Receiver<Option<Redis>>,
    ) -> (Self, Asking) {
        let keys = Keys::new(&redis_config.key_prefix);
        let (lookups, asking) = TimelineReader::new(redis_config, redis.clone(), newest, config.timelines_in_memory);
        let turns = Semaphore::new(config.max_postgres_reads.clamp(1, 1_000));
        let inner = Inner {
            reads: Reads::new(pool.clone()),
            pool,
            raises: Raises::default(),
            note_failed: Mutex::default(),
            lookups,
            keys,
            redis,
            turns,
            builds: Mutex::default(),
            counters: Counters::new(),
            config,
        };
        (Self { inner: Arc::new(inner) }, asking)
    }

    pub fn reads(&self) -> &Reads {
        &self.inner.reads
    }

    /// Reads a page of a user's feed.
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
            self.inner.reads.page(user_id, before, skip + limit + 1).await.map_err(Problem::postgres_unavailable)?;
        let more = ids.len() > skip + limit;
        Ok(Page { ids: ids.into_iter().skip(skip).take(limit).collect(), more, hit: false })
    }

    /// Reads a page from timelines and builds missing ones. Returns `None` if the timelines do not
    /// reach far enough or cannot be used.
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

    /// Reads a part of a timeline. Also returns the authors whose timelines must be merged into it.
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
                // The build may have started before these posts were deleted.
                list.ids.retain(|id| !gone.contains(id));
                Ok(Some((Part { list, kept: None }, head.merged.clone())))
            }
        }
    }

    /// Builds a timeline once for all concurrent readers.
    async fn build_once(&self, owner: Owner, epoch: i64) -> Result<Arc<Head>, Problem> {
        let build = {
            let mut builds = self.inner.builds.lock();
            // A build that no reader waits for any more is started again.
            builds.retain(|_, build| build.peek().is_none() && build.strong_count().is_some_and(|count| count > 1));
            builds
                .entry(owner.clone())
                .or_insert_with(|| {
                    let inner = self.inner.clone();
                    async move { inner.build(owner, epoch).await }.boxed().shared()
                })
                .clone()
        };
        build.await.map_err(|detail| Problem::new(Code::POSTGRES_UNAVAILABLE, detail))
    }

    /// Records what timelines may not reflect yet, before the change is answered. If Redis cannot
    /// be reached, timelines become obsolete; see [`NewestEpoch`]. Continues if the client gives up.
    pub async fn note_gone(&self, members: impl IntoIterator<Item = String>) {
        let (inner, members) = (self.inner.clone(), members.into_iter().collect());
        let noting = tokio::spawn(async move { inner.note_gone(members).await });
        if noting.await.is_err() {
            tracing::error!("noting what is gone failed");
        }
    }
}

impl Inner {
    /// Returns the maximum number of ids in a timeline: one more than pages reach, to detect
    /// whether there are more.
    fn kept(&self) -> usize {
        self.config.timeline_ids + 1
    }

    async fn note_gone(&self, members: Vec<String>) {
        // While Redis is away, each request tries only once.
        let is_away = self.note_failed.lock().is_some_and(|failed| failed.elapsed() < NOTE_TIMEOUT);
        let until = Instant::now() + if is_away { Duration::ZERO } else { NOTE_TIMEOUT };
        let error = loop {
            let noted = tokio::time::timeout(NOTE_ATTEMPT, self.try_to_note_gone(&members)).await;
            let error = match noted {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "Redis does not answer".to_owned(),
            };
            if Instant::now() >= until {
                break error;
            }
            tokio::time::sleep(NOTE_RETRY).await;
        };
        *self.note_failed.lock() = Some(Instant::now());
        tracing::warn!(error, "redis does not know what is gone, raising the epoch of timelines");
        if self.raises.raise(&self.pool).await {
            tokio::time::sleep(SEEN_AFTER).await;
        }
    }

    async fn try_to_note_gone(&self, members: &[String]) -> Result<(), RedisError> {
        let connected = self.redis.borrow().clone();
        let mut redis = connected.ok_or_else(|| RedisError::from((redis::ErrorKind::Io, "Redis is not connected")))?;
        let script = Script::new(NOTE);
        let mut note = script.key(self.keys.gone());
        // By then every timeline that was built before the change has expired.
        let (now_ms, twice) = (clock::now_ms(), 2 * self.config.timeline_ttl_ms);
        note.key(self.keys.gone_version()).key(self.keys.gone_until()).arg(now_ms);
        note.arg(now_ms.saturating_add_unsigned(twice)).arg(members);
        note.invoke_async::<()>(&mut redis).await
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Problem> {
        let busy = || Problem::new(codes::TOO_MANY_READS, "too many feed reads wait for Postgres; retry later");
        tokio::time::timeout(TURN, self.turns.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())
    }

    /// Drops the timelines that end before the page does because their posts were deleted. The next
    /// read builds them again.
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
                tracing::debug!(error = %error, "failed to drop a short timeline");
            }
        }
    }

    async fn build(&self, owner: Owner, epoch: i64) -> BuildResult {
        let _turn = self.turn().await.map_err(|problem| problem.detail)?;
        counter!("postrider_feed_timelines_built_total").increment(1);
        let token = Mark::Building(fastrand::u64(..)).encode();
        let key = self.keys.timeline(epoch, &owner);
        // The marker is set first, so that posts that are fanned out from now on are added to the
        // timeline.
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
            tracing::debug!(error = %error, "failed to store a timeline");
        }
    }
}
