//! Batch shape: one task per partition that calls the handler, and retries while a dependency is
//! down.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::Mutex;
use postrider_time::clock;
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    BatchHandler, Failure, Poison, Subscription,
    lookup::Lookup,
    spans,
    stall::Progress,
    work::{Holder, Opening, PartitionSpan, PartitionWork, Shape, Start, hold_pause},
};
use crate::{
    batch::{Batch, Record},
    dead_letter::Letter,
};

/// Interval of the calls of a handler's `idle`, even if the partition is busy.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Batch shape of one consumer; runs one worker per partition.
pub(super) struct BatchConsumer<H> {
    pub handler: Arc<H>,
    pub subscription: Subscription,
    pub lookup: Lookup,
    pub progress: Arc<Progress>,
    pub runtime: Handle,
}

impl<H: BatchHandler> Shape for BatchConsumer<H> {
    fn open(&self, opening: Opening) -> Box<dyn PartitionWork> {
        let (work, receiver) = mpsc::channel(1);
        let (closed, done, current_batch) =
            (CancellationToken::new(), Arc::new(AtomicI64::new(-1)), Arc::<CurrentBatch>::default());
        let spares = Arc::<Spares>::default();
        let worker = Worker {
            handler: self.handler.clone(),
            subscription: self.subscription.clone(),
            lookup: self.lookup.clone(),
            progress: self.progress.clone(),
            opening,
            work: receiver,
            done: done.clone(),
            current_batch: current_batch.clone(),
            spares: spares.clone(),
            closed: closed.clone(),
        };
        Box::new(Partition {
            work,
            current_start: 0,
            done,
            current_batch,
            spares,
            closed,
            task: self.runtime.spawn(worker.run()),
        })
    }

    fn joined(&self, gained: &[i32]) {
        self.handler.joined(gained);
    }

    fn revoked(&self, partition: i32) {
        self.handler.revoked(partition);
    }

    fn left(&self) {
        self.handler.left();
    }

    fn tick(&self) {}
}

/// One partition, as seen by the polling thread.
struct Partition {
    work: mpsc::Sender<(u64, Work)>,
    /// Start of the worker that offered batches belong to.
    current_start: u64,
    /// Commit point: all records below it are finished.
    done: Arc<AtomicI64>,
    current_batch: Arc<CurrentBatch>,
    spares: Arc<Spares>,
    closed: CancellationToken,
    task: JoinHandle<()>,
}

/// Finished batches kept for reuse, because allocating their memory again is expensive.
#[derive(Default)]
struct Spares(Mutex<Vec<Batch>>);

impl Spares {
    /// Maximum number of batches kept.
    const MAX_KEPT: usize = 2;

    fn take(&self, size: (usize, usize, usize)) -> Batch {
        let spare = self.0.lock().pop();
        spare.unwrap_or_else(|| Batch::with_room(size))
    }

    fn give(&self, mut batch: Batch) {
        let mut spares = self.0.lock();
        if spares.len() < Self::MAX_KEPT {
            batch.clear();
            spares.push(batch);
        }
    }
}

enum Work {
    Batch(Batch),
    CaughtUp,
}

/// Batch that the worker is processing, for reports on what holds the partition.
type CurrentBatch = Mutex<Option<Held>>;

struct Held {
    offset: i64,
    key: Option<String>,
    records: usize,
    bytes: usize,
    since: Instant,
    attempts: u32,
    error: String,
}

impl PartitionWork for Partition {
    fn begun(&mut self, start: u64) {
        self.current_start = start;
    }

    fn offer(&mut self, batch: &mut Batch) -> bool {
        let Ok(slot) = self.work.try_reserve() else { return false };
        let next = self.spares.take(batch.size());
        slot.send((self.current_start, Work::Batch(std::mem::replace(batch, next))));
        true
    }

    fn has_room(&self) -> bool {
        self.work.capacity() > 0
    }

    fn caught_up(&mut self) {
        // If the channel is full, records are waiting, and the end of the log is reported again
        // after them.
        let _ = self.work.try_send((self.current_start, Work::CaughtUp));
    }

