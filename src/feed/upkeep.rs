//! What is remembered for a while, and then forgotten: events by the day, idempotency keys, deleted posts.

use std::time::Duration;

use metrics::gauge;
use sqlx::{AssertSqlSafe, PgPool};

use super::job_store;

const EVERY: Duration = Duration::from_secs(600);
const AFTER_FAILURE: Duration = Duration::from_secs(15);
/// Days that are made ahead.
const AHEAD: i32 = 2;
/// Rows forgotten by one statement.
const ROWS: i64 = 5_000;

/// Days by their partitions' names, in UTC.
const DAYS: &str = "
    SELECT to_char(day, '\"processed_events_d\"YYYYMMDD'), to_char(day, 'YYYY-MM-DD'), to_char(day + interval '1 day', 'YYYY-MM-DD')
    FROM generate_series(date_trunc('day', now() AT TIME ZONE 'UTC') + interval '1 day',
                         date_trunc('day', now() AT TIME ZONE 'UTC') + $1::int * interval '1 day', interval '1 day') AS day
    WHERE to_regclass(to_char(day, '\"processed_events_d\"YYYYMMDD')) IS NULL";

const OLD: &str = "
    SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = 'processed_events'::regclass AND relname ~ '^processed_events_d[0-9]{8}$'
      AND to_date(right(relname, 8), 'YYYYMMDD') < (now() AT TIME ZONE 'UTC')::date - $1::int
    ORDER BY relname";

/// A deleted post stays for as long as its event may still be on its way.
const FORGET: [&str; 3] = [
    "DELETE FROM feed_requests WHERE event_id = ANY(ARRAY(
        SELECT event_id FROM feed_requests WHERE made_at < now() - $1::int * interval '1 day' LIMIT $2))",
    "DELETE FROM posts WHERE id = ANY(ARRAY(
        SELECT id FROM posts WHERE deleted_at < now() - $1::int * interval '1 day' LIMIT $2))",
    "DELETE FROM processed_events_default WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM processed_events_default WHERE seen_at < now() - $1::int * interval '1 day' LIMIT $2))",
];

/// Looks again and again; says what it could not do.
pub async fn keep(pool: PgPool, memory_days: u32) {
    let days = i32::try_from(memory_days.max(1)).unwrap_or(i32::MAX);
    loop {
        let pause = match look(&pool, days).await {
            Ok(()) => EVERY,
            Err(error) => {
                tracing::warn!(error = %error, "what feeds remember could not be looked after; it is kept longer");
                AFTER_FAILURE
            }
        };
        tokio::time::sleep(pause.mul_f64(0.9 + fastrand::f64() * 0.2)).await;
    }
}

/// Reports every few seconds how many jobs there are.
pub async fn count_jobs(pool: PgPool) {
    let mut unknown = 0;
    loop {
        if let Ok(counted) = job_store::count(&pool).await {
            gauge!("postrider_feed_jobs_waiting").set(counted.known as f64);
            gauge!("postrider_feed_jobs_oldest_age_seconds").set(counted.oldest_s);
            gauge!("postrider_feed_jobs_unknown").set(counted.unknown as f64);
            if counted.unknown > unknown {
                let (jobs, kind) = (counted.unknown, counted.kind.unwrap_or_default());
                tracing::warn!(jobs, kind, "jobs of kinds that this version does not know wait for a newer one");
            }
            unknown = counted.unknown;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

async fn look(pool: &PgPool, memory_days: i32) -> Result<(), sqlx::Error> {
    let mut connection = pool.begin().await?;
    // Others do the same; and nobody is to wait behind us, while we wait for a lock.
    sqlx::raw_sql(
        "SET LOCAL lock_timeout = '2s'; SELECT pg_advisory_xact_lock(hashtext(current_schema() || '.processed_events'))",
    )
    .execute(&mut *connection)
    .await?;
    let missing: Vec<(String, String, String)> = sqlx::query_as(DAYS).bind(AHEAD).fetch_all(&mut *connection).await?;
    for (name, from, to) in &missing {
        let create = format!(
            "CREATE TABLE {name} PARTITION OF processed_events FOR VALUES FROM ('{from} 00:00+00') TO ('{to} 00:00+00')"
        );
        sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *connection).await?;
    }
    let old: Vec<String> = sqlx::query_scalar(OLD).bind(memory_days).fetch_all(&mut *connection).await?;
    for name in &old {
        sqlx::raw_sql(AssertSqlSafe(format!("DROP TABLE {name}"))).execute(&mut *connection).await?;
    }
    connection.commit().await?;
    for name in &old {
        tracing::info!(table = name, "dropped a day's partition of processed events");
    }
    for forget in FORGET {
        while sqlx::query(forget).bind(memory_days).bind(ROWS).execute(pool).await?.rows_affected() == ROWS as u64 {}
    }
    Ok(())
}
