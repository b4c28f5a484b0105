//! Connections of this process, and which of their changes are not yet written to Redis.
//!
//! It stores states rather than a sequence of joins and leaves, so it is bounded by the number of
//! receivers, and a failed write is simply repeated later.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

use super::script::{Known, Outcome, Update};

pub struct LocalConnections {
    linger: Duration,
    state: Mutex<State>,
    /// Notified when there is something to write.
    pub changed: Notify,
    /// Notified when something was written.
    told: Notify,
}

#[derive(Default)]
struct State {
    receivers: HashMap<Arc<str>, Entry>,
    /// Receivers whose current state is not written.
    dirty: HashSet<Arc<str>>,
    /// Receivers without connections, by the time at which they count as disconnected.
    lingering: BTreeSet<(Instant, Arc<str>)>,
    /// Receivers for which Redis could not yet tell if their event was sent.
    unsure: HashSet<Arc<str>>,
}

#[derive(Default)]
struct Entry {
    connections: u32,
    /// Time at which it counts as disconnected, while it has no connections.
    gone_at: Option<Instant>,
    /// True if Redis may have it.
    told: bool,
    /// True while a write is not confirmed.
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
            // It connected and disconnected before anything was written.
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

    /// Returns pending updates, at most `limit`, for receivers that `can` be written now. Pass all
    /// of them to `confirm` or `put_back`.
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

    /// Records the outcomes of written updates.
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
                // It reconnected meanwhile; the next write contains that.
                entry.known = None;
            }
        }
        drop(state);
        self.told.notify_waiters();
    }

    /// Returns updates that may not have been written.
    pub fn put_back(&self, updates: impl IntoIterator<Item = Update<Arc<str>>>) {
        let mut state = self.state();
        state.dirty.extend(updates.into_iter().map(|update| update.receiver));
    }

    /// Marks every receiver to be written again.
    pub fn forget_told(&self) {
        let mut guard = self.state();
        let State { receivers, dirty, .. } = &mut *guard;
        dirty.extend(receivers.keys().cloned());
        drop(guard);
        self.changed.notify_one();
    }

    /// Marks the receivers to be written again for which Redis could not tell if their event was
    /// sent.
    pub fn retry_unsure(&self) {
        let mut guard = self.state();
        let State { receivers, dirty, unsure, .. } = &mut *guard;
        dirty.extend(unsure.drain().filter(|receiver| receivers.contains_key(receiver)));
    }

    /// Returns the time at which the next receiver counts as disconnected.
    pub fn next_gone(&self) -> Option<Instant> {
        self.state().lingering.first().map(|(at, _)| *at)
    }

    /// Waits until the changes of a receiver are written to Redis. Returns false on timeout.
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

    /// Returns true if a receiver is connected to this process.
    pub fn is_connected(&self, receiver: &str) -> bool {
        self.state().receivers.get(receiver).is_some_and(|entry| entry.connections > 0)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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
        local.confirm(&updates, &vec![Outcome { version: 7, known, change: None, missed: None }; updates.len()]);
        let mut told: Vec<_> = updates.iter().map(|one| (one.receiver.to_string(), one.connections)).collect();
        told.sort();
        told
    }

    #[test]
    fn a_receiver_counts_as_disconnected_after_the_linger_unless_it_reconnects() {
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
    fn a_connection_that_ends_before_a_write_leaves_no_state() {
        let local = LocalConnections::new(LINGER);
        let a = Arc::from("a");
        local.join(&a);
        local.leave(&a);
        assert_eq!(told(&local, Instant::now()), []);
        assert!(local.state().receivers.is_empty());
    }

    #[test]
    fn failed_writes_are_repeated_and_lost_data_is_written_again() {
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
        /// After any sequence of joins, leaves and failures, Redis has exactly the connected
        /// receivers.
        #[test]
        fn exactly_the_connected_receivers_are_written(steps in prop::collection::vec((0..6_u8, 0..4_usize), 0..80)) {
            let local = LocalConnections::new(Duration::ZERO);
            let names = ["a", "b", "c", "d"].map(Arc::<str>::from);
            let (mut open, mut redis) = ([0_i64; 4], HashMap::<String, i64>::new());
            let mut tell = |local: &LocalConnections, fails: bool| {
                let updates = local.take(2, Instant::now(), |_| true);
                // A failed write may have been applied.
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
                    local.confirm(&updates, &vec![Outcome { version: 7, known, change: None, missed: None }; updates.len()]);
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