    fn commit_point(&self) -> i64 {
        self.done.load(Ordering::Acquire)
    }

    fn close(&mut self) {
        self.closed.cancel();
    }

    fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    fn has_died(&self) -> bool {
        self.task.is_finished() && !self.closed.is_cancelled()
    }

    fn is_running(&self) -> bool {
        self.current_batch.lock().is_some()
    }

    fn abandon(&mut self) {
        self.task.abort();
    }

    fn span(&mut self) -> PartitionSpan {
        let current_batch = self.current_batch.lock();
        let Some(held) = &*current_batch else { return PartitionSpan::default() };
        let holder = Holder {
            offset: held.offset,
            key: held.key.clone(),
            held_for: held.since.elapsed(),
            attempts: held.attempts,
            error: held.error.clone(),
        };
        PartitionSpan { records: held.records, bytes: held.bytes, holder: Some(holder) }
    }
}

/// Task of one partition during one ownership.
struct Worker<H> {
    handler: Arc<H>,
    subscription: Subscription,
    lookup: Lookup,
    progress: Arc<Progress>,
    opening: Opening,
    work: mpsc::Receiver<(u64, Work)>,
    done: Arc<AtomicI64>,
    current_batch: Arc<CurrentBatch>,
    spares: Arc<Spares>,
    /// Cancelled when the partition is revoked: the worker finishes its batch and ends.
    closed: CancellationToken,
}

/// Reason why a worker stops processing the batches of its partition.
enum Stop {
    Revoked,
    /// The handler asked to start over; the text says why.
    Restart(String),
}

impl<H: BatchHandler> Worker<H> {
    async fn run(mut self) {
        // Counts the starts, to recognize batches that were handed over before the latest one.
        let mut start = 0;
        while !self.closed.is_cancelled() {
            start += 1;
            let Some(mut state) = self.begin(start).await else { break };
            let Stop::Restart(problem) = self.work_through(start, &mut state).await else { break };
            let (consumer, partition) = (self.subscription.name, self.opening.partition);
            tracing::warn!(consumer, partition, problem, "restarting partition");
        }
    }

    /// Starts the handler on the partition; `None` if the partition was revoked meanwhile.
    async fn begin(&mut self, start: u64) -> Option<H::Partition> {
        let Opening { partition, generation, .. } = self.opening;
        let mut failures = 0;
        loop {
            let attempt = async {
                let assignment = self.lookup.assignment(partition).await?;
                self.handler.assigned(assignment).await
            };
            let outcome = self.closed.run_until_cancelled(attempt).await?;
            self.progress.made();
            match outcome {
                Ok((state, offset)) => {
                    // The polling thread outlives its workers, except in a crash.
                    let _ = self.opening.starts.send(Start { partition, generation, start, offset: Some(offset) });
                    return Some(state);
                }
                Err(failure) => self.hold(&mut failures, &failure).await?,
            }
        }
    }

    /// Processes batches until the partition is revoked or has to be restarted.
    async fn work_through(&mut self, start: u64, state: &mut H::Partition) -> Stop {
        let mut idle_at = tokio::time::Instant::now() + IDLE_INTERVAL;
        loop {
            let next = tokio::select! {
                biased;
                () = self.closed.cancelled() => return Stop::Revoked,
                // `idle` comes before the next batch, so that it also runs while batches never end.
                () = tokio::time::sleep_until(idle_at) => Err(()),
                next = self.work.recv() => Ok(next),
            };
            let settled = match next {
                Ok(None) => return Stop::Revoked,
                Ok(Some((wanted, _))) if wanted != start => continue,
                Ok(Some((_, Work::Batch(batch)))) => {
                    self.set_current_batch(&batch);
                    let settled = self.apply(state, &batch).await;
                    self.clear_current_batch();
                    self.spares.give(batch);
                    settled
                }
                Ok(Some((_, Work::CaughtUp))) => self.catch_up(state).await,
                Err(()) => {
                    let settled = self.idle(state).await;
                    idle_at = tokio::time::Instant::now() + IDLE_INTERVAL;
                    settled
                }
            };
            self.progress.made();
            if let Err(stop) = settled {
                return stop;
            }
        }
    }

