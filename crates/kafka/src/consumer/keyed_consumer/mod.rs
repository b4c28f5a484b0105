//! Keyed shape: workers that process whichever record may run next.
//!
//! Workers are tasks that end when no record is ready. Each hand-over of a batch starts one, and so
//! does each handler that has to wait, up to the concurrency. Handlers that never wait therefore
//! need few tasks, and no wake-up per record.

#[cfg(test)]
mod model;
mod schedule;
mod window;
mod worker;

use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::runtime::Handle;

pub use schedule::Span;
use schedule::{Schedule, Ticket};
use tokio_util::sync::CancellationToken;
use worker::work;

use super::{
    KeyedHandler, Subscription,
    stall::Progress,
    work::{Holder, Opening, PartitionSpan, PartitionWork, Shape},
};
use crate::batch::Batch;

/// Limits of a keyed consumer: concurrent records, and the span past the commit point.
#[derive(Debug, Clone, Copy)]
pub struct Keyed {
    /// Maximum number of handlers that run concurrently, over all partitions.
    pub concurrency: usize,
    /// Maximum span per partition.
    pub span: Span,
}

/// State shared by the workers of one consumer.
pub(super) struct Pool<H> {
    handler: Arc<H>,
    subscription: Subscription,
    topic: Arc<str>,
    schedule: Mutex<Schedule>,
    guards: Mutex<Vec<(i32, u64, CancellationToken)>>,
    workers: AtomicUsize,
    concurrency: usize,
    hasher: RandomState,
    progress: Arc<Progress>,
    runtime: Handle,
}

impl<H: KeyedHandler> Pool<H> {
    pub fn new(handler: Arc<H>, subscription: Subscription, keyed: Keyed, progress: Arc<Progress>) -> Arc<Self> {
        Arc::new(Self {
            handler,
            topic: subscription.topic.as_str().into(),
            subscription,
            schedule: Mutex::new(Schedule::new(keyed.span)),
            guards: Mutex::default(),
            workers: AtomicUsize::new(0),
            concurrency: keyed.concurrency.max(1),
            hasher: RandomState::new(),
            progress,
            runtime: Handle::current(),
        })
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock()
    }

    /// Starts one more worker, unless the concurrency is reached.
    fn add_worker(self: &Arc<Self>) {
        let added = self.workers.fetch_update(Ordering::AcqRel, Ordering::Acquire, |workers| {
            (workers < self.concurrency).then_some(workers + 1)
        });
        if added.is_ok() {
            self.runtime.spawn(work(self.clone()));
        }
    }

    /// Returns a token that is cancelled once the ticket's partition is lost and its deadline has
    /// passed.
    fn guard(&self, ticket: Ticket) -> CancellationToken {
        let guards = self.guards.lock();
        let found = guards
            .iter()
            .find(|(partition, generation, _)| (*partition, *generation) == (ticket.partition, ticket.generation));
        found.map(|(_, _, guard)| guard.clone()).unwrap_or_else(|| {
            let lost = CancellationToken::new();
            lost.cancel();
            lost
        })
    }
}

impl<H: KeyedHandler> Shape for KeyedConsumer<H> {
    fn open(&self, opening: Opening) -> Box<dyn PartitionWork> {
        let Opening { partition, generation, .. } = opening;
        self.0.schedule().open(partition, generation, -1);
        let guard = CancellationToken::new();
        let mut guards = self.0.guards.lock();
        guards.push((partition, generation, guard.clone()));
        // No lookup is needed: reading begins at the group's commit.
        opening.begin_at_commit();
        Box::new(Partition { pool: self.0.clone(), number: partition, generation, guard, held: None })
    }

    fn joined(&self, gained: &[i32]) {
        self.0.handler.joined(gained);
    }

    fn revoked(&self, partition: i32) {
        self.0.handler.revoked(partition);
    }

    fn left(&self) {}

    fn tick(&self) {
        let mut schedule = self.0.schedule();
        schedule.wake(Instant::now());
        let ready = schedule.has_ready();
        drop(schedule);
        if ready {
            self.0.add_worker();
        }
    }
}

/// Keyed shape of one consumer.
pub(super) struct KeyedConsumer<H>(pub Arc<Pool<H>>);

/// One partition, as seen by the polling thread.
struct Partition<H: KeyedHandler> {
    pool: Arc<Pool<H>>,
    number: i32,
    generation: u64,
    guard: CancellationToken,
    /// Offset that held the commit point at the last report, and since when.
    held: Option<(i64, Instant)>,
}

impl<H: KeyedHandler> PartitionWork for Partition<H> {
    fn offer(&mut self, batch: &mut Batch) -> bool {
        if !self.pool.schedule().has_room(self.number) {
            return false;
        }
        let next = Batch::with_room(batch.size());
        let batch = Arc::new(std::mem::replace(batch, next));
        let key_of = |record| self.pool.handler.ordering_key(&record).map(|key| self.pool.hasher.hash_one(key));
        let keys: Vec<window::KeyHash> = batch.iter().map(key_of).collect();
        self.pool.schedule().push(self.number, batch, &keys);
        self.pool.add_worker();
        true
    }

    fn has_room(&self) -> bool {
        self.pool.schedule().is_roomy(self.number)
    }

    fn caught_up(&mut self) {}

    fn commit_point(&self) -> i64 {
        self.pool.schedule().window(self.number).map_or(-1, window::Window::commit_point)
    }

    fn close(&mut self) {
        self.pool.schedule().close(self.number);
    }

    fn is_finished(&self) -> bool {
        self.pool.schedule().running(self.number) == 0
    }

    fn is_running(&self) -> bool {
        !self.is_finished()
    }

    fn abandon(&mut self) {
        self.guard.cancel();
        self.pool.schedule().remove(self.number);
        let mut guards = self.pool.guards.lock();
        guards.retain(|(partition, generation, _)| (*partition, *generation) != (self.number, self.generation));
    }

    fn span(&mut self) -> PartitionSpan {
        let schedule = self.pool.schedule();
        let Some(window) = schedule.window(self.number) else { return PartitionSpan::default() };
        let span = PartitionSpan { records: window.span(), bytes: window.bytes(), holder: None };
        let Some((seq, batch, index)) = window.holder() else {
            self.held = None;
            return span;
        };
        let trouble = window.trouble(seq).cloned().unwrap_or_default();
        drop(schedule);
        let record = batch.record(index as usize);
        let since = match self.held {
            Some((offset, since)) if offset == record.offset() => since,
            _ => Instant::now(),
        };
        self.held = Some((record.offset(), since));
        let key = record.key().map(|key| String::from_utf8_lossy(key).into_owned());
        let held_for = since.elapsed();
        let (attempts, error) = (trouble.attempts, trouble.last_error);
        PartitionSpan { holder: Some(Holder { offset: record.offset(), key, held_for, attempts, error }), ..span }
    }
}

impl<H: KeyedHandler> Drop for Partition<H> {
    fn drop(&mut self) {
        self.abandon();
    }
}
