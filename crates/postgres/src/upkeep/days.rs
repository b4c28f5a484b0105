//! Days in use, the measure of retention.
//!
//! The clock of the database may jump, by a minute or by a month. If retention compared with the
//! clock alone, one jump would delete everything. So processors record each day (UTC) on which they
//! run, and data is past a retention of `n` days when the clock says so **and** `n + 1` recorded
//! days came after its own. A clock that jumps ahead adds no day at once: the first day after a gap
//! is not counted, because a gap is either a jump or a time without processors, and the two cannot
//! be told apart. From then on every day counts, so that retention keeps its pace however wrong the
//! clock is.
//!
//! A process records a new day at most every [`SHORTEST_DAY`] by its own monotonic clock: neither a
//! clock that jumps over and over, nor two servers with different clocks, can use up the retention.

use std::time::{Duration, Instant};

use sqlx::PgPool;

use crate::query::{Error, within};

/// Shortest time between two days that a process records. Less than a day, so that a process that
/// started in the evening records the next day before it is over.
const SHORTEST_DAY: Duration = Duration::from_secs(12 * 3_600);
/// Longest retention, 2,700 years: more than any real one, and still within what Postgres can
/// subtract from a date.
const MOST_DAYS: u32 = 1_000_000;

const STATE: &str = "
    SELECT count(*), coalesce((now() AT TIME ZONE 'UTC')::date - max(day), 1),
           coalesce(bool_or(day = (now() AT TIME ZONE 'UTC')::date), false)
    FROM days_in_use";

const NOTE: &str = "INSERT INTO days_in_use (day) VALUES ((now() AT TIME ZONE 'UTC')::date) ON CONFLICT DO NOTHING";

/// The `n + 1`th newest counted day is the first that is kept.
const CUTOFF: &str = "
    WITH use AS (
        SELECT coalesce((
            SELECT day FROM days_in_use AS counted
            WHERE EXISTS (SELECT FROM days_in_use AS before WHERE before.day = counted.day - 1)
            ORDER BY day DESC OFFSET $1 LIMIT 1), '-infinity') AS day
    )
    SELECT ((now() AT TIME ZONE 'UTC')::date - $1)::text, least((now() AT TIME ZONE 'UTC')::date - $1, use.day)::text,
           least(now() - $1 * interval '1 day', use.day::timestamp AT TIME ZONE 'UTC')::text
    FROM use";

/// Recorded days, as known to this process.
#[derive(Debug, Default)]
pub struct Days {
    /// Number of recorded days, and the time since which this process has known that number.
    seen: Option<(i64, Instant)>,
}

impl Days {
    /// Records the day of the database's clock, if it is due.
    pub async fn note(&mut self, pool: &PgPool) -> Result<(), Error> {
        let (noted, step, known): (i64, i32, bool) = within(sqlx::query_as(STATE).fetch_one(pool)).await?;
        if !self.may_note(noted, Instant::now()) || known {
            return Ok(());
        }
        within(sqlx::query(NOTE).execute(pool)).await?;
        if step > 1 {
            tracing::warn!(
                days = step,
                "clock of Postgres is days ahead of the last day in use, it jumped or no processor ran meanwhile"
            );
        }
        Ok(())
    }

    /// Returns whether a day may be recorded, given the number of recorded days. The first look of
    /// a process is trusted, so that days count even if processes live only for hours.
    fn may_note(&mut self, noted: i64, now: Instant) -> bool {
        match self.seen {
            Some((seen, since)) if seen == noted => now.duration_since(since) >= SHORTEST_DAY,
            Some(_) => {
                self.seen = Some((noted, now));
                false
            }
            None => {
                self.seen = Some((noted, now));
                true
            }
        }
    }
}

/// Beginning of a retention, as texts that Postgres reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cutoff {
    /// First day that is kept, by the clock alone.
    pub day_by_clock: String,
    /// First day that is kept; `-infinity` if there are too few days in use.
    pub day: String,
    /// First moment that is kept.
    pub time: String,
}

impl Cutoff {
    /// Returns the cutoff of a retention of this many days.
    pub async fn of(pool: &PgPool, days: u32) -> Result<Self, Error> {
        let days = i32::try_from(days.clamp(1, MOST_DAYS)).unwrap_or(1);
        let (day_by_clock, day, time) = within(sqlx::query_as(CUTOFF).bind(days).fetch_one(pool)).await?;
        Ok(Self { day_by_clock, day, time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_process_records_its_first_day_at_once_and_no_other_within_twelve_hours() {
        let (mut days, start) = (Days::default(), Instant::now());
        assert!(days.may_note(7, start));
        assert!(!days.may_note(8, start + HOUR), "there is one more since");
        assert!(!days.may_note(8, start + HOUR * 12));
        assert!(days.may_note(8, start + HOUR * 13));
        assert!(!days.may_note(9, start + HOUR * 14));
        assert!(!days.may_note(10, start + HOUR * 30), "another process recorded one meanwhile");
        assert!(days.may_note(10, start + HOUR * 42));
    }
}
