//! What a route has done, as metrics and for whoever watches it on a terminal.

use std::{
    collections::HashMap,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub delivered: u64,
    /// Attempts that failed, whatever became of their records.
    pub failed: u64,
    /// Records given up.
    pub given_up: u64,
    /// Requests without an answer yet.
    pub in_flight: u64,
}

/// One route's counters.
pub struct Stats {
    route: String,
    delivered: Counter,
    duration: Histogram,
    in_flight: Gauge,
    /// By class; made with the first of each.
    failed: RwLock<HashMap<&'static str, Counter>>,
    totals: [AtomicU64; 4],
}

/// Positions in `totals`.
const DELIVERED: usize = 0;
const FAILED: usize = 1;
const GIVEN_UP: usize = 2;
const IN_FLIGHT: usize = 3;

/// A request on its way; ends when it is dropped.
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
        if let Some(counter) = self.failed.read().unwrap_or_else(PoisonError::into_inner).get(class) {
            return counter.increment(1);
        }
        let made = counter!("postrider_relay_requests_total", "route" => self.route.clone(), "outcome" => class);
        made.increment(1);
        self.failed.write().unwrap_or_else(PoisonError::into_inner).insert(class, made);
    }

    pub fn given_up(&self) {
        self.totals[GIVEN_UP].fetch_add(1, Ordering::Relaxed);
    }

    pub fn snapshot(&self) -> Snapshot {
        let [delivered, failed, given_up, in_flight] =
            [DELIVERED, FAILED, GIVEN_UP, IN_FLIGHT].map(|at| self.totals[at].load(Ordering::Relaxed));
        Snapshot { delivered, failed, given_up, in_flight }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.totals[IN_FLIGHT].fetch_sub(1, Ordering::Relaxed);
        self.0.in_flight.decrement(1);
    }
}