    async fn apply(&mut self, state: &mut H::Partition, batch: &Batch) -> Result<(), Stop> {
        let mut failures = 0;
        let poison = loop {
            let outcome = {
                let _spans = spans::of_batch(batch, self.subscription.name);
                self.handler.apply(state, batch).await
            };
            match outcome {
                Ok(poison) => break poison,
                Err(failure) => self.hold_or_stop(&mut failures, failure).await?,
            }
        };
        self.store_dead_letters(batch, poison).await?;
        if let Some(next) = batch.next_offset() {
            self.done.store(next, Ordering::Release);
        }
        Ok(())
    }

    /// Stores the dead letters of a batch, which must happen before the batch is committed.
    async fn store_dead_letters(&mut self, batch: &Batch, poison: Vec<Poison>) -> Result<(), Stop> {
        let mut failures = 0;
        for Poison { offset, reason } in &poison {
            let Some(record) = batch.iter().find(|record: &Record<'_>| record.offset() == *offset) else { continue };
            let now_ms = clock::now_ms();
            let letter = Letter {
                topic: &self.subscription.topic,
                partition: self.opening.partition,
                record,
                group: &self.subscription.group,
                reason,
                attempts: 1,
                first_failed_ms: now_ms,
                last_failed_ms: now_ms,
            };
            while let Err(error) = self.subscription.dead_letters.store(&letter).await {
                let failure = Failure::Retry(format!("cannot store a dead letter: {error}"));
                self.hold_or_stop(&mut failures, failure).await?;
            }
        }
        Ok(())
    }

    async fn catch_up(&mut self, state: &mut H::Partition) -> Result<(), Stop> {
        let mut failures = 0;
        loop {
            match self.handler.caught_up(state).await {
                Ok(()) => return Ok(()),
                Err(failure) => self.hold_or_stop(&mut failures, failure).await?,
            }
        }
    }

    async fn idle(&self, state: &mut H::Partition) -> Result<(), Stop> {
        match self.handler.idle(state).await {
            Ok(()) => Ok(()),
            Err(Failure::Restart(reason)) => Err(Stop::Restart(reason)),
            // `idle` is called again within a second.
            Err(failure) => {
                let (consumer, partition) = (self.subscription.name, self.opening.partition);
                tracing::debug!(consumer, partition, "{failure}");
                Ok(())
            }
        }
    }

    /// Waits before the next attempt, unless the failure or a revocation ends the work.
    async fn hold_or_stop(&self, failures: &mut u32, failure: Failure) -> Result<(), Stop> {
        if let Failure::Restart(reason) = failure {
            return Err(Stop::Restart(reason));
        }
        self.progress.made();
        self.hold(failures, &failure).await.ok_or(Stop::Revoked)
    }

    /// Counts the failure and waits before the next attempt; `None` if the partition was revoked
    /// meanwhile.
    async fn hold(&self, failures: &mut u32, failure: &Failure) -> Option<()> {
        let (consumer, partition) = (self.subscription.name, self.opening.partition);
        counter!("postrider_consumer_retries_total", "consumer" => consumer).increment(1);
        *failures = failures.saturating_add(1);
        let attempts = *failures;
        if attempts.is_power_of_two() {
            tracing::warn!(consumer, partition, attempts, "partition held, retrying: {failure}");
        }
        if let Some(held) = &mut *self.current_batch.lock() {
            held.attempts = attempts;
            held.error = failure.to_string();
        }
        self.closed.run_until_cancelled(tokio::time::sleep(hold_pause(attempts))).await
    }

    fn set_current_batch(&self, batch: &Batch) {
        let first = batch.iter().next();
        *self.current_batch.lock() = first.map(|record| Held {
            offset: record.offset(),
            key: record.key().map(|key| String::from_utf8_lossy(key).into_owned()),
            records: batch.len(),
            bytes: batch.footprint(),
            since: Instant::now(),
            attempts: 0,
            error: String::new(),
        });
    }

    fn clear_current_batch(&self) {
        *self.current_batch.lock() = None;
    }
}
