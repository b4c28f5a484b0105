//! Changed files, from the first attempt with them until the process restarts with them: the
//! verdict, and the wait for this process's turn.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use super::{Config, Fingerprint, Turn, Verdict};

/// Range of the pause between two requests for the lease, in milliseconds.
const LEASE_PAUSE_MS: std::ops::Range<u64> = 250..500;

/// Files that differ from those in use.
pub(super) struct Candidate {
    pub files: Fingerprint,
    pub verdict: Verdict,
    pub tried: Instant,
    pub warned: Instant,
    /// `true` if the process was not ready during the attempt, so that a restart interrupts
    /// nothing.
    pub is_away: bool,
    /// Holder of the lease, and the time at which the lease expires.
    pub holder: Option<(String, Instant)>,
    /// Time of this process's turn, if the lease is unavailable.
    pub turn: Option<Instant>,
}

impl Candidate {
    /// Returns the pause before this process asks for its turn again; `None` when its turn has
    /// come.
    pub async fn await_turn(&mut self, config: &Config) -> Option<Duration> {
        if self.is_away {
            tracing::info!("rotated files work, restarting at once because this process is not ready");
            return None;
        }
        let asked = match &mut self.verdict {
            Verdict::Works(Some(order)) => order.lease.take(&mut order.redis).await,
            _ => return self.await_random_turn(config, &"this process has no Redis"),
        };
        match asked {
            Ok(Turn::Ours) => {
                if let Some((holder, ends)) = self.holder.take_if(|(_, ends)| *ends <= Instant::now()) {
                    let late_ms = ends.elapsed().as_millis() as u64;
                    tracing::warn!(holder, late_ms, "rotation lease expired before its holder was ready again");
                }
                tracing::info!(lease.ms = config.lease_ms, "rotated files work, rotation lease taken, restarting");
                None
            }
            Ok(Turn::Theirs { holder, left }) => {
                if self.holder.as_ref().is_none_or(|(known, _)| *known != holder) {
                    let left_ms = left.as_millis() as u64;
                    tracing::info!(holder, left_ms, "rotated files work, waiting for the rotation lease");
                }
                self.holder = Some((holder, Instant::now() + left));
                Some(Duration::from_millis(fastrand::u64(LEASE_PAUSE_MS)))
            }
            Err(error) => self.await_random_turn(config, &error),
        }
    }

    fn await_random_turn(&mut self, config: &Config, problem: &dyn Display) -> Option<Duration> {
        let turn = *self.turn.get_or_insert_with(|| {
            let wait_ms = fastrand::u64(..=config.spread_ms);
            tracing::info!(
                %problem,
                wait.ms = wait_ms,
                "rotated files work, rotation lease unavailable, waiting for a random time"
            );
            Instant::now() + Duration::from_millis(wait_ms)
        });
        let left = turn.saturating_duration_since(Instant::now());
        if left.is_zero() {
            tracing::info!("rotated files work, restarting after a random wait");
            return None;
        }
        Some(left.min(Duration::from_secs(1)))
    }

    pub fn is_waiting(&self) -> bool {
        matches!(self.verdict, Verdict::Works(_)) && (self.holder.is_some() || self.turn.is_some())
    }

    pub async fn give_back(&mut self) {
        if let Verdict::Works(Some(order)) = &mut self.verdict
            && let Err(error) = order.lease.give_back(&mut order.redis).await
        {
            tracing::warn!(%error, "rotation lease not released, it will expire");
        }
    }
}
