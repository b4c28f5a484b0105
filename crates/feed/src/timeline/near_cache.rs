//! Near cache: timelines in the memory of this process, for as long as Redis reports no change. A
//! reader asks Redis for the epoch before it answers from the cache, so that every change made
//! before that is known when the answer arrives.

use std::{
    collections::{HashMap, hash_map::RandomState},
    fmt::Display,
    hash::BuildHasher,
    mem::take,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use postrider_redis::{
    Config, Redis,
    tracking::{Changes, Tracking},
};
use redis::RedisError;
use tokio::task::JoinHandle;

use super::protocol::{Keys, List, Owner};

/// Minimum time between two attempts to connect.
const RECONNECT: Duration = Duration::from_secs(1);
/// Number of slots that remember requested timelines, per timeline that may be cached.
const SLOTS: usize = 4;

/// A complete timeline, as Redis has it.
#[derive(Debug)]
pub struct Timeline {
    /// Post ids, newest first.
    pub ids: Vec<i64>,
    pub floor: i64,
    pub whole: bool,
    pub merged: Vec<String>,
    /// True if the timeline has answered a question since it was read.
    used: bool,
}

impl Timeline {
    pub fn new(ids: Vec<i64>, floor: i64, whole: bool, merged: Vec<String>) -> Self {
        Self { ids, floor, whole, merged, used: false }
    }

    /// Returns a part of the timeline without deleted posts.
    pub fn list(&self, before: Option<i64>, count: usize, is_deleted: impl Fn(i64) -> bool) -> List {
        let from = before.map_or(0, |before| self.ids.partition_point(|&id| id >= before));
        let ids = self.ids[from..].iter().copied().filter(|&id| !is_deleted(id)).take(count);
        List::new(ids.collect(), count, self.floor, self.whole)
    }
}

/// The way to read a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From memory, if Redis reports no change.
    Memory,
    /// From Redis, only the requested part.
    Page,
    /// From Redis, completely and to be cached, because the timeline is requested repeatedly.
    Whole,
}

enum Link {
    Down(Option<Instant>),
    Connecting(JoinHandle<Result<Tracking, RedisError>>),
    Up(Tracking),
}

/// The cached timelines, and the connection on which Redis reports changes.
pub struct NearCache {
    /// `None` if the near cache is off.
    config: Option<Config>,
    link: Link,
    keys: Keys,
    kept: Generations,
    seen: Seen,
}

impl NearCache {
    /// Creates a cache of at most this number of timelines.
    pub fn new(config: Config, keys: Keys, timelines: usize) -> Self {
        let config = Some(config).filter(|config| timelines > 0 && !config.cluster);
        let slots = if config.is_some() { timelines * SLOTS } else { 0 };
        Self { config, link: Link::Down(None), keys, kept: Generations::new(timelines), seen: Seen::new(slots) }
    }

    /// Returns the connection on which Redis reports changes. Without one, connects in the
    /// background and returns `None`.
    pub fn connection(&mut self) -> Option<Redis> {
        let config = self.config.as_ref()?;
        match &mut self.link {
            Link::Up(tracking) => return Some(tracking.redis.clone()),
            Link::Down(failed) if failed.is_none_or(|failed| failed.elapsed() > RECONNECT) => {
                let config = config.clone();
                self.link = Link::Connecting(tokio::spawn(async move { Tracking::connect(&config).await }));
            }
            Link::Down(_) => {}
            Link::Connecting(connecting) => match connecting.now_or_never() {
                None => {}
                Some(Ok(Ok(tracking))) => {
                    let redis = tracking.redis.clone();
                    self.link = Link::Up(tracking);
                    return Some(redis);
                }
                Some(Ok(Err(error))) => self.wait_after(&error),
                Some(Err(error)) => self.wait_after(&error),
            },
        }
        None
    }

    fn wait_after(&mut self, error: &dyn Display) {
        tracing::debug!(%error, "near cache cannot connect to redis, retrying");
        self.link = Link::Down(Some(Instant::now()));
    }

    /// Drops the connection and all timelines, because changes during the interruption are unknown.
    pub fn disconnect(&mut self) {
        self.link = Link::Down(Some(Instant::now()));
        self.kept.clear();
    }

    /// Drops all timelines, because they belong to another epoch.
    pub fn forget_all(&mut self) {
        self.kept.clear();
    }

    pub fn source(&mut self, owner: &Owner) -> Source {
        if !matches!(self.link, Link::Up(_)) {
            Source::Page
        } else if self.kept.has(owner) {
            Source::Memory
        } else if self.seen.mark(owner) {
            Source::Whole
        } else {
            Source::Page
        }
    }

