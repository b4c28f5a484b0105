//! Who is connected to this process, and what of that Redis has not been told yet.
//!
//! States are kept rather than a sequence of joins and leaves: so it is bounded by the receivers themselves,
//! and what could not be written is simply written later.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::script::{Known, Outcome, Update};

pub struct LocalConnections {
    linger: Duration,
    state: Mutex<State>,
    /// There is something to tell.
    pub changed: Notify,
    /// Something was told.
    told: Notify,
}

#[derive(Default)]
struct State {
    receivers: HashMap<Arc<str>, Entry>,
    /// Not told as they are now.
    dirty: HashSet<Arc<str>>,
    /// Those without connections, by when they count as gone.
    lingering: BTreeSet<(Instant, Arc<str>)>,
    /// Those of which Redis could not say yet whether their event was sent.
    unsure: HashSet<Arc<str>>,
}

#[derive(Default)]
struct Entry {
    connections: u32,
    /// Without connections, it counts as gone from here on.
    gone_at: Option<Instant>,
    /// Redis may know of it.
    told: bool,
    /// It is being told, and what it says is not confirmed yet.
    telling: bool,
    known: Option<Known>,
}

impl LocalConnections {
    pub fn new(linger: Duration) -> Self {
        Self { linger, state: Mutex::default(), changed: Notify::new(), told: Notify::new() }
    }

    pub fn join(&self, receiver: &Arc<str>) {
        let mut guard = self.state();
        let State { receivers, dirty, lingering, .. } = &mut *guard;
        let entry = receivers.entry(receiver.clone()).or_default();
        entry.connections += 1;
        if let Some(at) = entry.gone_at.take() {
            lingering.remove(&(at, receiver.clone()));
        }
        dirty.insert(receiver.clone());
        drop(guard);
        self.changed.notify_one();
    }

    pub fn leave(&self, receiver: &Arc<str>) {
        let mut guard = self.state();
        let State { receivers, dirty, lingering, .. } = &mut *guard;
        let Some(entry) = receivers.get_mut(receiver) else { return };
        entry.connections = entry.connections.saturating_sub(1);
        if entry.connections == 0 && !entry.told {
            // It came and went, and nobody has heard of it.
            receivers.remove(receiver);
            dirty.remove(receiver);
            return;
        }
        if entry.connections == 0 {
            let at = Instant::now() + self.linger;
            entry.gone_at = Some(at);
            lingering.insert((at, receiver.clone()));
        }
        dirty.insert(receiver.clone());
        drop(guard);
        self.changed.notify_one();
    }

    /// What is to be told, up to a number of receivers, of those that can be told now. All of it comes back to
    /// `confirm` or `put_back`.
    pub fn take(&self, limit: usize, now: Instant, can: impl Fn(&str) -> bool) -> Vec<Update<Arc<str>>> {
        let mut guard = self.state();
        let State { receivers, dirty, lingering, .. } = &mut *guard;
        while let Some((at, receiver)) = lingering.pop_first() {
            if at > now {
                lingering.insert((at, receiver));
                break;
            }
            dirty.insert(receiver);
        }
        let taken: Vec<Arc<str>> = dirty.iter().filter(|receiver| can(receiver)).take(limit).cloned().collect();
        let update = |receiver: Arc<str>| {
            dirty.remove(&receiver);
            let entry = receivers.get_mut(&receiver)?;
            (entry.told, entry.telling) = (true, true);
            let gone = entry.gone_at.is_some_and(|at| at <= now);
            let connections = if gone { -1 } else { i64::from(entry.connections) };
            Some(Update { receiver, connections, known: entry.known })
        };
        taken.into_iter().filter_map(update).collect()
    }

    /// These were told, and that is what came of it.
    pub fn confirm(&self, updates: &[Update<Arc<str>>], outcomes: &[Outcome]) {
        let mut state = self.state();
        for (update, outcome) in updates.iter().zip(outcomes) {
            let Some(entry) = state.receivers.get_mut(&update.receiver) else { continue };
            entry.telling = false;
            if update.connections >= 0 {
                entry.known = outcome.known;
                if outcome.known.is_none() && outcome.change.is_none() {
                    state.unsure.insert(update.receiver.clone());
                }
            } else if entry.connections == 0 {
                state.receivers.remove(&update.receiver);
            } else {
                // It came back meanwhile, which is told next.
                entry.known = None;
            }
        }
        drop(state);
        self.told.notify_waiters();
    }

    /// These may not have been told.
    pub fn put_back(&self, updates: impl IntoIterator<Item = Update<Arc<str>>>) {
        let mut state = self.state();
        state.dirty.extend(updates.into_iter().map(|update| update.receiver));
    }

    /// Everything is to be told again.
    pub fn forget_told(&self) {
        let mut guard = self.state();
        let State { receivers, dirty, .. } = &mut *guard;
        dirty.extend(receivers.keys().cloned());
        drop(guard);
        self.changed.notify_one();
    }

    /// Has those told again of which Redis could not say whether their event was sent.
    pub fn retry_unsure(&self) {
        let mut guard = self.state();
        let State { receivers, dirty, unsure, .. } = &mut *guard;
        dirty.extend(unsure.drain().filter(|receiver| receivers.contains_key(receiver)));
    }

