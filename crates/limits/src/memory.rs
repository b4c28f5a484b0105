//! Memory that callers can make a process use: one limit, divided into budgets.
//!
//! Everything that grows with what callers send or do not read takes a lease from a budget first,
//! which is returned on drop. A budget that is used up refuses (503 `overloaded`) or makes the
//! caller wait; it never grows. There is one set of budgets per process, because a process has one
//! heap.

use std::{
    fs,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use metrics::{Counter, Gauge, counter, gauge};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Memory that callers may make the process use.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes that all budgets together may take; 0 means 60 % of the container's memory limit, or
    /// 512 MiB without one. Bodies, answers, queues of connections and records in flight draw from
    /// it; the process itself needs about 60 MiB in addition.
    pub limit_bytes: u64,
}

/// Limit if neither the configuration nor a control group sets one.
const UNLIMITED: u64 = 512 << 20;

/// Budgets with their shares of the limit in percent: for processes that serve requests, and for
/// those that do not. The rest is for uncounted memory.
const SHARES: [(&str, usize, usize); 8] = [
    ("small_requests", 5, 1),
    ("requests", 20, 2),
    ("responses", 15, 2),
    ("queues", 20, 2),
    ("live_comments", 2, 1),
    ("producer", 10, 20),
    ("producer_callers", 10, 2),
    ("consumers", 8, 60),
];

/// All budgets of the process.
pub struct Budgets {
    /// First part of each request body, so that large bodies leave memory for small ones.
    pub small_requests: Budget,
    /// Rest of each request body.
    pub requests: Budget,
    /// Answers, from their creation until the client has them, and pages read for streams.
    pub responses: Budget,
    /// Send queues of open WebSockets and event streams.
    pub queues: Budget,
    /// Comments that were handed to live streams, and that some of them have not taken yet.
    pub live_comments: Budget,
    /// Records of postrider's own topics on their way to Kafka.
    pub producer: Budget,
    /// Callers' records on their way to Kafka.
    pub producer_callers: Budget,
    /// Records that were fetched from Kafka and are not handled yet.
    pub consumers: Budget,
}

static BUDGETS: OnceLock<Budgets> = OnceLock::new();

/// Returns the budgets of the process; those of the default limit, unless [`divide`] was called
/// before.
pub fn budgets() -> &'static Budgets {
    BUDGETS.get_or_init(|| Budgets::of(UNLIMITED, true))
}

/// Divides the limit, once, at the start of a process. Returns the limit in bytes.
pub fn divide(config: &Config, serves_requests: bool) -> u64 {
    let limit = match config.limit_bytes {
        0 => container_limit().map_or(UNLIMITED, |bytes| bytes / 100 * 60),
        bytes => bytes,
    };
    BUDGETS.get_or_init(|| Budgets::of(limit, serves_requests));
    gauge!("postrider_memory_limit_bytes").set(limit as f64);
    limit
}

impl Budgets {
    fn of(limit: u64, serves_requests: bool) -> Self {
        let hundredth = usize::try_from(limit / 100).unwrap_or(usize::MAX);
        let [small_requests, requests, responses, queues, live_comments, producer, producer_callers, consumers] =
            SHARES.map(|(name, serving, otherwise)| {
                let percent = if serves_requests { serving } else { otherwise };
                Budget::new(name, hundredth.saturating_mul(percent))
            });
        Self { small_requests, requests, responses, queues, live_comments, producer, producer_callers, consumers }
    }
}

/// A bound in bytes.
pub struct Budget {
    bound: usize,
    used: AtomicUsize,
    waiting: AtomicUsize,
    freed: Notify,
    in_use: Gauge,
    refused: Counter,
}

impl Budget {
    pub fn new(name: &'static str, bound: usize) -> Self {
        gauge!("postrider_memory_budget_bytes", "budget" => name).set(bound as f64);
        Self {
            bound,
            used: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            in_use: gauge!("postrider_memory_used_bytes", "budget" => name),
            refused: counter!("postrider_memory_refused_total", "budget" => name),
        }
    }

    /// Returns the bound in bytes.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// Returns whether more than half of the budget is used. Callers that can do with less then
    /// take less, so that slow ones leave memory for others.
    pub fn is_tight(&self) -> bool {
        self.used.load(Relaxed) > self.bound / 2
    }

    /// Takes bytes; returns `None` if there are not enough.
    pub fn lease(&'static self, bytes: usize) -> Option<Lease> {
        self.take(bytes).then(|| Lease { budget: self, bytes })
    }

