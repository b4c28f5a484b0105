//! Timelines that this process keeps in memory, for as long as Redis says that they have not changed. Whoever answers out
//! of them has asked Redis for the epoch first: what changed before that is known when the answer comes.

use std::{
    collections::{HashMap, hash_map::RandomState},
    fmt::Display,
    hash::BuildHasher,
    mem::take,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use redis::RedisError;
use tokio::task::JoinHandle;

use super::protocol::{Keys, List, Owner};
use crate::platform::{
    redis::{Config, Redis},
    tracking::{Changes, Tracking},
};

/// Between two attempts to connect.
const RECONNECT: Duration = Duration::from_secs(1);
/// Slots to remember whose timelines were asked for, for each timeline that may be kept.
const SLOTS: usize = 4;

/// A timeline as it is in Redis.
#[derive(Debug)]
pub struct Timeline {
    /// Newest first.
    pub ids: Vec<i64>,
    pub floor: i64,
    pub whole: bool,
    pub merged: Vec<String>,
    /// Whether it has answered anything since it was read.
    used: bool,
}

impl Timeline {
    pub fn new(ids: Vec<i64>, floor: i64, whole: bool, merged: Vec<String>) -> Self {
        Self { ids, floor, whole, merged, used: false }
    }

    /// A part of it, without what is gone.
    pub fn list(&self, before: Option<i64>, count: usize, is_gone: impl Fn(i64) -> bool) -> List {
        let from = before.map_or(0, |before| self.ids.partition_point(|&id| id >= before));
        let ids = self.ids[from..].iter().copied().filter(|&id| !is_gone(id)).take(count);
        List::new(ids.collect(), count, self.floor, self.whole)
    }
}

/// How a timeline is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Not at all, when nothing has changed.
    Memory,
    /// As much as is asked for.
    Page,
    /// All of it, to be kept: it is asked for again and again.
    Whole,
}

enum Link {
    Down(Option<Instant>),
    Connecting(JoinHandle<Result<Tracking, RedisError>>),
    Up(Tracking),
}

/// Those kept, and the connection that says what has changed.
pub struct NearCache {
    /// `None` when nothing is to be kept.
    config: Option<Config>,
    link: Link,
    keys: Keys,
    kept: Generations,
    seen: Seen,
}

impl NearCache {
    /// Keeps so many timelines at most.
    pub fn new(config: Config, keys: Keys, timelines: usize) -> Self {
        let config = Some(config).filter(|config| timelines > 0 && !config.cluster);
        let slots = if config.is_some() { timelines * SLOTS } else { 0 };
        Self { config, link: Link::Down(None), keys, kept: Generations::new(timelines), seen: Seen::new(slots) }
    }

    /// The connection that says what has changed, where there is one; else it is made in the background.
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
        tracing::debug!(%error, "no timelines are kept in memory");
        self.link = Link::Down(Some(Instant::now()));
    }

    /// After a break nothing is known to be unchanged.
    pub fn disconnect(&mut self) {
        self.link = Link::Down(Some(Instant::now()));
        self.kept.clear();
    }

    /// Timelines of another epoch are of the past.
    pub fn forget_all(&mut self) {
        self.kept.clear();
    }

    pub fn source(&mut self, owner: &Owner) -> Source {
        if !matches!(self.link, Link::Up(_)) {
            Source::Page
        } else if self.kept.has(owner) {
            Source::Memory
        } else if self.seen.again(owner) {
            Source::Whole
        } else {
            Source::Page
        }
    }

    pub fn keep(&mut self, owner: Owner, timeline: Timeline) {
        self.kept.insert(owner, timeline);
    }

    /// Forgets what has changed. To be called when the answer to a question is there, and what came with it is kept.
    pub fn follow_changes(&mut self, epoch: i64) {
        let Link::Up(tracking) = &self.link else { return };
        match tracking.changes() {
            Changes::All => self.kept.clear(),
            Changes::Of(keys) => {
                for owner in keys.iter().filter_map(|key| self.keys.owner(epoch, key)) {
                    // What changes more often than it is read is not worth being kept.
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

/// Timelines by their owners. When one half is full, those of the other that nobody asked for meanwhile go.
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

/// Whose timelines were asked for lately, as far as they did not displace one another.
struct Seen {
    slots: Box<[u32]>,
    state: RandomState,
}

impl Seen {
    fn new(slots: usize) -> Self {
        Self { slots: vec![0; slots].into_boxed_slice(), state: RandomState::new() }
    }

    /// Whether it was asked for before; from now on it was.
    fn again(&mut self, owner: &Owner) -> bool {
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
        let place = (hash as usize).checked_rem(self.slots.len())?;
        Some((&mut self.slots[place], (hash >> 32) as u32 | 1))
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
    fn no_more_are_kept_than_there_is_room_for_and_those_asked_for_stay() {
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
    fn who_is_asked_for_twice_is_seen_until_forgotten() {
        let mut seen = Seen::new(1_000);
        assert!(!seen.again(&owner(1)) && seen.again(&owner(1)));
        seen.forget(&owner(1));
        assert!(!seen.again(&owner(1)));
        assert!(!Seen::new(0).again(&owner(1)));
    }

    #[test]
    fn a_part_lacks_what_is_gone_and_says_how_far_it_reaches() {
        let kept = timeline(&[9, 7, 5, 3, 2], 3);
        assert_eq!(kept.list(None, 2, |id| id == 9), List::new(vec![7, 5], 2, 3, false));
        assert_eq!(kept.list(Some(7), 2, |_| false), List::new(vec![5, 3], 2, 3, false));
        let all = kept.list(None, 9, |_| false);
        assert_eq!((all.ids, all.floor), (vec![9, 7, 5, 3], 3));
    }
}
