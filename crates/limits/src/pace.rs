//! A smooth rate limit: slots at even distances, in the order of the requests.
//!
//! A slot is a point in time, not a share of a bucket, so that the coarse clock of the runtime's
//! timers (it wakes up to a millisecond late) shifts single slots and never the rate.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

/// Longest delay at which a slot still counts, in nanoseconds. This much is caught up after a late
/// wake-up, and this much can be taken at once after a pause.
const SLACK_NS: u64 = 10_000_000;

/// Rate limit, shared by all tasks that keep the rate together.
#[derive(Debug)]
pub struct Pace {
    began: Instant,
    interval_ns: u64,
    /// Time of the next slot, in nanoseconds after `began`.
    next_ns: AtomicU64,
}

impl Pace {
    /// Creates a pace with this many slots per second; 0 or less means no limit.
    pub fn new(per_second: f64) -> Self {
        // The conversion from a float saturates, so that a tiny rate gives a slot in centuries.
        let interval_ns = if per_second > 0.0 { (1e9 / per_second) as u64 } else { 0 };
        Self { began: Instant::now(), interval_ns, next_ns: AtomicU64::new(0) }
    }

    /// Takes the next slot and waits for it. The slot is lost if the caller stops waiting.
    pub async fn slot(&self) {
        if self.interval_ns == 0 {
            return;
        }
        let now_ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if let Some(at) = self.wait(now_ns) {
            tokio::time::sleep_until(at).await;
        }
    }

    /// Takes the next slot. Returns its time, unless that has passed.
    fn wait(&self, now_ns: u64) -> Option<Instant> {
        let slot_ns = self.reserve(now_ns);
        (slot_ns > now_ns).then(|| self.began + Duration::from_nanos(slot_ns))
    }

    fn reserve(&self, now_ns: u64) -> u64 {
        let earliest = now_ns.saturating_sub(SLACK_NS);
        let slot = |next: u64| next.max(earliest);
        let after = |next: u64| Some(slot(next).saturating_add(self.interval_ns));
        // The closure never refuses, so both arms have the previous value.
        match self.next_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after) {
            Ok(next) | Err(next) => slot(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn slots_are_evenly_spaced_from_the_first_on() {
        let pace = Pace::new(10.0);
        assert_eq!([0; 4].map(|now| pace.reserve(now)), [0, 100 * MS, 200 * MS, 300 * MS]);
    }

    #[test]
    fn a_pause_is_not_saved_up() {
        let pace = Pace::new(10.0);
        pace.reserve(0);
        let after = pace.reserve(5_000 * MS);
        assert_eq!(after, 5_000 * MS - SLACK_NS);
        assert_eq!(pace.reserve(5_000 * MS), after + 100 * MS);
    }

    #[test]
    fn without_a_rate_nobody_waits() {
        let pace = Pace::new(0.0);
        assert!((0..100_000).all(|_| pace.slot().now_or_never().is_some()));
    }

    #[test]
    fn late_wake_ups_shift_single_slots_and_never_the_rate() {
        for workers in [1, 5] {
            let pace = Pace::new(1_000.0);
            // Time at which each worker asks next: up to a millisecond after its slot.
            let mut workers = vec![0; workers];
            for number in 0..1_000 {
                let now = workers.iter_mut().min().unwrap();
                let slot = pace.wait(*now).map_or(*now, |at| u64::try_from((at - pace.began).as_nanos()).unwrap());
                assert!(slot.abs_diff(number * MS) <= MS, "slot {number} at {slot} ns");
                *now = slot + number % 10 * MS / 10;
            }
        }
    }

    #[tokio::test]
    async fn one_or_many_workers_wait_for_their_slots() {
        for workers in [1, 5] {
            let pace = std::sync::Arc::new(Pace::new(1_000.0));
            let tasks: Vec<_> = (0..workers)
                .map(|_| {
                    let pace = pace.clone();
                    tokio::spawn(async move {
                        for _ in 0..200 / workers {
                            pace.slot().await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            assert!(pace.began.elapsed() >= Duration::from_millis(199), "{:?}", pace.began.elapsed());
        }
    }

    proptest! {
        /// In any span there are no more slots than the rate and the slack allow, and none is
        /// handed out twice, however late the requests are.
        #[test]
        fn no_span_has_more_slots_than_the_rate_allows(
            rate in 1.0_f64..5_000.0, steps in prop::collection::vec(0_u64..50 * MS, 1..300),
        ) {
            let pace = Pace::new(rate);
            let mut now = 0;
            let mut taken = Vec::new();
            for step in steps {
                now += step;
                let slot = pace.reserve(now);
                taken.push(slot);
                // The taker waits for its slot before it asks again.
                now = now.max(slot);
            }
            for pair in taken.windows(2) {
                prop_assert!(pair[1] - pair[0] >= pace.interval_ns);
            }
        }
    }
}
