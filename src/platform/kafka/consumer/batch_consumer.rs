//! The batch shape: a task per partition that asks the handler, again and again where a dependency is down.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::counter;
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    BatchHandler, Failure, Poison, Subscription,
    lookup::Lookup,
    progress::Progress,
    spans,
    work::{Holder, Opening, PartitionSpan, PartitionWork, Shape, Start},
};
use crate::platform::{
    clock,
    kafka::{
        batch::{Batch, Record},
        dead_letter::Letter,
    },
};

/// Time between two calls of a handler's `idle`, in a partition that is busy as in one that is not.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Runs one worker per partition.
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
        let (closed, done, hand) = (CancellationToken::new(), Arc::new(AtomicI64::new(-1)), Arc::<Hand>::default());
        let spares = Arc::<Spares>::default();
        let worker = Worker {
            handler: self.handler.clone(),
            subscription: self.subscription.clone(),
            lookup: self.lookup.clone(),
            progress: self.progress.clone(),
            opening,
            work: receiver,
            done: done.clone(),
            hand: hand.clone(),
            spares: spares.clone(),
            closed: closed.clone(),
        };
        Box::new(Partition { work, current: 0, done, hand, spares, closed, task: self.runtime.spawn(worker.run()) })
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

/// One partition, as the polling thread sees it.
struct Partition {
    work: mpsc::Sender<(u64, Work)>,
    /// Which start of the worker batches are for.
    current: u64,
    /// Everything below has its effect.
    done: Arc<AtomicI64>,
    hand: Arc<Hand>,
    spares: Arc<Spares>,
    closed: CancellationToken,
    task: JoinHandle<()>,
}

/// BatchConsumer whose records are done, to be filled again: memory that was just let go is dear to get back.
#[derive(Default)]
struct Spares(Mutex<Vec<Batch>>);

impl Spares {
    /// BatchConsumer that are kept.
    const KEPT: usize = 2;

    fn take(&self, size: (usize, usize, usize)) -> Batch {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| Batch::with_room(size))
    }

    fn give(&self, mut batch: Batch) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < Self::KEPT {
            batch.clear();
            spares.push(batch);
        }
    }
}

enum Work {
    Batch(Batch),
    CaughtUp,
}

