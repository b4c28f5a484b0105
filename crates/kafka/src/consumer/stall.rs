//! Detects a consumer without progress: if it has work but finishes nothing for too long, the
//! process fails its liveness probe.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Counts attempts that handlers finish, successful or not. A failed attempt counts as progress,
/// because a restart would not do better.
#[derive(Debug, Default)]
pub(super) struct Progress {
    turns: AtomicU64,
}

impl Progress {
    pub fn made(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }
}

/// Watchdog on the polling thread that compares [`Progress`] over time.
#[derive(Debug)]
pub(super) struct Watchdog {
    limit: Duration,
    turns: u64,
    since: Instant,
    stuck: bool,
}

impl Watchdog {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, turns: 0, since: now, stuck: false }
    }

    /// Restarts the time limit, because a record arrived or there is nothing to do.
    pub fn relax(&mut self, now: Instant) {
        (self.since, self.stuck) = (now, false);
    }

    /// Returns whether work has been waiting for longer than the limit without anything finished.
    pub fn is_stuck(&mut self, progress: &Progress, waiting: bool, now: Instant) -> bool {
        let turns = progress.turns.load(Ordering::Relaxed);
        if !waiting || turns != self.turns {
            self.turns = turns;
            self.relax(now);
            return false;
        }
        let stuck = now.duration_since(self.since) > self.limit;
        if stuck && !self.stuck {
            let idle_s = now.duration_since(self.since).as_secs();
            tracing::error!(silent.s = idle_s, "consumer has work but makes no progress; failing liveness");
        }
        self.stuck = stuck;
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_waiting_work_without_a_finished_attempt_is_stuck() {
        let (progress, begun) = (Progress::default(), Instant::now());
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut watchdog = Watchdog::new(Duration::from_secs(60), begun);
        assert!(!watchdog.is_stuck(&progress, false, at(1_000)), "nothing to do");
        assert!(!watchdog.is_stuck(&progress, true, at(1_059)));
        progress.made();
        assert!(!watchdog.is_stuck(&progress, true, at(1_100)), "an attempt was finished");
        assert!(watchdog.is_stuck(&progress, true, at(1_161)));
        watchdog.relax(at(1_162));
        assert!(!watchdog.is_stuck(&progress, true, at(1_200)), "a record arrived");
    }
}
