//! Computes the wait before the next attempt: arithmetic only, without a clock or a source of
//! randomness.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Growth of the wait from attempt to attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Growth {
    /// The same wait each time.
    Fixed,
    /// Doubled each time.
    Exponential,
}

/// Random variation of the wait, so that attempts that failed together are not retried together.
/// Full and equal jitter as in "Exponential Backoff And Jitter" (Marc Brooker, 2015).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Jitter {
    /// No variation.
    None,
    /// Between zero and the whole wait.
    Full,
    /// Between half of the wait and the whole wait.
    Equal,
}

/// Rule for the waits between attempts.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Wait after the first failure.
    pub base: Duration,
    /// Longest wait.
    pub cap: Duration,
    pub growth: Growth,
    pub jitter: Jitter,
}

impl Backoff {
    /// Returns the rule of a wait that doubles after each failure, up to `cap`, without jitter.
    pub const fn doubling(base: Duration, cap: Duration) -> Self {
        Self { base, cap, growth: Growth::Exponential, jitter: Jitter::None }
    }

    /// Returns the wait after `failures` failures in a row, 1 for the first. `chance` is a random
    /// number from 0 to 1.
    pub fn delay(&self, failures: u32, chance: f64) -> Duration {
        let whole = self.whole(failures);
        let share = chance.clamp(0.0, 1.0);
        match self.jitter {
            Jitter::None => whole,
            Jitter::Full => whole.mul_f64(share),
            Jitter::Equal => whole.mul_f64(0.5 + share / 2.0),
        }
        .min(self.cap)
    }

    fn whole(&self, failures: u32) -> Duration {
        let doublings = match self.growth {
            Growth::Fixed => 0,
            Growth::Exponential => failures.saturating_sub(1),
        };
        // After 31 doublings, any wait above zero has reached any sensible cap.
        self.base.saturating_mul(1_u32 << doublings.min(31)).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn backoff(growth: Growth, jitter: Jitter) -> Backoff {
        Backoff { base: SECOND, cap: SECOND * 60, growth, jitter }
    }

    #[test]
    fn a_fixed_wait_stays_the_same() {
        let fixed = backoff(Growth::Fixed, Jitter::None);
        assert_eq!([1, 2, 3, 1_000_000].map(|failures| fixed.delay(failures, 0.3)), [SECOND; 4]);
    }

    #[test]
    fn an_exponential_wait_doubles_up_to_its_cap() {
        let exponential = backoff(Growth::Exponential, Jitter::None);
        let waits = [1, 2, 3, 6, 7, 40, u32::MAX].map(|failures| exponential.delay(failures, 0.9).as_secs());
        assert_eq!(waits, [1, 2, 4, 32, 60, 60, 60]);
    }

    #[test]
    fn jitter_takes_the_whole_or_the_upper_half_of_the_wait() {
        let (full, equal) = (backoff(Growth::Fixed, Jitter::Full), backoff(Growth::Fixed, Jitter::Equal));
        assert_eq!([0.0, 0.5, 1.0].map(|chance| full.delay(1, chance).as_millis()), [0, 500, 1_000]);
        assert_eq!([0.0, 0.5, 1.0].map(|chance| equal.delay(1, chance).as_millis()), [500, 750, 1_000]);
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_the_cap_or_shorter_than_its_jitter_allows(
            base_ms in 0_u64..10_000_000, cap_ms in 0_u64..100_000_000, failures in 0_u32.., chance in 0.0_f64..1.0,
            exponential: bool,
        ) {
            let (base, cap) = (Duration::from_millis(base_ms), Duration::from_millis(cap_ms));
            let growth = if exponential { Growth::Exponential } else { Growth::Fixed };
            let rule = |jitter| Backoff { base, cap, growth, jitter };
            let whole = rule(Jitter::None).delay(failures, chance);
            prop_assert!(whole <= cap && whole >= base.min(cap));
            prop_assert!(rule(Jitter::Full).delay(failures, chance) <= whole);
            let equal = rule(Jitter::Equal).delay(failures, chance);
            prop_assert!(equal <= whole && equal >= whole / 2);
        }

        #[test]
        fn waits_never_shrink_from_failure_to_failure(base_ms in 0_u64..1_000_000, failures in 1_u32..100) {
            let rule = Backoff {
                base: Duration::from_millis(base_ms),
                cap: Duration::from_secs(3_600),
                growth: Growth::Exponential,
                jitter: Jitter::None,
            };
            prop_assert!(rule.delay(failures, 0.0) <= rule.delay(failures + 1, 0.0));
        }
    }
}
