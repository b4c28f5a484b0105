//! The outbox in Postgres. All statements run on the connection that holds the locks of the shards,
//! so that a process that lost the locks can no longer read or delete rows.

use postrider_postgres::query::{Error, within};
use sqlx::PgConnection;

/// Number of partitions, which are used in turn; see the migration.
const SLOTS: i16 = 4;

/// Number of rows below which deletions share a prepared plan.
const FEW: usize = 100;

/// Size in bytes below which a partition is not truncated.
const SMALL: i64 = 1 << 20;

/// A row to send.
#[derive(Debug, sqlx::FromRow)]
pub struct Row {
    slot: i16,
    /// Physical location of the row (`ctid`), as text.
    place: String,
    pub id: i64,
    pub topic: String,
    pub key: String,
    pub event_id: String,
    pub kind: String,
    pub source: String,
    pub traceparent: Option<String>,
    pub value: String,
}

const PAGE: &str = "
    SELECT page.* FROM unnest($1::smallint[]) AS owned (number)
    CROSS JOIN LATERAL (
        SELECT slot, ctid::text AS place, id, topic, key, event_id::text, kind, source, traceparent, value
        FROM outbox WHERE shard = owned.number ORDER BY id LIMIT $2
    ) AS page";

/// Deletes rows by location, which needs no search. A location may hold a newer row by now, so the
/// id must match, too.
const FORGET: &str = "DELETE FROM outbox WHERE slot = $1 AND ctid = ANY($2::text[]::tid[]) AND id = ANY($3)";

/// Quarantines a row. A row without its own reason is quarantined only if another row of its key is
/// in quarantine, because an operator may have released that one just now.
const QUARANTINE: &str = "
    WITH taken AS (
        DELETE FROM outbox WHERE slot = $1 AND ctid = $2::text::tid AND id = $3
          AND ($4::text IS NOT NULL OR EXISTS (SELECT FROM outbox_quarantine WHERE outbox_quarantine.key = outbox.key))
        RETURNING *
    )
    INSERT INTO outbox_quarantine (id, topic, key, event_id, kind, source, traceparent, value, created_at, reason)
    SELECT id, topic, key, event_id, kind, source, traceparent, value, created_at, $4 FROM taken
    ON CONFLICT DO NOTHING";

/// Computes the age of the oldest row. The index returns the first row of each shard. All shards
/// are included, so that a shard without an owner is noticed.
const OLDEST: &str = "
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - first.created_at)), 0)::float8
    FROM generate_series(0, 7) AS shards (number)
    CROSS JOIN LATERAL (SELECT created_at FROM outbox WHERE shard = shards.number ORDER BY id LIMIT 1) AS first";

/// Prepares a connection for the locks and the rounds. Keepalives make Postgres notice when this
/// host is lost.
pub async fn prepare(connection: &mut PgConnection) -> Result<(), Error> {
    // A lost deletion only causes its row to be sent again.
    let settings = sqlx::raw_sql(
        "SET synchronous_commit = off; SET tcp_keepalives_idle = 1; SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 1",
    );
    within(settings.execute(connection)).await.map(|_| ())
}

/// Returns rows of these shards, in order per shard, up to `limit` rows of each. All rows come from
/// one snapshot, so that a row is never returned before one that its transaction waited for.
pub async fn page(connection: &mut PgConnection, shards: &[i16], limit: i64) -> Result<Vec<Row>, Error> {
    within(sqlx::query_as(PAGE).bind(shards).bind(limit).fetch_all(connection)).await
}

/// Deletes rows whose records Kafka has stored.
pub async fn forget(connection: &mut PgConnection, rows: &[&Row]) -> Result<(), Error> {
    for slot in 0..SLOTS {
        let (places, ids): (Vec<&str>, Vec<i64>) =
            rows.iter().filter(|row| row.slot == slot).map(|row| (row.place.as_str(), row.id)).unzip();
        if !ids.is_empty() {
            // For many rows the planner must know the ids; a generic plan would compare each with
            // each.
            let (query, few) = (sqlx::query(FORGET).bind(slot), ids.len() < FEW);
            within(query.bind(places).bind(ids).persistent(few).execute(&mut *connection)).await?;
        }
    }
    Ok(())
}

/// Moves a row to the quarantine. `reason` is `None` for a row that only has the key of a
/// quarantined one. Returns `false` if that one is no longer in quarantine.
pub async fn quarantine(connection: &mut PgConnection, row: &Row, reason: Option<&str>) -> Result<bool, Error> {
    let query = sqlx::query(QUARANTINE).bind(row.slot).bind(&row.place).bind(row.id).bind(reason);
    Ok(within(query.execute(connection)).await?.rows_affected() > 0)
}

/// Returns the keys that have rows in quarantine, and the number of rows.
pub async fn quarantined(connection: &mut PgConnection) -> Result<(Vec<String>, i64), Error> {
    let query = sqlx::query_as("SELECT key, count(*) FROM outbox_quarantine GROUP BY key");
    let held: Vec<(String, i64)> = within(query.fetch_all(connection)).await?;
    let rows = held.iter().map(|(_, rows)| rows).sum();
    Ok((held.into_iter().map(|(key, _)| key).collect(), rows))
}

/// Returns the age of the oldest row of any shard, in seconds; 0 without rows.
pub async fn oldest_s(connection: &mut PgConnection) -> Result<f64, Error> {
    within(sqlx::query_scalar(OLDEST).fetch_one(connection)).await
}

/// Truncates the partition that is two turns away from the current one, if it is empty and no
/// transaction uses it. Deleted rows would otherwise occupy space until no older transaction is
/// open.
pub async fn rotate(connection: &mut PgConnection) -> Result<(), Error> {
    let oldest = sqlx::query_as(
        "SELECT slot::smallint, pg_relation_size(format('%I', 'outbox_' || slot)::regclass)
         FROM (SELECT (extract(epoch FROM clock_timestamp())::bigint / 10 + 2) % 4 AS slot) AS turn",
    );
    let (slot, bytes): (i16, i64) = within(oldest.fetch_one(&mut *connection)).await?;
    if bytes < SMALL {
        return Ok(());
    }
    // The name is one of four. Without NOWAIT, writers would queue behind this lock.
    let attempt = format!(
        "BEGIN;
         LOCK TABLE outbox_{slot} IN ACCESS EXCLUSIVE MODE NOWAIT;
         DO $$ BEGIN IF NOT EXISTS (SELECT FROM outbox_{slot}) THEN TRUNCATE outbox_{slot}; END IF; END $$;
         COMMIT"
    );
    match within(sqlx::raw_sql(sqlx::AssertSqlSafe(attempt)).execute(&mut *connection)).await {
        Ok(_) => Ok(()),
        Err(error) => {
            within(sqlx::raw_sql("ROLLBACK").execute(connection)).await?;
            if error.is_locked() { Ok(()) } else { Err(error) }
        }
    }
}
