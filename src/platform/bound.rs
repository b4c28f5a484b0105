//! Bounds of what grows in a store: how much of it there is, how much there may be, and refusals above that.
//!
//! Whoever owns a bound measures its store about once a second, because counting on each write would cost more than the
//! write. What is taken between two looks is added to the last measurement, so that one process goes past its bound by
//! nothing, and several by what they take in one such interval.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use metrics::{counter, gauge};

/// Reports how much there is of something whose limit is elsewhere, such as the memory of a server; 0 is no limit.
pub fn report(name: &'static str, used: u64, limit: u64) {
    gauge!("postrider_bound_used", "bound" => name).set(used as f64);
    // Without a limit there is no series, so that alerts on the ratio have nothing to divide by.
    if limit > 0 {
        gauge!("postrider_bound_limit", "bound" => name).set(limit as f64);
    }
}

/// One bound of a store.
#[derive(Debug)]
pub struct Bound {
    name: &'static str,
    /// 0 is no limit.
    limit: u64,
    used: AtomicU64,
}

impl Bound {
    /// Makes a bound with this label in metrics; a limit of 0 refuses nothing.
    pub fn new(name: &'static str, limit: u64) -> Arc<Self> {
        Arc::new(Self { name, limit, used: AtomicU64::new(0) })
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Notes what was measured.
    pub fn set(&self, used: u64) {
        self.used.store(used, Ordering::Relaxed);
        report(self.name, used, self.limit);
        // An alert on the increase needs a zero to start from.
        counter!("postrider_bound_refused_total", "bound" => self.name).increment(0);
    }

    /// Returns whether this much more is within the limit.
    pub fn has_room(&self, more: u64) -> bool {
        self.limit == 0 || self.used.load(Ordering::Relaxed).saturating_add(more) <= self.limit
    }

    /// Adds to what is used until the next measurement.
    pub fn add(&self, more: u64) {
        self.used.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts a write that was refused because of this bound.
    pub fn count_refusal(&self) {
        counter!("postrider_bound_refused_total", "bound" => self.name).increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_between_two_measurements_counts() {
        let bound = Bound::new("test", 10);
        assert!(bound.has_room(10) && !bound.has_room(11));
        bound.set(8);
        bound.add(2);
        assert!(bound.has_room(0) && !bound.has_room(1));
        bound.set(3);
        assert!(bound.has_room(7));
        bound.set(u64::MAX);
        assert!(!bound.has_room(u64::MAX));
    }

    #[test]
    fn a_limit_of_zero_is_none() {
        let bound = Bound::new("test", 0);
        bound.set(u64::MAX);
        assert!(bound.has_room(u64::MAX));
    }
}
