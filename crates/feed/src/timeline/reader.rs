//! Batched reads of timelines: questions that arrive while a round trip to Redis is under way share
//! the next one.
//!
//! Every round trip also reads the epoch and the version of the `gone` list, so that no answer
//! comes from outdated timelines, and none has a post whose deletion was answered before. Often
//! these two are all that is read: timelines that are read repeatedly are in the [`NearCache`].

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use postrider_microbatch::{Batches, Queue, Request, queue};
use postrider_redis::{Config, Redis, tracking};
use postrider_telemetry::unknown::Unknown;
use redis::{Cmd, RedisError, Value};
use tokio::sync::watch;

use super::{
    epoch::NewestEpoch,
    near_cache::{NearCache, Source, Timeline},
    protocol::{Keys, List, Mark, Owner, ids, mark, members, number},
};

/// Maximum number of questions per round trip, which bounds the size of a response.
const MAX_TOGETHER: usize = 256;
/// Maximum number of queued questions; further requests wait for a free slot.
const QUEUE: usize = 2_048;
/// Number of extra ids to read beyond a page while there are deleted posts.
const SPARE: usize = 8;
/// Maximum number of attempts per question. An attempt fails if the epoch has changed, a cached
/// timeline has changed, or the connection broke.
const ATTEMPTS: usize = 4;
/// Interval at which the whole `gone` list is loaded, to drop expired members.
const RELOAD: Duration = Duration::from_secs(30);

/// A question about a timeline.
#[derive(Debug, Clone)]
pub struct Question {
    pub owner: Owner,
    /// Only ids below this one.
    pub before: Option<i64>,
    /// Maximum number of ids; the answer may have a few more.
    pub count: usize,
}

/// The state of a timeline in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    Ready {
        epoch: i64,
        list: List,
        merged: Vec<String>,
    },
    /// The timeline does not exist. Building it requires the epoch, and must leave out the deleted
    /// posts in `gone`.
    Absent {
        epoch: i64,
        gone: Arc<HashSet<i64>>,
    },
    /// Redis is not reachable, or its timeline must not be used at the moment.
    Unusable,
}

type Asked = Request<Question, Sight>;

/// Sends questions to the task that asks Redis.
pub struct TimelineReader {
    questions: Queue<Question, Sight>,
}

impl TimelineReader {
    /// Creates a reader with a near cache of this number of timelines, and its task; run the task
    /// with [`Asking::until_closed`].
    pub fn new(
        config: &Config,
        redis: watch::Receiver<Option<Redis>>,
        newest: Arc<NewestEpoch>,
        timelines: usize,
    ) -> (Self, Asking) {
        let keys = Keys::new(&config.key_prefix);
        let (sender, questions) = queue(QUEUE);
        let asking = Asking {
            questions,
            redis,
            newest,
            near_cache: NearCache::new(config.clone(), keys.clone(), timelines),
            keys,
            epoch: 0,
            gone: Gone::default(),
        };
        (Self { questions: sender }, asking)
    }

    /// Asks a question. The wait is bounded by the response timeout of Redis, for each attempt.
    pub async fn ask(&self, question: Question) -> Sight {
        self.questions.ask(question).await.unwrap_or(Sight::Unusable)
    }
}

/// The task that asks Redis.
pub struct Asking {
    questions: Batches<Question, Sight>,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    newest: Arc<NewestEpoch>,
    near_cache: NearCache,
    epoch: i64,
    gone: Gone,
}

/// The `gone` list at a version.
#[derive(Debug, Default)]
struct Gone {
    version: i64,
    posts: Arc<HashSet<i64>>,
    users: HashSet<String>,
    loaded: Option<Instant>,
}

impl Asking {
    /// Runs until the [`TimelineReader`] is dropped.
    pub async fn until_closed(mut self) {
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while self.questions.next(&mut together, MAX_TOGETHER).await {
            let sights = self.answer(&together).await;
            for (asked, sight) in together.drain(..).zip(sights) {
                asked.answer(sight);
            }
        }
    }

