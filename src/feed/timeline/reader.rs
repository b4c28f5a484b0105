//! Reads of timelines, many in one go: while some questions are on their way to Redis, others come, and go together.
//!
//! Each time the epoch and the version of the list of what is gone come along, so that no answer is of timelines that
//! are out of date, and none has a post whose deletion was answered before. Often that is all: timelines that are read
//! again and again are kept in memory, see [`NearCache`].

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use redis::{Cmd, RedisError, Value};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    near_cache::{NearCache, Source, Timeline},
    protocol::{Keys, List, Mark, Owner, ids, mark, members, number},
};
use crate::platform::{
    gather::gather,
    redis::{Config, Redis},
    tracking,
    unknown::Unknown,
};

/// Reads that are asked together at most, to bound what one answer holds.
const MAX_TOGETHER: usize = 256;
/// Reads that wait to be asked; beyond it, requests wait to get here.
const QUEUE: usize = 2_048;
/// Ids asked for beyond a page, while some posts are gone.
const SPARE: usize = 8;
/// How often a read is asked again because the epoch has moved, what was in memory changed, or the connection broke.
const ATTEMPTS: usize = 4;
/// Between two looks at the whole list of what is gone, to forget what is no longer in it.
const RELOAD: Duration = Duration::from_secs(30);

/// What is asked of a timeline.
#[derive(Debug, Clone)]
pub struct Question {
    pub owner: Owner,
    /// Only ids below this one.
    pub before: Option<i64>,
    /// Ids at most; a few more may come.
    pub count: usize,
}

/// What Redis has of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    Ready {
        epoch: i64,
        list: List,
        merged: Vec<String>,
    },
    /// There is none. Who wants to make one needs the epoch, and must leave out posts that are gone.
    Absent {
        epoch: i64,
        gone: Arc<HashSet<i64>>,
    },
    /// Redis cannot be asked, or what it has must not be used now.
    Unusable,
}

struct Asked {
    question: Question,
    answer: oneshot::Sender<Sight>,
}

/// Where questions are put.
pub struct TimelineReader {
    questions: mpsc::Sender<Asked>,
}

impl TimelineReader {
    /// Keeps so many timelines in memory. The second half asks; see [`Asking::until_closed`].
    pub fn new(config: &Config, redis: watch::Receiver<Option<Redis>>, timelines: usize) -> (Self, Asking) {
        let keys = Keys::new(&config.key_prefix);
        let (sender, questions) = mpsc::channel(QUEUE);
        let local = NearCache::new(config.clone(), keys.clone(), timelines);
        (Self { questions: sender }, Asking { questions, keys, redis, local, epoch: 0, gone: Gone::default() })
    }

    /// Asks; bounded by the time that Redis has for an answer, each time.
    pub async fn ask(&self, question: Question) -> Sight {
        let (answer, sight) = oneshot::channel();
        if self.questions.send(Asked { question, answer }).await.is_err() {
            return Sight::Unusable;
        }
        sight.await.unwrap_or(Sight::Unusable)
    }
}

/// The task that asks Redis.
pub struct Asking {
    questions: mpsc::Receiver<Asked>,
    keys: Keys,
    redis: watch::Receiver<Option<Redis>>,
    local: NearCache,
    epoch: i64,
    gone: Gone,
}

/// The list of what is gone, as it was at a version.
#[derive(Debug, Default)]
struct Gone {
    version: i64,
    posts: Arc<HashSet<i64>>,
    users: HashSet<String>,
    loaded: Option<Instant>,
}

impl Asking {
    /// Runs until nobody is left who could ask.
    pub async fn until_closed(mut self) {
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while gather(&mut self.questions, &mut together, MAX_TOGETHER).await {
            let sights = self.see(&together).await;
            for (asked, sight) in together.drain(..).zip(sights) {
                // Who went away meanwhile needs no answer.
                let _ = asked.answer.send(sight);
            }
        }
    }

    async fn see(&mut self, asked: &[Asked]) -> Vec<Sight> {
        let mut sights = vec![None; asked.len()];
        for _ in 0..ATTEMPTS {
            let own = self.local.connection();
            let is_own = own.is_some();
            let Some(mut redis) = own.or_else(|| self.redis.borrow().clone()) else { break };
            match self.try_to_see(&mut redis, asked, &mut sights).await {
                Ok(()) if sights.iter().all(Option::is_some) => break,
                Ok(()) => {}
                Err(error) => {
                    tracing::debug!(error = %error, "timelines cannot be read");
                    if is_own {
                        self.local.disconnect();
                    }
                    // Over the other connection a server that does not answer would take as long again.
                    if !is_own || error.is_timeout() {
                        break;
                    }
                }
            }
        }
        sights.into_iter().map(|sight| sight.unwrap_or(Sight::Unusable)).collect()
    }

    /// Leaves open what must be asked once more.
    async fn try_to_see(
        &mut self,
        redis: &mut Redis,
        asked: &[Asked],
        sights: &mut [Option<Sight>],
    ) -> Result<(), RedisError> {
        let spare = self.spare();
        let mut commands = vec![command("GET", &self.keys.epoch()), command("GET", &self.keys.gone_version())];
        let mut open = Vec::with_capacity(asked.len());
        for (place, Asked { question, .. }) in asked.iter().enumerate().filter(|(place, _)| sights[*place].is_none()) {
            let source = self.local.source(&question.owner);
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
            self.local.forget_all();
            return Ok(());
        }
        let mut pages = Vec::with_capacity(open.len());
        for (place, source) in &open {
            let Asked { question, .. } = &asked[*place];
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
        // What came to the list before this version is known from here on.
        self.gone.follow(redis, &self.keys, version).await?;
        let count = (open.len() - pages.len()) as u64;
        counter!("postrider_feed_timeline_reads_total", "from" => "redis").increment(pages.len() as u64);
        counter!("postrider_feed_timeline_reads_total", "from" => "memory").increment(count);
        for (place, source, top, below) in pages {
            let question = &asked[place].question;
            sights[place] = Some(match mark(&top) {
                _ if self.is_distrusted(&question.owner) => Sight::Unusable,
                Ok(None) => Sight::Absent { epoch, gone: self.gone.posts.clone() },
                // What this version cannot read is not replaced either.
                Err(_) | Ok(Some(Mark::Building(_))) => Sight::Unusable,
                Ok(Some(Mark::Ready { floor, whole, merged })) if source == Source::Whole => {
                    let timeline = Timeline::new(ids(&top[1..]), floor, whole, merged);
                    let sight = part(&timeline, question, epoch, &self.gone.posts);
                    self.local.keep(question.owner.clone(), timeline);
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
        // Only now: what was read just now may have changed already, and is then not kept.
        self.local.follow_changes(epoch);
        for (place, _) in open.iter().filter(|(_, source)| *source == Source::Memory) {
            let question = &asked[*place].question;
            let distrusted = self.is_distrusted(&question.owner);
            let Some(timeline) = self.local.get(&question.owner) else { continue };
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

    /// Who unfollowed somebody a moment ago.
    fn is_distrusted(&self, owner: &Owner) -> bool {
        matches!(owner, Owner::User(user) if self.gone.users.contains(user))
    }
}

/// What a question gets of a timeline that is here as a whole.
fn part(timeline: &Timeline, question: &Question, epoch: i64, gone: &HashSet<i64>) -> Sight {
    let list = timeline.list(question.before, question.count, |id| gone.contains(&id));
    Sight::Ready { epoch, list, merged: timeline.merged.clone() }
}

impl Gone {
    /// Learns what came up to this version, or all of it anew.
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
