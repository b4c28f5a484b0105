//! The table's partitions: one for each day, made ahead, and dropped when they are old; and receivers, who are
//! forgotten when they have had no message for long.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, PgPool};

/// Days that are made ahead.
const AHEAD: u32 = 3;
const EVERY: Duration = Duration::from_secs(600);
const AFTER_FAILURE: Duration = Duration::from_secs(15);
/// Ids, or receivers, forgotten by one statement.
const CHUNK: i64 = 10_000;
/// How often is looked for receivers that can be forgotten: it reads their whole table.
const RECEIVERS_EVERY: Duration = Duration::from_secs(24 * 3_600);

/// Days by their partitions' names, in UTC.
const DAYS: &str = "
    SELECT to_char(day, '\"messages_d\"YYYYMMDD'), to_char(day, 'YYYY-MM-DD'), to_char(day + interval '1 day', 'YYYY-MM-DD')
    FROM generate_series(date_trunc('day', now() AT TIME ZONE 'UTC'),
                         date_trunc('day', now() AT TIME ZONE 'UTC') + $1::int * interval '1 day', interval '1 day') AS day
    WHERE to_regclass(to_char(day, '\"messages_d\"YYYYMMDD')) IS NULL";

const OLD: &str = "
    SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = 'messages'::regclass AND relname ~ '^messages_d[0-9]{8}$'
      AND to_date(right(relname, 8), 'YYYYMMDD') < (now() AT TIME ZONE 'UTC')::date - $1::int
    ORDER BY relname";

const FORGET: &str = "
    DELETE FROM message_ids WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM message_ids WHERE stored_at < now() - $1::int * interval '1 day' LIMIT $2))";

/// For as long again as messages are kept, whoever is behind is told of the gap. One that gets a message
/// meanwhile is locked by whoever stores it, and stays.
const FORGET_RECEIVERS: &str = "
    WITH idle AS (
        SELECT receiver_id, topic_epoch, partition, last FROM message_receivers
        WHERE last_stored_at < now() - (2 * $1::int + 1) * interval '1 day' LIMIT $2 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM message_receivers AS head USING idle
        WHERE head.receiver_id = idle.receiver_id AND head.topic_epoch = idle.topic_epoch
          AND head.partition = idle.partition AND head.last = idle.last
        RETURNING 1
    ), known AS (
        DELETE FROM message_cursors AS known USING idle
        WHERE known.receiver_id = idle.receiver_id AND known.topic_epoch = idle.topic_epoch
          AND known.partition = idle.partition AND known.delivered <= idle.last
    )
    SELECT count(*) FROM gone";

/// Looks again and again; says what it did, and what it could not do.
pub async fn keep(pool: PgPool, retention_days: u32) {
    let days = i32::try_from(retention_days.max(1)).unwrap_or(i32::MAX);
    let mut receivers_looked: Option<Instant> = None;
    loop {
        let looked = async {
            look(&pool, days).await?;
            if receivers_looked.is_none_or(|at| at.elapsed() > RECEIVERS_EVERY) {
                forget_receivers(&pool, days).await?;
                receivers_looked = Some(Instant::now());
            }
            Ok::<_, sqlx::Error>(())
        };
        let pause = match looked.await {
            Ok(()) => EVERY,
            Err(error) => {
                tracing::warn!(error = %error, "the partitions of messages could not be looked after; the default one takes what comes");
                AFTER_FAILURE
            }
        };
        tokio::time::sleep(pause.mul_f64(0.9 + fastrand::f64() * 0.2)).await;
    }
}

async fn look(pool: &PgPool, retention_days: i32) -> Result<(), sqlx::Error> {
    let mut connection = pool.begin().await?;
    // Others do the same; and nobody is to wait behind us, while we wait for a lock.
    sqlx::raw_sql(
        "SET LOCAL lock_timeout = '2s'; SELECT pg_advisory_xact_lock(hashtext(current_schema() || '.messages'))",
    )
    .execute(&mut *connection)
    .await?;
    let missing: Vec<(String, String, String)> =
        sqlx::query_as(DAYS).bind(i32::try_from(AHEAD).unwrap_or(1)).fetch_all(&mut *connection).await?;
    for (name, from, to) in &missing {
        let create = format!(
            "CREATE TABLE {name} PARTITION OF messages FOR VALUES FROM ('{from} 00:00+00') TO ('{to} 00:00+00')"
        );
        sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *connection).await?;
    }
    let old: Vec<String> = sqlx::query_scalar(OLD).bind(retention_days).fetch_all(&mut *connection).await?;
    for name in &old {
        sqlx::raw_sql(AssertSqlSafe(format!("DROP TABLE {name}"))).execute(&mut *connection).await?;
    }
    connection.commit().await?;
    for (name, ..) in &missing {
        tracing::info!(table = name, "made a day's partition of messages ahead");
    }
    for name in &old {
        tracing::info!(table = name, retention.days = retention_days, "dropped a day's partition of messages");
    }
    while sqlx::query(FORGET).bind(retention_days).bind(CHUNK).execute(pool).await?.rows_affected() == CHUNK as u64 {}
    let late = "DELETE FROM messages_default WHERE stored_at < now() - $1::int * interval '1 day'";
    sqlx::query(late).bind(retention_days).execute(pool).await.map(|_| ())
}

async fn forget_receivers(pool: &PgPool, retention_days: i32) -> Result<(), sqlx::Error> {
    let mut forgotten = 0;
    loop {
        let gone: i64 = sqlx::query_scalar(FORGET_RECEIVERS).bind(retention_days).bind(CHUNK).fetch_one(pool).await?;
        forgotten += gone;
        if gone < CHUNK {
            break;
        }
    }
    if forgotten > 0 {
        tracing::info!(receivers = forgotten, "forgot receivers that have had no message for long");
    }
    Ok(())
}
