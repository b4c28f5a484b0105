//! Deletion of data that is kept for a limited time: processed events (by day), idempotency keys,
//! deleted posts.

use std::time::Duration;

use metrics::gauge;
use postrider_postgres::{
    query::Error,
    upkeep::{
        Upkeep,
        days::{Cutoff, Days},
        in_chunks,
        partitions::DailyTable,
    },
};
use sqlx::PgPool;

use super::job_store;

const EVENTS: DailyTable =
    DailyTable { name: "processed_events", title: "processed events", time: "seen_at", days_ahead: 2 };
/// Number of rows deleted by one statement.
const ROWS: u32 = 5_000;

const FORGET_REQUESTS: &str = "
    DELETE FROM feed_requests WHERE event_id = ANY(ARRAY(
        SELECT event_id FROM feed_requests WHERE made_at < $1::text::timestamptz LIMIT $2))";

/// Deletes posts marked as deleted, once their events cannot be in transit any more.
const FORGET_POSTS: &str = "
    DELETE FROM posts WHERE id = ANY(ARRAY(
        SELECT id FROM posts WHERE deleted_at < $1::text::timestamptz LIMIT $2))";

/// Maintains the tables until the task is dropped; logs failures.
pub async fn keep(pool: PgPool, memory_days: u32) {
    let (mut upkeep, mut days) = (Upkeep::new("feed"), Days::default());
    loop {
        upkeep.step("days", days.note(&pool)).await;
        upkeep.step("create", EVENTS.create(&pool)).await;
        upkeep.step("count", EVENTS.count_default(&pool)).await;
        upkeep.step("expire", EVENTS.expire(&pool, memory_days)).await;
        upkeep.step("requests", forget(&pool, FORGET_REQUESTS, memory_days)).await;
        upkeep.step("posts", forget(&pool, FORGET_POSTS, memory_days)).await;
        upkeep.pause().await;
    }
}

/// Reports the number of jobs every few seconds.
pub async fn count_jobs(pool: PgPool) {
    let mut unknown = 0;
    loop {
        if let Ok(counted) = job_store::count(&pool).await {
            gauge!("postrider_feed_jobs_waiting").set(counted.known as f64);
            gauge!("postrider_feed_jobs_oldest_age_seconds").set(counted.oldest_s);
            gauge!("postrider_feed_jobs_unknown").set(counted.unknown as f64);
            if counted.unknown > unknown {
                let (jobs, kind) = (counted.unknown, counted.kind.unwrap_or_default());
                tracing::warn!(jobs, kind, "jobs of unknown kinds wait for a newer version");
            }
            unknown = counted.unknown;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

async fn forget(pool: &PgPool, statement: &'static str, memory_days: u32) -> Result<(), Error> {
    let cutoff = Cutoff::of(pool, memory_days).await?;
    let forget = || async {
        let query = sqlx::query(statement).bind(&cutoff.time).bind(i64::from(ROWS));
        query.execute(pool).await.map(|done| done.rows_affected())
    };
    in_chunks(u64::from(ROWS), forget).await.map(|_| ())
}
