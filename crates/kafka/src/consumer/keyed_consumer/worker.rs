//! Worker of the keyed shape: takes a record that may run, calls the handler, and reports the
//! outcome to the schedule.

use std::{
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures_util::{FutureExt, future::poll_immediate};
use metrics::counter;
use postrider_time::clock;
use tracing::Instrument;

use super::{
    Pool,
    schedule::{Job, Schedule, Ticket},
    window::Trouble,
};
use crate::{
    consumer::{Delivery, KeyedHandler, Outcome, spans, work::hold_pause},
    dead_letter::{Letter, Reason},
};

/// Result of one attempt at a record, for the schedule.
enum Verdict {
    Finished,
    Delayed {
        due: Instant,
        note: Note,
    },
    /// The partition was lost meanwhile.
    Lost,
}

/// Failure history to record after an attempt that did not finish its record.
enum Note {
    Failed(Reason),
    Held(String),
    /// The record is to be dead-lettered, but the dead letter could not be stored yet.
    Unstored {
        reason: Reason,
        problem: String,
    },
}

/// Processes records until none is ready.
pub(super) async fn work<H: KeyedHandler>(pool: Arc<Pool<H>>) {
    let mut last: Option<(Ticket, Verdict)> = None;
    loop {
        let job = {
            let mut schedule = pool.schedule();
            if let Some((ticket, verdict)) = last.take() {
                settle(&mut schedule, ticket, verdict);
            }
            let job = schedule.next();
            if job.is_none() {
                // The count changes under the lock, so that a thread that makes the next record
                // ready sees that this worker has ended.
                pool.workers.fetch_sub(1, Ordering::AcqRel);
            }
            job
        };
        let Some(job) = job else { return };
        let ticket = job.ticket;
        let verdict = run_attempt(&pool, job).await;
        pool.progress.made();
        last = Some((ticket, verdict));
    }
}

fn settle(schedule: &mut Schedule, ticket: Ticket, verdict: Verdict) {
    match verdict {
        Verdict::Finished => schedule.finish(ticket),
        Verdict::Delayed { due, note } => schedule.delay(ticket, due, |trouble| remember(trouble, note)),
        Verdict::Lost => {}
    }
}

fn remember(trouble: &mut Trouble, note: Note) {
    match note {
        Note::Held(problem) => {
            trouble.holds += 1;
            trouble.last_error = problem;
        }
        Note::Failed(reason) => {
            count_failure(trouble);
            trouble.holds = 0;
            trouble.last_error = reason.message;
        }
        Note::Unstored { reason, problem } => {
            if trouble.dead_letter.is_none() {
                count_failure(trouble);
            }
            trouble.holds += 1;
            trouble.last_error = problem;
            trouble.dead_letter = Some(reason);
        }
    }
}

fn count_failure(trouble: &mut Trouble) {
    trouble.attempts += 1;
    trouble.last_failed_ms = clock::now_ms();
    if trouble.first_failed_ms == 0 {
        trouble.first_failed_ms = trouble.last_failed_ms;
    }
}

async fn run_attempt<H: KeyedHandler>(pool: &Arc<Pool<H>>, mut job: Job) -> Verdict {
    let dead_letter = job.trouble.as_mut().and_then(|trouble| trouble.dead_letter.take());
    let trouble = job.trouble.unwrap_or_default();
    let delivery = Delivery {
        batch: job.batch,
        index: job.index,
        partition: job.ticket.partition,
        topic: pool.topic.clone(),
        attempt: trouble.attempts + 1,
    };
    let attempt = async {
        let outcome = match dead_letter {
            Some(reason) => Outcome::DeadLetter(reason),
            None => handle(&*pool.handler, &delivery, pool.subscription.name).await,
        };
        conclude(pool, &delivery, &trouble, outcome).await
    };
    let mut attempt = pin!(attempt);
    // Most handlers that do not wait finish at the first poll, at no further cost.
    if let Some(verdict) = poll_immediate(attempt.as_mut()).await {
        return verdict;
    }
    if pool.schedule().has_ready() {
        pool.add_worker();
    }
    let guard = pool.guard(job.ticket);
    guard.run_until_cancelled(attempt).await.unwrap_or(Verdict::Lost)
}

/// Calls the handler. If it panics, the record is dead-lettered and the process continues.
async fn handle<H: KeyedHandler>(handler: &H, delivery: &Delivery, name: &'static str) -> Outcome {
    let handled = AssertUnwindSafe(handler.handle(delivery)).catch_unwind();
    let handled = match spans::of_record(&delivery.record(), name) {
        None => handled.await,
        Some(span) => handled.instrument(span).await,
    };
    handled.unwrap_or_else(|_| {
        Outcome::DeadLetter(Reason { class: "panic", message: "the handler panicked on this record".to_owned() })
    })
}

async fn conclude<H: KeyedHandler>(
    pool: &Pool<H>,
    delivery: &Delivery,
    trouble: &Trouble,
    outcome: Outcome,
) -> Verdict {
    let name = pool.subscription.name;
    match outcome {
        Outcome::Done => Verdict::Finished,
        Outcome::RetryAfter(pause, reason) => {
            counter!("postrider_consumer_retries_total", "consumer" => name).increment(1);
            Verdict::Delayed { due: Instant::now() + pause, note: Note::Failed(reason) }
        }
        Outcome::Hold(problem) => {
            counter!("postrider_consumer_retries_total", "consumer" => name).increment(1);
            if trouble.holds.is_power_of_two() {
                tracing::warn!(
                    consumer = name,
                    partition = delivery.partition,
                    offset = delivery.record().offset(),
                    "record held, retrying: {problem}"
                );
            }
            Verdict::Delayed { due: Instant::now() + hold_pause(trouble.holds + 1), note: Note::Held(problem) }
        }
        Outcome::DeadLetter(reason) => store_dead_letter(pool, delivery, trouble, reason).await,
    }
}

async fn store_dead_letter<H: KeyedHandler>(
    pool: &Pool<H>,
    delivery: &Delivery,
    trouble: &Trouble,
    reason: Reason,
) -> Verdict {
    let failed_ms = clock::now_ms();
    let letter = Letter {
        topic: &delivery.topic,
        partition: delivery.partition,
        record: delivery.record(),
        group: &pool.subscription.group,
        reason: &reason,
        attempts: delivery.attempt,
        first_failed_ms: if trouble.first_failed_ms == 0 { failed_ms } else { trouble.first_failed_ms },
        last_failed_ms: failed_ms,
    };
    match pool.subscription.dead_letters.store(&letter).await {
        Ok(()) => {
            pool.handler.dead_lettered(delivery, &reason);
            Verdict::Finished
        }
        Err(error) => {
            let problem = format!("cannot store its dead letter: {error}");
            let due = Instant::now() + hold_pause(trouble.holds + 1);
            Verdict::Delayed { due, note: Note::Unstored { reason, problem } }
        }
    }
}
