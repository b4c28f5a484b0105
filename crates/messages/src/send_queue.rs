//! Send queue of one connection.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use postrider_limits::memory::{Lease, budgets};
use tokio::sync::Notify;

use super::item::Notice;

/// Maximum size of a send queue while memory is tight, in bytes.
pub const TIGHT_BYTES: usize = 8 << 10;

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The process is stopping. The client may reconnect after this many milliseconds.
    Stop { retry_after_ms: u64 },
    /// The client has been silent for too long.
    Idle,
}

/// Filled by the hub, emptied by its connection.
pub struct SendQueue {
    waiting: Mutex<Waiting>,
    woken: Notify,
    /// Maximum size in bytes.
    budget: usize,
    /// Milliseconds since the client's last frame, as counted by the hub.
    silent_ms: AtomicU64,
    since_ping_ms: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    notices: VecDeque<Arc<Notice>>,
    bytes: usize,
    /// Memory reserved for `bytes`.
    lease: Option<Lease>,
    /// True if Postgres may have messages that are not among the notices.
    behind: bool,
    ping: bool,
    ending: Option<Ending>,
}

/// Next action of a connection.
pub enum Next {
    Notice(Arc<Notice>),
    CatchUp,
    Ping,
    End(Ending),
}

impl Waiting {
    fn take_memory(&mut self, bytes: usize) -> bool {
        match &mut self.lease {
            Some(lease) => {
                // The reservation may exceed `bytes` after notices were taken.
                let needed = (self.bytes + bytes).saturating_sub(lease.bytes());
                needed == 0 || lease.grow(needed)
            }
            None => {
                self.lease = budgets().queues.lease(bytes);
                self.lease.is_some()
            }
        }
    }
}

impl SendQueue {
    pub fn new(budget: usize) -> Self {
        let waiting = Waiting::default();
        let (silent_ms, since_ping_ms) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { waiting: Mutex::new(waiting), woken: Notify::new(), budget, silent_ms, since_ping_ms }
    }

    /// Adds a notice. If the queue exceeds its budget, all notices are dropped and the connection
    /// reads from Postgres instead.
    pub fn push(&self, notice: &Arc<Notice>) {
        let bytes = match &**notice {
            Notice::Item(item) => item.value.len() + size_of::<Notice>(),
            Notice::Head(..) => size_of::<Notice>(),
        };
        let mut waiting = self.waiting();
        let budget = if budgets().queues.is_tight() { self.budget.min(TIGHT_BYTES) } else { self.budget };
        let fits = waiting.bytes + bytes <= budget || waiting.notices.is_empty();
        if !fits || !waiting.take_memory(bytes) {
            *waiting = Waiting { behind: true, ping: waiting.ping, ending: waiting.ending, ..Waiting::default() };
        } else {
            waiting.bytes += bytes;
            waiting.notices.push_back(notice.clone());
        }
        drop(waiting);
        self.woken.notify_one();
    }

    /// Makes the connection read messages that it may have missed.
    pub fn fall_behind(&self) {
        self.waiting().behind = true;
        self.woken.notify_one();
    }

    pub fn end(&self, ending: Ending) {
        self.waiting().ending.get_or_insert(ending);
        self.woken.notify_one();
    }

    /// Takes the next action: the ending first, then a ping, then a catch-up read, then notices.
    pub fn take(&self) -> Option<Next> {
        let mut waiting = self.waiting();
        if let Some(ending) = waiting.ending {
            return Some(Next::End(ending));
        }
        if std::mem::take(&mut waiting.ping) {
            return Some(Next::Ping);
        }
        if std::mem::take(&mut waiting.behind) {
            return Some(Next::CatchUp);
        }
        let notice = waiting.notices.pop_front()?;
        if let Notice::Item(item) = &*notice {
            waiting.bytes = waiting.bytes.saturating_sub(item.value.len());
        }
        waiting.bytes = waiting.bytes.saturating_sub(size_of::<Notice>());
        if waiting.notices.is_empty() {
            // An idle connection keeps no memory.
            (waiting.notices, waiting.lease) = (VecDeque::new(), None);
        }
        Some(Next::Notice(notice))
    }

    /// Wakes the connection.
    pub fn wake(&self) {
        self.woken.notify_one();
    }

    /// Resolves when there may be something to take.
    pub async fn woken(&self) {
        self.woken.notified().await;
    }

    /// Records that the client sent a frame.
    pub fn heard(&self) {
        self.silent_ms.store(0, Relaxed);
    }

    /// Advances the timers. The hub calls this for all connections, which replaces a timer for
    /// each.
    pub fn tick(&self, elapsed: Duration, ping_interval: Duration, idle_timeout: Duration) {
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let silent_ms = self.silent_ms.fetch_add(elapsed_ms, Relaxed) + elapsed_ms;
        if u128::from(silent_ms) >= idle_timeout.as_millis() {
            return self.end(Ending::Idle);
        }
        let since_ping_ms = self.since_ping_ms.fetch_add(elapsed_ms, Relaxed) + elapsed_ms;
        if u128::from(since_ping_ms) >= ping_interval.as_millis() {
            self.since_ping_ms.store(0, Relaxed);
            self.waiting().ping = true;
            self.woken.notify_one();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::item::Item, *};
    use postrider_kafka::PartitionId;

    fn notice(offset: i64, bytes: usize) -> Arc<Notice> {
        let partition_id = PartitionId { epoch: 0, partition: 0 };
        Arc::new(Notice::Item(Item { partition_id, offset, prev: offset - 1, value: "x".repeat(bytes).into() }))
    }

    #[test]
    fn exceeding_the_budget_triggers_a_catch_up_read() {
        let queue = SendQueue::new(1_000);
        assert!(queue.take().is_none());
        // A single notice is accepted, whatever its size.
        queue.push(&notice(1, 5_000));
        assert!(matches!(queue.take(), Some(Next::Notice(_))));
        (2..10).for_each(|offset| queue.push(&notice(offset, 100)));
        assert!(matches!(queue.take(), Some(Next::CatchUp)));
        queue.end(Ending::Idle);
        assert!(matches!(queue.take(), Some(Next::End(Ending::Idle))));
    }

    #[test]
    fn a_silent_client_is_pinged_and_then_ended() {
        let (queue, second) = (SendQueue::new(1), Duration::from_secs(1));
        queue.tick(second, 2 * second, 4 * second);
        assert!(queue.take().is_none());
        queue.tick(second, 2 * second, 4 * second);
        assert!(matches!(queue.take(), Some(Next::Ping)));
        queue.heard();
        (0..3).for_each(|_| queue.tick(second, 9 * second, 4 * second));
        assert!(queue.take().is_none());
        queue.tick(second, 9 * second, 4 * second);
        assert!(matches!(queue.take(), Some(Next::End(Ending::Idle))));
    }
}
