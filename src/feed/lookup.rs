//! Reads of timelines, many in one go: while some questions are on their way to Redis, others come, and go together.
//! There are two such ways, so that this process works on answers while Redis works on questions.
//!
//! Each time the epoch and the version of the list of what is gone come along, so that no answer is of timelines that
//! are out of date, and none has a post whose deletion was answered before.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use redis::{Cmd, RedisError, Value};
use tokio::sync::{mpsc, oneshot, watch};

use super::timeline::{Keys, List, Mark, Owner, ids, mark, members, number};
use crate::platform::{gather::gather, redis::Redis};

/// Reads that are asked together at most, to bound what one answer holds.
const MAX_TOGETHER: usize = 256;
/// Reads that wait to be asked on one way; beyond it, requests wait to get here.
const QUEUE: usize = 2_048;
/// Ids asked for beyond a page, while some posts are gone.
const SPARE: usize = 8;
/// How often a read is asked again because the epoch has moved.
const ATTEMPTS: usize = 3;
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
pub struct Lookups {
    ways: [mpsc::Sender<Asked>; 2],
    turn: AtomicUsize,
}

impl Lookups {
    /// The second half asks; see [`Asking::until_closed`].
    pub fn new(keys: &Keys, redis: &watch::Receiver<Option<Redis>>) -> (Self, [Asking; 2]) {
        let way = || {
            let (sender, questions) = mpsc::channel(QUEUE);
            (sender, Asking { questions, keys: keys.clone(), redis: redis.clone(), epoch: 0, gone: Gone::default() })
        };
        let [(first, one), (second, other)] = [way(), way()];
        (Self { ways: [first, second], turn: AtomicUsize::new(0) }, [one, other])
    }

    /// Asks; bounded by the time that Redis has for an answer, each time.
    pub async fn ask(&self, question: Question) -> Sight {
        let (answer, sight) = oneshot::channel();
        let way = &self.ways[self.turn.fetch_add(1, Ordering::Relaxed) % self.ways.len()];
        if way.send(Asked { question, answer }).await.is_err() {
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
        let unusable = || vec![Sight::Unusable; asked.len()];
        let connected = self.redis.borrow().clone();
        let Some(mut redis) = connected else { return unusable() };
        for _ in 0..ATTEMPTS {
            match self.try_to_see(&mut redis, asked).await {
                Ok(Some(sights)) => return sights,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(error = %error, "timelines cannot be read");
                    return unusable();
                }
            }
        }
        unusable()
    }

    /// `None` when the epoch was another one.
    async fn try_to_see(&mut self, redis: &mut Redis, asked: &[Asked]) -> Result<Option<Vec<Sight>>, RedisError> {
        let mut commands = Vec::with_capacity(asked.len() + 2);
        commands.push(command("GET", &self.keys.epoch()));
        commands.push(command("GET", &self.keys.gone_version()));
        let spare = self.spare();
        for Asked { question, .. } in asked {
            let (key, count) = (self.keys.timeline(self.epoch, &question.owner), question.count + spare);
            let Some(before) = question.before else {
                let mut range = command("ZREVRANGE", &key);
                range.arg(0).arg(count);
                commands.push(range);
                continue;
            };
            let mut top = command("ZREVRANGE", &key);
            top.arg(0).arg(0);
            let mut below = command("ZREVRANGEBYSCORE", &key);
            below.arg(format!("({before}")).arg("-inf").arg("LIMIT").arg(0).arg(count);
            commands.extend([top, below]);
        }
        let mut answers = redis.ask(commands).await.into_iter();
        let mut next = || answers.next().unwrap_or(Ok(Value::Nil));
        let (epoch, version) = (number(&next()?), number(&next()?).unwrap_or(0));
        let Some(epoch) = epoch else { return Ok(Some(vec![Sight::Unusable; asked.len()])) };
        if epoch != self.epoch {
            self.epoch = epoch;
            return Ok(None);
        }
        let mut found = Vec::with_capacity(asked.len());
        for Asked { question, .. } in asked {
            let top = members(next()?);
            let below = if question.before.is_some() { Some(members(next()?)) } else { None };
            found.push((top, below));
        }
        // What came to the list before this version is known from here on.
        self.gone.follow(redis, &self.keys, version).await?;
        let sights = asked.iter().zip(found);
        Ok(Some(sights.map(|(asked, (top, below))| self.sight(&asked.question, spare, &top, below)).collect()))
    }

    fn spare(&self) -> usize {
        if self.gone.posts.is_empty() { 0 } else { SPARE }
    }

    fn sight(&self, question: &Question, spare: usize, top: &[Value], below: Option<Vec<Value>>) -> Sight {
        if matches!(&question.owner, Owner::User(user) if self.gone.users.contains(user)) {
            return Sight::Unusable;
        }
        match mark(top) {
            None => Sight::Absent { epoch: self.epoch, gone: self.gone.posts.clone() },
            Some(Mark::Building(_)) => Sight::Unusable,
            Some(Mark::Ready { floor, whole, merged }) => {
                let found = below.map_or_else(|| ids(&top[1..]), |below| ids(&below));
                let mut list = List::new(found, question.count + spare, floor, whole);
                if !self.gone.posts.is_empty() {
                    list.ids.retain(|id| !self.gone.posts.contains(id));
                }
                Sight::Ready { epoch: self.epoch, list, merged }
            }
        }
    }
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
            match member.split_at_checked(1) {
                Some(("p", id)) => Arc::make_mut(&mut self.posts).extend(id.parse::<i64>()),
                Some(("u", user)) => {
                    self.users.insert(user.to_owned());
                }
                _ => {}
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