    async fn answer(&mut self, asked: &[Asked]) -> Vec<Sight> {
        let mut sights = vec![None; asked.len()];
        for _ in 0..ATTEMPTS {
            let own = self.near_cache.connection();
            let is_own = own.is_some();
            let Some(mut redis) = own.or_else(|| self.redis.borrow().clone()) else { break };
            match self.try_to_answer(&mut redis, asked, &mut sights).await {
                Ok(()) if sights.iter().all(Option::is_some) => break,
                Ok(()) => {}
                Err(error) => {
                    tracing::debug!(error = %error, "timeline read from redis failed");
                    if is_own {
                        self.near_cache.disconnect();
                    }
                    // On the other connection, a server that does not answer would take as long
                    // again.
                    if !is_own || error.is_timeout() {
                        break;
                    }
                }
            }
        }
        sights.into_iter().map(|sight| sight.unwrap_or(Sight::Unusable)).collect()
    }

    /// Answers questions in one round trip. Questions that must be asked again stay `None`.
    async fn try_to_answer(
        &mut self,
        redis: &mut Redis,
        asked: &[Asked],
        sights: &mut [Option<Sight>],
    ) -> Result<(), RedisError> {
        let spare = self.spare();
        let mut commands = vec![command("GET", &self.keys.epoch()), command("GET", &self.keys.gone_version())];
        let mut open = Vec::with_capacity(asked.len());
        for (place, Request { question, .. }) in asked.iter().enumerate().filter(|(place, _)| sights[*place].is_none())
        {
            let source = self.near_cache.source(&question.owner);
            open.push((place, source));
            self.add_commands(&mut commands, question, source, spare);
        }
        let mut answers = redis.ask(commands).await.into_iter();
        let mut next = || answers.next().unwrap_or(Ok(Value::Nil));
        let (epoch, version) = (number(&next()?), number(&next()?).unwrap_or(0));
        let Some(epoch) = epoch else {
            sights.fill(Some(Sight::Unusable));
            return Ok(());
        };
        if epoch != self.epoch {
            self.epoch = epoch;
            self.near_cache.forget_all();
            return Ok(());
        }
        if !self.newest.is_reached_by(epoch) {
            sights.fill(Some(Sight::Unusable));
            return Ok(());
        }
        let mut pages = Vec::with_capacity(open.len());
        for (place, source) in &open {
            let Request { question, .. } = &asked[*place];
            let (top, below) = match source {
                Source::Memory => continue,
                Source::Page if question.before.is_some() => (members(next()?), Some(members(next()?))),
                Source::Page => (members(next()?), None),
                Source::Whole => {
                    next()?;
                    (members(next()?), None)
                }
            };
            pages.push((*place, *source, top, below));
        }
        // After this, all members that the list had at this version are known.
        self.gone.follow(redis, &self.keys, version).await?;
        let count = (open.len() - pages.len()) as u64;
        counter!("postrider_feed_timeline_reads_total", "from" => "redis").increment(pages.len() as u64);
        counter!("postrider_feed_timeline_reads_total", "from" => "memory").increment(count);
        for (place, source, top, below) in pages {
            let question = &asked[place].question;
            sights[place] = Some(match mark(&top) {
                _ if self.is_distrusted(&question.owner) => Sight::Unusable,
                Ok(None) => Sight::Absent { epoch, gone: self.gone.posts.clone() },
                // A timeline that this version cannot read must not be replaced either.
                Err(_) | Ok(Some(Mark::Building(_))) => Sight::Unusable,
                Ok(Some(Mark::Ready { floor, whole, merged })) if source == Source::Whole => {
                    let timeline = Timeline::new(ids(&top[1..]), floor, whole, merged);
                    let sight = part(&timeline, question, epoch, &self.gone.posts);
                    self.near_cache.keep(question.owner.clone(), timeline);
                    sight
                }
                Ok(Some(Mark::Ready { floor, whole, merged })) => {
                    let found = below.map_or_else(|| ids(&top[1..]), |below| ids(&below));
                    let mut list = List::new(found, question.count + spare, floor, whole);
                    list.ids.retain(|id| !self.gone.posts.contains(id));
                    Sight::Ready { epoch, list, merged }
                }
            });
        }
        // Changes are followed only now: a timeline that was just read may have changed already,
        // and is then dropped.
        self.near_cache.follow_changes(epoch);
        for (place, _) in open.iter().filter(|(_, source)| *source == Source::Memory) {
            let question = &asked[*place].question;
            let distrusted = self.is_distrusted(&question.owner);
            let Some(timeline) = self.near_cache.get(&question.owner) else { continue };
            sights[*place] =
                Some(if distrusted { Sight::Unusable } else { part(timeline, question, epoch, &self.gone.posts) });
        }
        Ok(())
    }

