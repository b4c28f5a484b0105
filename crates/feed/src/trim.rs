//! Retention: a walk over all feeds, a few users at a time, that trims feeds with too many rows. A
//! feed's floor is raised before its rows are deleted, and readers respect the floor, so that no
//! page shows a partly trimmed feed.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use postrider_postgres::{
    query::{Error, within},
    transaction::Transaction,
};
use sqlx::PgPool;

use super::Config;

/// Minimum pause between two chunks.
const PAUSE: Duration = Duration::from_millis(100);
/// Pause between two chunks as a multiple of the time of the last one, so that a walk keeps a tenth
/// of a processor busy.
const REST: u32 = 9;
/// Maximum interval between two checks whether a walk is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a failure.
const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Number of users per chunk: initial and maximum.
const USERS: (i64, i64) = (100, 2_000);
/// Target time of a chunk; the number of users is adapted to it.
const CHUNK_TIME: Duration = Duration::from_millis(50);

/// Locks the walk. Returns no row while another process has it, or before the next walk is due.
const TURN: &str = "
    SELECT after_user, (extract(epoch FROM now() - begins_at))::float8 FROM feed_walk WHERE begins_at <= now()
    FOR UPDATE SKIP LOCKED";

/// Selects the next users that have rows, each by one index lookup. Raises the floor of those that
/// have more rows than are kept, and returns them with those that have rows below their floor.
pub(super) const CHUNK: &str = "
    WITH RECURSIVE users AS (
        (SELECT user_id, 1 AS place FROM feed_rows WHERE user_id > $1::text ORDER BY user_id LIMIT 1)
        UNION ALL
        SELECT (SELECT user_id FROM feed_rows WHERE user_id > users.user_id ORDER BY user_id LIMIT 1), place + 1
        FROM users WHERE users.user_id IS NOT NULL AND place < $2::bigint
    ), looked AS (
        SELECT users.user_id, feed_floors.floor AS old,
               CASE WHEN EXISTS (
                   SELECT FROM feed_rows WHERE feed_rows.user_id = users.user_id AND post_id >= coalesce(feed_floors.floor, 0)
                   ORDER BY post_id DESC OFFSET $4::bigint)
               THEN (SELECT post_id FROM feed_rows WHERE feed_rows.user_id = users.user_id ORDER BY post_id DESC OFFSET $3::bigint - 1 LIMIT 1)
               END AS new
        FROM users LEFT JOIN feed_floors ON feed_floors.user_id = users.user_id WHERE users.user_id IS NOT NULL
    ), due AS (
        SELECT user_id, greatest(old, new) AS floor FROM looked
        WHERE new IS NOT NULL
           OR (old IS NOT NULL AND EXISTS (SELECT FROM feed_rows WHERE feed_rows.user_id = looked.user_id AND post_id < old))
    ), raised AS (
        INSERT INTO feed_floors AS known (user_id, floor) SELECT user_id, floor FROM due ORDER BY user_id
        ON CONFLICT (user_id) DO UPDATE SET floor = greatest(known.floor, excluded.floor)
    )
    SELECT (SELECT count(*) FROM looked), (SELECT max(user_id) FROM looked),
           coalesce((SELECT array_agg(user_id) FROM due), '{}')";

const TRIM: &str = "
    DELETE FROM feed_rows WHERE user_id = $1 AND post_id = ANY(ARRAY(
        SELECT post_id FROM feed_rows
        WHERE user_id = $1 AND post_id < (SELECT floor FROM feed_floors WHERE user_id = $1) ORDER BY post_id LIMIT $2))";

const GO_ON: &str = "UPDATE feed_walk SET after_user = $1";

const END: &str = "UPDATE feed_walk SET after_user = '', begins_at = now() + $1 * interval '1 millisecond'";

/// Totals of a walk in this process.
#[derive(Debug, Default)]
struct Tally {
    feeds: i64,
    trimmed: u64,
    rows: u64,
}

/// Trims feeds in repeated walks over all of them.
pub struct Trimmer {
    pool: PgPool,
    config: Config,
    users: i64,
    tally: Tally,
}

impl Trimmer {
    pub fn new(pool: PgPool, config: Config) -> Self {
        Self { pool, config, users: USERS.0, tally: Tally::default() }
    }

    /// Runs until the task is dropped. Without a limit on rows there is nothing to do.
    pub async fn run(mut self) {
        let Some(kept) = self.config.kept_rows() else { return std::future::pending().await };
        loop {
            let begun = Instant::now();
            let pause = match self.chunk(kept).await {
                Ok(ControlFlow::Continue(())) => {
                    let took = begun.elapsed();
                    self.users = if took > CHUNK_TIME { self.users / 2 } else { self.users * 2 };
                    PAUSE.max(took * REST)
                }
                Ok(ControlFlow::Break(())) => self.config.trim_interval().clamp(PAUSE, CHECK_INTERVAL),
                Err(error) => {
                    tracing::warn!(error = %error, "feed trimming failed, retrying");
                    self.users /= 4;
                    AFTER_FAILURE
                }
            };
            self.users = self.users.clamp(1, USERS.1);
            tokio::time::sleep(pause.mul_f64(0.9 + fastrand::f64() * 0.2)).await;
        }
    }

    /// Trims the next few users. Returns `Break` if no walk is due or another process has it.
    async fn chunk(&mut self, kept: i64) -> Result<ControlFlow<()>, Error> {
        let mut turn = within(Transaction::begin(&self.pool)).await?;
        let found: Option<(String, f64)> = within(sqlx::query_as(TURN).fetch_optional(&mut *turn)).await?;
        let Some((after, walking_s)) = found else {
            within(turn.rollback()).await?;
            return Ok(ControlFlow::Break(()));
        };
        gauge!("postrider_feed_trim_walk_age_seconds").set(walking_s);
        // Trims only feeds well above the limit, so that not every walk deletes a few rows of every
        // feed.
        let chunk = sqlx::query_as(CHUNK).bind(after).bind(self.users).bind(kept).bind(kept + kept / 10);
        // Runs in its own transaction, so that readers see the floors before rows are deleted.
        let (feeds, last, due): (i64, Option<String>, Vec<String>) = within(chunk.fetch_one(&self.pool)).await?;
        self.tally.feeds += feeds;
        for user in due {
            self.trim(&user).await?;
        }
        match last.filter(|_| feeds >= self.users) {
            Some(last) => within(sqlx::query(GO_ON).bind(last).execute(&mut *turn)).await?,
            None => self.end(&mut turn).await?,
        };
        within(turn.commit()).await?;
        Ok(ControlFlow::Continue(()))
    }

    async fn trim(&mut self, user: &str) -> Result<(), Error> {
        let rows = self.config.chunk_rows.max(1);
        self.tally.trimmed += 1;
        loop {
            let deleted = within(sqlx::query(TRIM).bind(user).bind(rows).execute(&self.pool)).await?.rows_affected();
            counter!("postrider_feed_trimmed_rows_total").increment(deleted);
            self.tally.rows += deleted;
            if deleted < rows.unsigned_abs() {
                return Ok(());
            }
        }
    }

    async fn end(&mut self, turn: &mut Transaction) -> Result<sqlx::postgres::PgQueryResult, Error> {
        let Tally { feeds, trimmed, rows } = std::mem::take(&mut self.tally);
        counter!("postrider_feed_trim_walks_total").increment(1);
        if rows > 0 {
            tracing::info!(feeds, trimmed, rows, "feeds trimmed");
        }
        within(sqlx::query(END).bind(self.config.trim_interval_ms as f64).execute(&mut **turn)).await
    }
}