/// What the worker has in hand, for whoever asks what holds the partition.
type Hand = Mutex<Option<Held>>;

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
        self.current = start;
    }

    fn offer(&mut self, batch: &mut Batch) -> bool {
        let Ok(slot) = self.work.try_reserve() else { return false };
        let next = self.spares.take(batch.size());
        slot.send((self.current, Work::Batch(std::mem::replace(batch, next))));
        true
    }

    fn has_room(&self) -> bool {
        self.work.capacity() > 0
    }

    fn caught_up(&mut self) {
        // Where there is no room, records are waiting, and the end will be reported again after them.
        let _ = self.work.try_send((self.current, Work::CaughtUp));
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
        self.hand.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn abandon(&mut self) {
        self.task.abort();
    }

    fn span(&mut self) -> PartitionSpan {
        let hand = self.hand.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = &*hand else { return PartitionSpan::default() };
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

/// The task of one partition in one ownership.
struct Worker<H> {
    handler: Arc<H>,
    subscription: Subscription,
    lookup: Lookup,
    progress: Arc<Progress>,
    opening: Opening,
    work: mpsc::Receiver<(u64, Work)>,
    done: Arc<AtomicI64>,
    hand: Arc<Hand>,
    spares: Arc<Spares>,
    /// The partition is being taken away: finish the batch in hand and end.
    closed: CancellationToken,
}

impl<H: BatchHandler> Worker<H> {
    async fn run(mut self) {
        // Counts the starts, so that batches handed over before the latest one are recognised.
        let mut start = 0;
        while !self.closed.is_cancelled() {
            start += 1;
            let Some(mut state) = self.begin(start).await else { break };
            if let Err(problem) = self.work_through(start, &mut state).await {
                let (consumer, partition) = (self.subscription.name, self.opening.partition);
                tracing::warn!(consumer, partition, problem, "starting a partition over");
            }
        }
    }

    /// `None` when the partition was taken away meanwhile.
    async fn begin(&mut self, start: u64) -> Option<H::Partition> {
        let Opening { partition, generation, .. } = self.opening;
        let mut pause = Pause::default();
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
                Err(failure) => self.hold(&mut pause, &failure).await?,
            }
        }
    }

    /// Ends with `Ok` when the partition is taken away, with the reason when it must start over.
    async fn work_through(&mut self, start: u64, state: &mut H::Partition) -> Result<(), String> {
        let mut idle_at = tokio::time::Instant::now() + IDLE_INTERVAL;
        loop {
            let next = tokio::select! {
                biased;
                () = self.closed.cancelled() => return Ok(()),
                // Before the next batch: where batches never end, what is due without them is done all the same.
                () = tokio::time::sleep_until(idle_at) => Err(()),
                next = self.work.recv() => Ok(next),
            };
            let settled = match next {
                Ok(None) => return Ok(()),
                Ok(Some((wanted, _))) if wanted != start => continue,
                Ok(Some((_, Work::Batch(batch)))) => {
                    self.take_in_hand(&batch);
                    let settled = self.apply(state, &batch).await;
                    self.put_down();
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
            settled?;
        }
    }

    async fn apply(&mut self, state: &mut H::Partition, batch: &Batch) -> Result<(), String> {
        let mut pause = Pause::default();
        let poison = loop {
            let outcome = {
                let _spans = spans::of_batch(batch, self.subscription.name);
                self.handler.apply(state, batch).await
            };
            match outcome {
                Ok(poison) => break poison,
                Err(Failure::Restart(reason)) => return Err(reason),
                Err(failure) => self.hold_or_leave(&mut pause, &failure).await?,
            }
        };
        self.bury(batch, poison).await?;
        if let Some(next) = batch.next_offset() {
            self.done.store(next, Ordering::Release);
        }
        Ok(())
    }

    /// The dead letters of a batch come before its commit.
    async fn bury(&mut self, batch: &Batch, poison: Vec<Poison>) -> Result<(), String> {
        let mut pause = Pause::default();
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
                let failure = Failure::Retry(format!("a dead letter cannot be written: {error}"));
                self.hold_or_leave(&mut pause, &failure).await?;
            }
        }
        Ok(())
    }

    async fn catch_up(&mut self, state: &mut H::Partition) -> Result<(), String> {
        let mut pause = Pause::default();
        loop {
            match self.handler.caught_up(state).await {
                Ok(()) => return Ok(()),
                Err(Failure::Restart(reason)) => return Err(reason),
                Err(failure) => self.hold_or_leave(&mut pause, &failure).await?,
            }
        }
    }

    async fn idle(&self, state: &mut H::Partition) -> Result<(), String> {
        match self.handler.idle(state).await {
            Ok(()) => Ok(()),
            Err(Failure::Restart(reason)) => Err(reason),
            // It is due again in a second anyway.
            Err(failure) => {
                let (consumer, partition) = (self.subscription.name, self.opening.partition);
                tracing::debug!(consumer, partition, "{failure}");
                Ok(())
            }
        }
    }

    async fn hold_or_leave(&self, pause: &mut Pause, failure: &Failure) -> Result<(), String> {
        self.progress.made();
        self.hold(pause, failure).await.ok_or_else(|| "taken away while a dependency was down".to_owned())
    }

    /// Waits before the next attempt; `None` when the partition was taken away meanwhile.
    async fn hold(&self, pause: &mut Pause, failure: &Failure) -> Option<()> {
        let (consumer, partition) = (self.subscription.name, self.opening.partition);
        counter!("postrider_consumer_retries_total", "consumer" => consumer).increment(1);
        let attempts = pause.attempts;
        if attempts.is_power_of_two() {
            tracing::warn!(consumer, partition, attempts, "holding a partition: {failure}");
        }
        if let Some(held) = &mut *self.hand.lock().unwrap_or_else(PoisonError::into_inner) {
            held.attempts = attempts;
            held.error = failure.to_string();
        }
        self.closed.run_until_cancelled(tokio::time::sleep(pause.next())).await
    }

    fn take_in_hand(&self, batch: &Batch) {
        let first = batch.iter().next();
        *self.hand.lock().unwrap_or_else(PoisonError::into_inner) = first.map(|record| Held {
            offset: record.offset(),
            key: record.key().map(|key| String::from_utf8_lossy(key).into_owned()),
            records: batch.len(),
            bytes: batch.footprint(),
            since: Instant::now(),
            attempts: 0,
            error: String::new(),
        });
    }

    fn put_down(&self) {
        *self.hand.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Exponential backoff with full jitter above a floor, 50 ms to 2 s.
struct Pause {
    attempts: u32,
}

impl Default for Pause {
    fn default() -> Self {
        Self { attempts: 1 }
    }
}

impl Pause {
    fn next(&mut self) -> Duration {
        let ceiling = 50_u64 << self.attempts.min(6);
        self.attempts = self.attempts.saturating_add(1);
        Duration::from_millis(50 + fastrand::u64(..ceiling.min(2_000)))
    }
}