    fn add_commands(&self, commands: &mut Vec<Cmd>, question: &Question, source: Source, spare: usize) {
        if source == Source::Memory {
            return;
        }
        let key = self.keys.timeline(self.epoch, &question.owner);
        let mut top = command("ZREVRANGE", &key);
        top.arg(0);
        match (source, question.before) {
            (Source::Whole, _) => {
                top.arg(-1);
                commands.extend([tracking::next(), top]);
            }
            (_, None) => {
                top.arg(question.count + spare);
                commands.push(top);
            }
            (_, Some(before)) => {
                top.arg(0);
                let mut below = command("ZREVRANGEBYSCORE", &key);
                below.arg(format!("({before}")).arg("-inf").arg("LIMIT").arg(0).arg(question.count + spare);
                commands.extend([top, below]);
            }
        }
    }

    fn spare(&self) -> usize {
        if self.gone.posts.is_empty() { 0 } else { SPARE }
    }

    /// Returns whether the owner unfollowed somebody a moment ago.
    fn is_distrusted(&self, owner: &Owner) -> bool {
        matches!(owner, Owner::User(user) if self.gone.users.contains(user))
    }
}

/// Answers a question from a complete timeline.
fn part(timeline: &Timeline, question: &Question, epoch: i64, gone: &HashSet<i64>) -> Sight {
    let list = timeline.list(question.before, question.count, |id| gone.contains(&id));
    Sight::Ready { epoch, list, merged: timeline.merged.clone() }
}

impl Gone {
    /// Loads the members that were added up to this version, or the whole list.
    async fn follow(&mut self, redis: &mut Redis, keys: &Keys, version: i64) -> Result<(), RedisError> {
        let fresh = self.loaded.is_some_and(|loaded| loaded.elapsed() < RELOAD);
        if fresh && version == self.version {
            return Ok(());
        }
        let from = if fresh && version > self.version {
            format!("({}", self.version)
        } else {
            *self = Self { loaded: Some(Instant::now()), ..Self::default() };
            "-inf".to_owned()
        };
        let mut range = command("ZRANGEBYSCORE", &keys.gone());
        range.arg(from).arg("+inf");
        let members: Vec<String> = match range.query_async(redis).await {
            Ok(members) => members,
            Err(error) => {
                self.loaded = None;
                return Err(error);
            }
        };
        for member in members {
            let (kind, rest) = member.split_at_checked(1).unwrap_or_default();
            match (kind, rest.parse()) {
                ("p", Ok(id)) => {
                    Arc::make_mut(&mut self.posts).insert(id);
                }
                ("u", _) => {
                    self.users.insert(rest.to_owned());
                }
                _ => {
                    Unknown::new("member of the list of what is gone", &member);
                }
            }
        }
        self.version = version;
        Ok(())
    }
}

fn command(name: &str, key: &str) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(key);
    command
}