    pub fn keep(&mut self, owner: Owner, timeline: Timeline) {
        self.kept.insert(owner, timeline);
    }

    /// Drops timelines that have changed. Call it after the answer to a question has arrived and
    /// the timelines in it are cached.
    pub fn follow_changes(&mut self, epoch: i64) {
        let Link::Up(tracking) = &self.link else { return };
        match tracking.changes() {
            Changes::All => self.kept.clear(),
            Changes::Of(keys) => {
                for owner in keys.iter().filter_map(|key| self.keys.owner(epoch, key)) {
                    // A timeline that changes more often than it is read is not worth caching.
                    if self.kept.remove(&owner).is_some_and(|timeline| !timeline.used) {
                        self.seen.forget(&owner);
                    }
                }
            }
        }
    }

    pub fn get(&mut self, owner: &Owner) -> Option<&Timeline> {
        self.kept.get(owner)
    }
}

/// Timelines by owner, in two generations. When the young one is full it becomes the old one, and
/// the old timelines that were not requested since are dropped.
struct Generations {
    young: HashMap<Owner, Timeline>,
    old: HashMap<Owner, Timeline>,
    half: usize,
}

impl Generations {
    fn new(most: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (most / 2).max(1) }
    }

    fn has(&self, owner: &Owner) -> bool {
        self.young.contains_key(owner) || self.old.contains_key(owner)
    }

    fn get(&mut self, owner: &Owner) -> Option<&Timeline> {
        if let Some((owner, timeline)) = self.old.remove_entry(owner) {
            self.insert(owner, timeline);
        }
        let timeline = self.young.get_mut(owner)?;
        timeline.used = true;
        Some(timeline)
    }

    fn insert(&mut self, owner: Owner, timeline: Timeline) {
        if self.young.len() >= self.half {
            self.old = take(&mut self.young);
        }
        self.young.insert(owner, timeline);
    }

    fn remove(&mut self, owner: &Owner) -> Option<Timeline> {
        let old = self.old.remove(owner);
        self.young.remove(owner).or(old)
    }

    fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

/// Owners whose timelines were requested recently; an owner may displace another one.
struct Seen {
    slots: Box<[u32]>,
    state: RandomState,
}

impl Seen {
    fn new(slots: usize) -> Self {
        Self { slots: vec![0; slots].into_boxed_slice(), state: RandomState::new() }
    }

    /// Marks an owner's timeline as requested. Returns whether it was marked before.
    fn mark(&mut self, owner: &Owner) -> bool {
        let Some((slot, mark)) = self.slot(owner) else { return false };
        std::mem::replace(slot, mark) == mark
    }

    fn forget(&mut self, owner: &Owner) {
        if let Some((slot, _)) = self.slot(owner) {
            *slot = 0;
        }
    }

    fn slot(&mut self, owner: &Owner) -> Option<(&mut u32, u32)> {
        let hash = self.state.hash_one(owner);
        let index = (hash as usize).checked_rem(self.slots.len())?;
        Some((&mut self.slots[index], (hash >> 32) as u32 | 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(number: usize) -> Owner {
        Owner::User(format!("u{number}"))
    }

    fn timeline(ids: &[i64], floor: i64) -> Timeline {
        Timeline::new(ids.to_vec(), floor, false, Vec::new())
    }

    #[test]
    fn the_cache_keeps_its_bound_and_the_timelines_that_are_read() {
        let mut kept = Generations::new(10);
        for number in 0..100 {
            kept.insert(owner(number), timeline(&[1], 0));
            assert!(kept.get(&owner(0)).is_some(), "{number}");
            assert!(kept.young.len() + kept.old.len() <= 10);
        }
        assert!(kept.get(&owner(50)).is_none());
        assert!(kept.remove(&owner(0)).is_some() && !kept.has(&owner(0)));
    }

    #[test]
    fn a_second_request_is_recognised_until_the_owner_is_forgotten() {
        let mut seen = Seen::new(1_000);
        assert!(!seen.mark(&owner(1)) && seen.mark(&owner(1)));
        seen.forget(&owner(1));
        assert!(!seen.mark(&owner(1)));
        assert!(!Seen::new(0).mark(&owner(1)));
    }

    #[test]
    fn a_part_omits_deleted_posts_and_has_the_floor_of_the_timeline() {
        let kept = timeline(&[9, 7, 5, 3, 2], 3);
        assert_eq!(kept.list(None, 2, |id| id == 9), List::new(vec![7, 5], 2, 3, false));
        assert_eq!(kept.list(Some(7), 2, |_| false), List::new(vec![5, 3], 2, 3, false));
        let all = kept.list(None, 9, |_| false);
        assert_eq!((all.ids, all.floor), (vec![9, 7, 5, 3], 3));
    }
}
