//! Counters of a route, as metrics and for the progress line.

use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use parking_lot::{Mutex, RwLock};
use postrider_kafka::Position;

/// Totals since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub delivered: u64,
    /// Failed attempts, including those of records that a retry delivered.
    pub failed: u64,
    /// Dead-lettered records.
    pub dead_letters: u64,
    /// Requests without a response yet.
    pub in_flight: u64,
}

/// Why records were dead-lettered, by class of the last error.
pub type DeadLetters = BTreeMap<&'static str, Failed>;

/// Records that were dead-lettered for the same class of error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub records: u64,
    /// The error of the last of them, and its position.
    pub message: String,
    pub last: Position,
}

/// Counters of one route.
pub struct Stats {
    route: String,
    delivered: Counter,
    duration: Histogram,
    in_flight: Gauge,
    /// By failure class; created on first use.
    failed: RwLock<HashMap<&'static str, Counter>>,
    totals: [AtomicU64; 4],
    dead_letters: Mutex<DeadLetters>,
}

/// Indexes into `totals`.
const DELIVERED: usize = 0;
const FAILED: usize = 1;
const DEAD_LETTERS: usize = 2;
const IN_FLIGHT: usize = 3;

/// Counts a request in flight until dropped.
pub struct InFlight<'a>(&'a Stats);

impl Stats {
    pub fn new(route: &str) -> Self {
        let route = route.to_owned();
        Self {
            delivered: counter!("postrider_relay_requests_total", "route" => route.clone(), "outcome" => "delivered"),
            duration: histogram!("postrider_relay_request_duration_seconds", "route" => route.clone()),
            in_flight: gauge!("postrider_relay_in_flight_requests", "route" => route.clone()),
            failed: RwLock::default(),
            totals: Default::default(),
            dead_letters: Mutex::default(),
            route,
        }
    }

    pub fn begin(&self) -> InFlight<'_> {
        self.totals[IN_FLIGHT].fetch_add(1, Ordering::Relaxed);
        self.in_flight.increment(1);
        InFlight(self)
    }

    pub fn delivered(&self, took: Duration) {
        self.totals[DELIVERED].fetch_add(1, Ordering::Relaxed);
        self.delivered.increment(1);
        self.duration.record(took);
    }

    pub fn failed(&self, class: &'static str, took: Duration) {
        self.totals[FAILED].fetch_add(1, Ordering::Relaxed);
        self.duration.record(took);
        if let Some(counter) = self.failed.read().get(class) {
            return counter.increment(1);
        }
        let counter = counter!("postrider_relay_requests_total", "route" => self.route.clone(), "outcome" => class);
        counter.increment(1);
        self.failed.write().insert(class, counter);
    }

    /// Counts a record at this position whose dead letter is stored.
    pub fn dead_lettered(&self, class: &'static str, message: &str, last: Position) {
        self.totals[DEAD_LETTERS].fetch_add(1, Ordering::Relaxed);
        let message = message.to_owned();
        let mut dead_letters = self.dead_letters.lock();
        let records = dead_letters.get(class).map_or(0, |failed| failed.records) + 1;
        dead_letters.insert(class, Failed { records, message, last });
    }

    pub fn dead_letters(&self) -> DeadLetters {
        self.dead_letters.lock().clone()
    }

    pub fn snapshot(&self) -> Snapshot {
        let [delivered, failed, dead_letters, in_flight] =
            [DELIVERED, FAILED, DEAD_LETTERS, IN_FLIGHT].map(|at| self.totals[at].load(Ordering::Relaxed));
        Snapshot { delivered, failed, dead_letters, in_flight }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.totals[IN_FLIGHT].fetch_sub(1, Ordering::Relaxed);
        self.0.in_flight.decrement(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_letters_are_counted_by_class_with_the_last_one() {
        let stats = Stats::new("r");
        let at = |offset| Position { topic: "t".to_owned(), partition: 0, offset, epoch: 0 };
        for (class, offset) in [("http_503", 1), ("gone", 2), ("http_503", 4)] {
            stats.dead_lettered(class, "no", at(offset));
        }
        assert_eq!(stats.snapshot().dead_letters, 3);
        let found = stats.dead_letters();
        assert_eq!((found["http_503"].records, &found["http_503"].last), (2, &at(4)));
    }
}
