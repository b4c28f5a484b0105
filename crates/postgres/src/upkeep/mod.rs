//! Upkeep of tables: rounds of steps that fail independently, [daily partitions](partitions), and
//! the [days in use](days) that retention counts.

pub mod days;
pub mod partitions;

use std::{fmt::Display, future::Future, time::Duration};

use metrics::counter;
use postrider_time::backoff::{Backoff, Growth, Jitter};

use super::query::{Error, within_at_most};

/// Pause after a round in which every step succeeded, up to a tenth more or less.
const EVERY: Duration = Duration::from_secs(600);
const AFTER_FAILURE: Backoff =
    Backoff { base: Duration::from_secs(15), cap: EVERY, growth: Growth::Exponential, jitter: Jitter::Equal };
/// Time limit of one statement that deletes a batch of rows, or counts the rows of a table.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rounds of upkeep of one area, such as the tables of a capability.
pub struct Upkeep {
    area: &'static str,
    failed: bool,
    failed_rounds: u32,
}

impl Upkeep {
    pub fn new(area: &'static str) -> Self {
        Self { area, failed: false, failed_rounds: 0 }
    }

    /// Runs one step of a round. A failure is logged and counted, and does not stop the other
    /// steps.
    pub async fn step<E: Display>(&mut self, step: &'static str, work: impl Future<Output = Result<(), E>>) {
        let outcome = work.await;
        // Registered by the first success as well, because an alert on the increase needs a zero to
        // start from.
        let failures = counter!("postrider_upkeep_failures_total", "area" => self.area, "step" => step);
        failures.increment(u64::from(outcome.is_err()));
        if let Err(error) = outcome {
            self.failed = true;
            tracing::warn!(area = self.area, step, error = %error, "upkeep step failed, retrying later");
        }
    }

    /// Ends a round and waits for the next one, which begins soon if a step failed.
    pub async fn pause(&mut self) {
        self.failed_rounds = if self.failed { self.failed_rounds.saturating_add(1) } else { 0 };
        self.failed = false;
        let pause = match self.failed_rounds {
            0 => EVERY.mul_f64(0.9 + fastrand::f64() * 0.2),
            failures => AFTER_FAILURE.delay(failures, fastrand::f64()),
        };
        tokio::time::sleep(pause).await;
    }
}

/// Repeats a statement that deletes up to `chunk` rows until it deletes fewer; `delete` returns the
/// number of deleted rows. Returns the total.
pub async fn in_chunks<F: Future<Output = Result<u64, sqlx::Error>>>(
    chunk: u64,
    delete: impl Fn() -> F,
) -> Result<u64, Error> {
    let mut all = 0;
    loop {
        let deleted = within_at_most(PATIENCE, delete()).await?;
        all += deleted;
        if deleted < chunk {
            return Ok(all);
        }
    }
}
