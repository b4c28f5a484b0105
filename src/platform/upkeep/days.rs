//! Days in use, the measure of retention.
//!
//! The clock of the database may jump, by a month as well as by a minute. If retention compared with the clock alone, one
//! jump would delete everything. So processors note each day (UTC) on which they run, and data is past a retention of `n`
//! days when the clock says so **and** `n + 1` noted days came after its own. A clock that jumps ahead adds no day at once:
//! the first day after a gap is not counted, because a gap is either a jump or a time without processors, and nobody can
//! say which. From then on every day counts, so that retention keeps its pace whatever the clock is off by.
//!
//! A process notes a new day at most every [`SHORTEST_DAY`] by its own monotonic clock: a clock that jumps over and over, or
//! two servers with different clocks, cannot use up the retention.

use std::time::{Duration, Instant};

use sqlx::PgPool;

use crate::platform::query::{Error, within};

/// Less than a day, so that a process that started in the evening notes the next day before it is over.
const SHORTEST_DAY: Duration = Duration::from_secs(12 * 3_600);
/// 2,700 years: more than any retention, and still within what Postgres can take from a date.
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

/// What this process knows of the noted days.
#[derive(Debug, Default)]
pub struct Days {
    /// How many there were, and since when this process has known of that many.
    seen: Option<(i64, Instant)>,
}

impl Days {
    /// Notes the day of the database's clock, if it is due.
    pub async fn note(&mut self, pool: &PgPool) -> Result<(), Error> {
        let (noted, step, known): (i64, i32, bool) = within(sqlx::query_as(STATE).fetch_one(pool)).await?;
        if !self.may_note(noted, Instant::now()) || known {
            return Ok(());
        }
        within(sqlx::query(NOTE).execute(pool)).await?;
        if step > 1 {
            tracing::warn!(
                days = step,
                "the clock of Postgres is days ahead of the last day in use: it jumped, or no processor ran meanwhile"
            );
        }
        Ok(())
    }

    /// Whether a day may be noted now that there are so many. The first look of a process is trusted, so that days
    /// count although processes live for hours.
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

/// Where a retention begins, as texts that Postgres reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cutoff {
    /// The first day that is kept, by the clock alone.
    pub day_by_clock: String,
    /// The first day that is kept; `-infinity` where there are too few days in use.
    pub day: String,
    /// The first moment that is kept.
    pub time: String,
}

impl Cutoff {
    /// Returns the cutoff of a retention of so many days.
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
    fn a_process_notes_its_first_day_at_once_and_no_other_within_twelve_hours() {
        let (mut days, start) = (Days::default(), Instant::now());
        assert!(days.may_note(7, start));
        assert!(!days.may_note(8, start + HOUR), "there is one more since");
        assert!(!days.may_note(8, start + HOUR * 12));
        assert!(days.may_note(8, start + HOUR * 13));
        assert!(!days.may_note(9, start + HOUR * 14));
        assert!(!days.may_note(10, start + HOUR * 30), "another process noted one meanwhile");
        assert!(days.may_note(10, start + HOUR * 42));
    }
}
