//! The task of one partition: asks the handler, again and again where a dependency is down.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{Assignment, Batch, BatchHandler, Failure};
use crate::platform::{
    kafka::event,
    trace_context::{self, TraceContext},
};

/// What the polling thread tells a partition's task.
pub(super) enum Work {
    Batch(Batch),
    CaughtUp,
}

/// What a partition's task asks of the polling thread: to read from here on; what was handed over
/// before is stale.
#[derive(Debug)]
pub(super) struct Start {
    pub partition: i32,
    pub generation: u64,
    pub offset: i64,
}

/// The task of one partition in one assignment.
pub(super) struct Worker<H: BatchHandler, A> {
    pub handler: Arc<H>,
    pub partition: i32,
    pub generation: u64,
    pub work: mpsc::Receiver<(u64, Work)>,
    pub starts: std::sync::mpsc::Sender<Start>,
    /// Everything below this offset has its effect; -1 before the first batch.
    pub done: Arc<AtomicI64>,
    /// Looks up what there is to know about the partition.
    pub look_up: A,
    /// The partition is being taken away: finish the batch in hand and end.
    pub revoked: CancellationToken,
    pub name: &'static str,
}

impl<H, A, F> Worker<H, A>
where
    H: BatchHandler,
    A: Fn() -> F + Send,
    F: Future<Output = Result<Assignment, Failure>> + Send,
{
    pub async fn run(mut self) {
        // Counts the starts, so that batches handed over before the latest one are recognised.
        let mut start = 0;
        while !self.revoked.is_cancelled() {
            start += 1;
            let Some(mut state) = self.begin(start).await else { break };
            if let Err(problem) = self.work_through(start, &mut state).await {
                tracing::warn!(consumer = self.name, partition = self.partition, problem, "starting a partition over");
            }
        }
    }

    /// `None` when the partition was taken away meanwhile.
    async fn begin(&mut self, start: u64) -> Option<H::Partition> {
        let mut pause = Pause::default();
        loop {
            let attempt = async {
                let assignment = (self.look_up)().await?;
                self.handler.assigned(assignment).await
            };
            let outcome = self.revoked.run_until_cancelled(attempt).await?;
            match outcome {
                Ok((state, offset)) => {
                    let generation = self.generation << 16 | start;
                    // The polling thread outlives its workers, except in a crash.
                    let _ = self.starts.send(Start { partition: self.partition, generation, offset });
                    return Some(state);
                }
                Err(failure) => self.hold(&mut pause, &failure).await?,
            }
        }
    }

    /// Ends with `Ok` when the partition is taken away, with the reason when it must start over.
    async fn work_through(&mut self, start: u64, state: &mut H::Partition) -> Result<(), String> {
        let current = self.generation << 16 | start;
        loop {
            let next = tokio::select! {
                biased;
                () = self.revoked.cancelled() => return Ok(()),
                next = tokio::time::timeout(Duration::from_secs(1), self.work.recv()) => next,
            };
            let work = match next {
                Ok(None) => return Ok(()),
                Ok(Some((generation, _))) if generation != current => continue,
                Ok(Some((_, work))) => Some(work),
                Err(_) => None,
            };
            self.settle(state, work.as_ref()).await?;
            if let Some(Work::Batch(batch)) = work
                && let Some(next) = batch.next_offset()
            {
                self.done.store(next, Ordering::Release);
            }
        }
    }

    async fn settle(&mut self, state: &mut H::Partition, work: Option<&Work>) -> Result<(), String> {
        let mut pause = Pause::default();
        loop {
            let outcome = match work {
                Some(Work::Batch(batch)) => {
                    let _spans = spans(batch, self.name);
                    self.handler.apply(state, batch).await
                }
                Some(Work::CaughtUp) => self.handler.caught_up(state).await,
                None => self.handler.idle(state).await,
            };
            match outcome {
                Ok(()) => return Ok(()),
                Err(Failure::Restart(reason)) => return Err(reason),
                // Idle work is due again in a second anyway.
                Err(failure) if work.is_none() => {
                    tracing::debug!(consumer = self.name, partition = self.partition, "{failure}");
                    return Ok(());
                }
                Err(failure) => {
                    if self.hold(&mut pause, &failure).await.is_none() {
                        return Err("taken away while a dependency was down".to_owned());
                    }
                }
            }
        }
    }

    /// Waits before the next attempt; `None` when the partition was taken away meanwhile.
    async fn hold(&self, pause: &mut Pause, failure: &Failure) -> Option<()> {
        counter!("postrider_consumer_retries_total", "consumer" => self.name).increment(1);
        if pause.attempts.is_power_of_two() {
            let attempts = pause.attempts;
            tracing::warn!(
                consumer = self.name,
                partition = self.partition,
                attempts,
                "holding a partition: {failure}"
            );
        }
        self.revoked.run_until_cancelled(tokio::time::sleep(pause.next())).await
    }
}

/// Spans of one batch that are recorded at most.
const MAX_SPANS: usize = 32;

/// A span for every sampled record, in the trace of the request that wrote it.
fn spans(batch: &Batch, name: &'static str) -> Vec<tracing::Span> {
    let sampled = batch.iter().filter_map(|record| {
        let context = TraceContext::parse(record.header(event::TRACEPARENT)?)?;
        context.sampled.then_some((record.offset(), context))
    });
    let open = |(offset, parent): (i64, TraceContext)| {
        let span = tracing::info_span!(
            "process",
            otel.name = format!("process {name}"),
            otel.kind = "consumer",
            messaging.system = "kafka",
            messaging.kafka.offset = offset,
        );
        // Fails only where nothing records spans.
        let _ = span.set_parent(parent.to_otel());
        span
    };
    if trace_context::is_recording() { sampled.take(MAX_SPANS).map(open).collect() } else { Vec::new() }
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