    /// Takes bytes, or the whole budget if they exceed it. Waits up to `patience` until others have
    /// returned enough.
    pub async fn lease_within(&'static self, bytes: usize, patience: Duration) -> Option<Lease> {
        let bytes = bytes.min(self.bound);
        self.waiting.fetch_add(1, Relaxed);
        let waited = tokio::time::timeout(patience, async {
            loop {
                let mut freed = pin!(self.freed.notified());
                // From here on, no return of bytes is missed.
                freed.as_mut().enable();
                if self.try_take(bytes) {
                    return Lease { budget: self, bytes };
                }
                freed.await;
            }
        });
        let lease = waited.await.ok();
        self.waiting.fetch_sub(1, Relaxed);
        if lease.is_none() {
            self.refused.increment(1);
        }
        lease
    }

    /// Takes bytes, or half of them, and so on, down to `least`.
    pub fn lease_at_most(&'static self, bytes: usize, least: usize) -> Option<Lease> {
        let mut halves =
            std::iter::successors(Some(bytes), |bytes| Some(bytes / 2)).take_while(|bytes| *bytes >= least);
        let lease = halves.find_map(|bytes| self.try_take(bytes).then(|| Lease { budget: self, bytes }));
        if lease.is_none() {
            self.refused.increment(1);
        }
        lease
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self.try_take(bytes);
        if !taken {
            self.refused.increment(1);
        }
        taken
    }

    fn try_take(&self, bytes: usize) -> bool {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.bound);
        let taken = self.used.fetch_update(Relaxed, Relaxed, more).is_ok();
        if taken {
            self.in_use.increment(bytes as f64);
        }
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Relaxed);
        self.in_use.decrement(bytes as f64);
        if self.waiting.load(Relaxed) > 0 {
            self.freed.notify_waiters();
        }
    }
}

/// Bytes taken from a budget; returned on drop.
pub struct Lease {
    budget: &'static Budget,
    bytes: usize,
}

impl Lease {
    /// Takes more bytes from the same budget; returns `false`, and changes nothing, if there are
    /// not enough.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let taken = self.budget.take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// Returns all but this many bytes to the budget.
    pub fn shrink_to(&mut self, bytes: usize) {
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        self.budget.give_back(less);
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// Returns the smallest memory limit of the process's control group and those above it, in bytes.
fn container_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let root = Path::new("/sys/fs/cgroup");
    let folders: Vec<PathBuf> =
        root.join(own).ancestors().take_while(|at| at.starts_with(root)).map(Path::to_owned).collect();
    let newer = folders.iter().map(|folder| folder.join("memory.max"));
    let older = [root.join("memory/memory.limit_in_bytes")];
    let limits = newer.chain(older).filter_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok());
    // Without a limit, older kernels report a number larger than any memory.
    limits.filter(|bytes| *bytes < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(bound: usize) -> &'static Budget {
        Box::leak(Box::new(Budget::new("test", bound)))
    }

    #[test]
    fn a_budget_refuses_beyond_its_bound_and_accepts_again_when_leases_are_returned() {
        let budget = budget(100);
        let mut first = budget.lease(60).unwrap();
        assert!(budget.lease(41).is_none());
        assert!(first.grow(40) && !first.grow(1));
        first.shrink_to(50);
        let second = budget.lease(50).unwrap();
        drop(first);
        assert_eq!(budget.used.load(Relaxed), 50);
        drop(second);
        assert_eq!(budget.used.load(Relaxed), 0);
        assert!(budget.lease(usize::MAX).is_none(), "no overflow");
    }

    #[test]
    fn lease_at_most_halves_the_request_until_it_fits() {
        let budget = budget(100);
        let leases = [90, 90, 90].map(|bytes| budget.lease_at_most(bytes, 5));
        assert_eq!(leases.each_ref().map(|lease| lease.as_ref().map(Lease::bytes)), [Some(90), Some(5), Some(5)]);
        assert!(budget.lease_at_most(90, 5).is_none());
    }

    #[tokio::test]
    async fn lease_within_waits_for_returned_bytes_or_times_out() {
        let budget = budget(100);
        let lease = budget.lease(80).unwrap();
        assert!(budget.lease_within(30, Duration::from_millis(1)).await.is_none());
        let waiting = tokio::spawn(budget.lease_within(30, Duration::from_secs(60)));
        while budget.waiting.load(Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        drop(lease);
        assert_eq!(waiting.await.unwrap().unwrap().bytes(), 30);
        let all = budget.lease_within(1_000, Duration::from_secs(1)).await;
        assert_eq!(all.map(|lease| lease.bytes()), Some(100), "more than there is takes all there is");
    }

    #[test]
    fn the_shares_leave_a_tenth_for_uncounted_memory() {
        assert!(SHARES.iter().map(|(_, serving, _)| serving).sum::<usize>() <= 90);
        assert!(SHARES.iter().map(|(_, _, otherwise)| otherwise).sum::<usize>() <= 90);
        let budgets = Budgets::of(100 << 20, true);
        assert_eq!(budgets.requests.bound(), (100 << 20) / 100 * 20);
    }
}
