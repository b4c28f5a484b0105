//! Bounds on what grows in a store: how much it holds, how much it may hold, and refusals above
//! that.
//!
//! The owner of a bound measures its store about once a second, because counting on each write
//! would cost more than the write. A process adds to the result what it has admitted since the
//! measurement began, and what it had under way then, so that it never exceeds the bound by itself.
//! Several processes exceed it by what they admit within one interval. Whatever the measurement
//! already includes counts twice until the next one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use parking_lot::Mutex;

/// Time between two log messages about the same bound.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Reports the usage of something whose limit is set elsewhere, such as the memory of a server; 0
/// means no limit.
pub fn report(name: &'static str, used: u64, limit: u64) {
    gauge!("postrider_bound_used", "bound" => name).set(used as f64);
    // The gauge of a limit that was removed would otherwise keep its last value.
    let limit = if limit > 0 { limit as f64 } else { f64::INFINITY };
    gauge!("postrider_bound_limit", "bound" => name).set(limit);
}

/// One bound of a store.
#[derive(Debug)]
pub struct Bound {
    name: &'static str,
    /// 0 means no limit.
    limit: u64,
    /// Amount admitted since the start.
    admitted: AtomicU64,
    /// Part of `admitted` that is not in the store yet.
    under_way: AtomicU64,
    /// Amount used in addition to all that was admitted; negative once the store has shrunk below
    /// that.
    rest: AtomicI64,
    logged_at: Mutex<Option<Instant>>,
}

/// Start of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    admitted: u64,
    under_way: u64,
}

/// An amount that was admitted and is under way until dropped.
#[derive(Debug)]
#[must_use]
pub struct Admitted {
    bound: Arc<Bound>,
    amount: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.bound.under_way.fetch_sub(self.amount, SeqCst);
    }
}

impl Bound {
    /// Creates a bound with this label in metrics; a limit of 0 refuses nothing.
    pub fn new(name: &'static str, limit: u64) -> Arc<Self> {
        let (admitted, under_way, rest) = (AtomicU64::new(0), AtomicU64::new(0), AtomicI64::new(0));
        Arc::new(Self { name, limit, admitted, under_way, rest, logged_at: Mutex::default() })
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Begins a measurement.
    pub fn look(&self) -> Look {
        // Load in this order, so that what is admitted in between counts twice rather than not at
        // all.
        let admitted = self.admitted.load(SeqCst);
        Look { admitted, under_way: self.under_way.load(SeqCst) }
    }

    /// Sets the usage that was measured since `look`.
    pub fn set(&self, look: Look, used: u64) {
        let rest = i128::from(used) + i128::from(look.under_way) - i128::from(look.admitted);
        self.rest.store(i64::try_from(rest).unwrap_or(i64::MAX), SeqCst);
        report(self.name, used, self.limit);
        // An alert on the increase needs a zero to start from.
        counter!("postrider_bound_refused_total", "bound" => self.name).increment(0);
    }

    /// Returns whether this much more fits within the limit.
    pub fn has_room(&self, more: u64) -> bool {
        let used = i128::from(self.rest.load(SeqCst)) + i128::from(self.admitted.load(SeqCst));
        self.limit == 0 || used + i128::from(more) <= i128::from(self.limit)
    }

    /// Counts an amount that is about to be stored, whether it fits or not. Hold the result until
    /// it is stored or has failed.
    pub fn admit(self: &Arc<Self>, amount: u64) -> Admitted {
        self.under_way.fetch_add(amount, SeqCst);
        self.admitted.fetch_add(amount, SeqCst);
        Admitted { bound: self.clone(), amount }
    }

    /// Counts a write that was refused because of this bound, and logs it at most once a minute.
    pub fn count_refusal(&self) {
        counter!("postrider_bound_refused_total", "bound" => self.name).increment(1);
        let mut logged_at = self.logged_at.lock();
        if logged_at.is_none_or(|logged_at| logged_at.elapsed() >= LOG_INTERVAL) {
            *logged_at = Some(Instant::now());
            tracing::warn!(bound = self.name, limit = self.limit, "bound reached, refusing writes");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_admitted_since_the_last_measurement_count() {
        let bound = Bound::new("test", 10);
        assert!(bound.has_room(10) && !bound.has_room(11));
        bound.set(bound.look(), 8);
        drop(bound.admit(2));
        assert!(bound.has_room(0) && !bound.has_room(1));
        bound.set(bound.look(), 3);
        assert!(bound.has_room(7) && !bound.has_room(8));
        bound.set(bound.look(), u64::MAX);
        assert!(!bound.has_room(1));
    }

    #[test]
    fn a_limit_of_zero_is_none() {
        let bound = Bound::new("test", 0);
        bound.set(bound.look(), u64::MAX);
        assert!(bound.has_room(u64::MAX));
    }

    proptest! {
        /// Writes are admitted if they fit, stored and ended at any time, and measured meanwhile.
        #[test]
        fn one_process_never_goes_past_its_bound(steps in prop::collection::vec(0..6_u8, 0..200)) {
            let bound = Bound::new("test", 5);
            let (mut stored, mut under_way, mut done, mut look) = (0_u64, Vec::new(), Vec::new(), None);
            for step in steps {
                match step {
                    0 | 1 if bound.has_room(1) => under_way.push(bound.admit(1)),
                    2 => if let Some(write) = under_way.pop() { stored += 1; done.push(write); },
                    3 => { done.pop(); }
                    // The start of a measurement, and the store as it was at some time since then.
                    4 => look = Some((bound.look(), stored)),
                    5 => if let Some((look, seen)) = look.take() { bound.set(look, seen); },
                    _ => {}
                }
                prop_assert!(stored + under_way.len() as u64 <= 5);
            }
        }
    }
}