    /// When the next one counts as gone.
    pub fn next_gone(&self) -> Option<Instant> {
        self.state().lingering.first().map(|(at, _)| *at)
    }

    /// Waits until Redis knows what there is to know of a receiver. Whether it does within this time.
    pub async fn await_told(&self, receiver: &str, within: Duration) -> bool {
        let waiting = async {
            loop {
                let told = self.told.notified();
                if self.is_told(receiver) {
                    return;
                }
                told.await;
            }
        };
        tokio::time::timeout(within, waiting).await.is_ok()
    }

    fn is_told(&self, receiver: &str) -> bool {
        let state = self.state();
        !state.dirty.contains(receiver) && state.receivers.get(receiver).is_none_or(|entry| !entry.telling)
    }

    /// Whether it is connected here.
    pub fn is_connected(&self, receiver: &str) -> bool {
        self.state().receivers.get(receiver).is_some_and(|entry| entry.connections > 0)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINGER: Duration = Duration::from_secs(5);

    fn told(local: &LocalConnections, now: Instant) -> Vec<(String, i64)> {
        let updates = local.take(100, now, |_| true);
        let known = Some(Known { version: 7, since_ms: 3 });
        local.confirm(&updates, &vec![Outcome { version: 7, known, change: None }; updates.len()]);
        let mut told: Vec<_> = updates.iter().map(|one| (one.receiver.to_string(), one.connections)).collect();
        told.sort();
        told
    }

    #[test]
    fn who_leaves_counts_as_gone_after_a_while_and_not_when_it_comes_back() {
        let (local, now) = (LocalConnections::new(LINGER), Instant::now());
        let [a, b] = ["a", "b"].map(Arc::<str>::from);
        [&a, &a, &b].iter().for_each(|receiver| local.join(receiver));
        assert_eq!(told(&local, now), [("a".to_owned(), 2), ("b".to_owned(), 1)]);
        [&a, &a, &b].iter().for_each(|receiver| local.leave(receiver));
        assert_eq!(told(&local, now), [("a".to_owned(), 0), ("b".to_owned(), 0)]);
        assert_eq!(told(&local, now), []);
        local.join(&b);
        assert_eq!(told(&local, now + 2 * LINGER), [("a".to_owned(), -1), ("b".to_owned(), 1)]);
        assert_eq!((local.next_gone(), local.state().receivers.len()), (None, 1));
    }

    #[test]
    fn who_comes_and_goes_unheard_leaves_nothing_behind() {
        let local = LocalConnections::new(LINGER);
        let a = Arc::from("a");
        local.join(&a);
        local.leave(&a);
        assert_eq!(told(&local, Instant::now()), []);
        assert!(local.state().receivers.is_empty());
    }

    #[test]
    fn what_could_not_be_told_is_told_later_and_what_was_lost_again() {
        let (local, now) = (LocalConnections::new(LINGER), Instant::now());
        let a: Arc<str> = "a".into();
        local.join(&a);
        let updates = local.take(100, now, |_| true);
        assert_eq!(updates[0].known, None);
        assert!(!local.is_told("a") && local.is_connected("a"));
        local.put_back(updates);
        assert_eq!(told(&local, now), [("a".to_owned(), 1)]);
        assert!(local.is_told("a"));
        local.forget_told();
        assert_eq!(local.take(100, now, |_| true)[0].known, Some(Known { version: 7, since_ms: 3 }));
    }

    proptest! {
        /// Whatever comes, goes and fails: in the end Redis has heard of exactly those that are connected.
        #[test]
        fn in_the_end_exactly_those_that_are_connected_are_told(steps in prop::collection::vec((0..6_u8, 0..4_usize), 0..80)) {
            let local = LocalConnections::new(Duration::ZERO);
            let names = ["a", "b", "c", "d"].map(Arc::<str>::from);
            let (mut open, mut redis) = ([0_i64; 4], HashMap::<String, i64>::new());
            let mut tell = |local: &LocalConnections, fails: bool| {
                let updates = local.take(2, Instant::now(), |_| true);
                // What fails may have been done all the same.
                for update in &updates {
                    match update.connections {
                        -1 => redis.remove(&*update.receiver),
                        count => redis.insert(update.receiver.to_string(), count),
                    };
                }
                let more = !updates.is_empty();
                if fails {
                    local.put_back(updates);
                } else {
                    let known = Some(Known { version: 1, since_ms: 1 });
                    local.confirm(&updates, &vec![Outcome { version: 7, known, change: None }; updates.len()]);
                }
                (more, redis.clone())
            };
            for (what, who) in steps {
                match what {
                    0 | 1 => { local.join(&names[who]); open[who] += 1; }
                    2 | 3 if open[who] > 0 => { local.leave(&names[who]); open[who] -= 1; }
                    4 => { tell(&local, true); }
                    _ => { tell(&local, false); }
                }
            }
            while tell(&local, false).0 {}
            let wanted: HashMap<String, i64> = names.iter().zip(open).filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_string(), count)).collect();
            prop_assert_eq!(tell(&local, false).1, wanted.clone());
            prop_assert_eq!(local.state().receivers.len(), wanted.len());
        }
    }
}
