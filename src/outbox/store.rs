//! The outbox in Postgres. All statements run on the connection that holds the shards' locks: whoever lost them
//! cannot read or delete any more.

use sqlx::PgConnection;

use crate::platform::query::{Error, within};

/// Partitions that take turns; see the migration.
const SLOTS: i16 = 4;

/// Deletions of fewer rows are planned once for all.
const FEW: usize = 100;

/// A partition smaller than this, in bytes, is not worth truncating.
const SMALL: i64 = 1 << 20;

/// What is to be sent.
#[derive(Debug, sqlx::FromRow)]
pub struct Row {
    slot: i16,
    /// Where the row lies, as Postgres writes it.
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

/// By their places, which costs no search; a place may have a new row by now, so the id must be right, too.
const FORGET: &str = "DELETE FROM outbox WHERE slot = $1 AND ctid = ANY($2::text[]::tid[]) AND id = ANY($3)";

/// Without a reason of its own a row only follows one that is there: somebody may have put that back just now.
const QUARANTINE: &str = "
    WITH taken AS (
        DELETE FROM outbox WHERE slot = $1 AND ctid = $2::text::tid AND id = $3
          AND ($4::text IS NOT NULL OR EXISTS (SELECT FROM outbox_quarantine WHERE outbox_quarantine.key = outbox.key))
        RETURNING *
    )
    INSERT INTO outbox_quarantine (id, topic, key, event_id, kind, source, traceparent, value, created_at, reason)
    SELECT id, topic, key, event_id, kind, source, traceparent, value, created_at, $4 FROM taken
    ON CONFLICT DO NOTHING";

/// The index gives the first of each shard; all shards, because one without an owner is what must be seen.
const OLDEST: &str = "
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - first.created_at)), 0)::float8
    FROM generate_series(0, 7) AS shards (number)
    CROSS JOIN LATERAL (SELECT created_at FROM outbox WHERE shard = shards.number ORDER BY id LIMIT 1) AS first";

/// A connection for the locks and the rounds, whose end Postgres notices when our host is gone, too.
pub async fn prepare(connection: &mut PgConnection) -> Result<(), Error> {
    // A deletion that is lost is a row that is sent again.
    let settings = sqlx::raw_sql(
        "SET synchronous_commit = off; SET tcp_keepalives_idle = 1; SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 1",
    );
    within(settings.execute(connection)).await.map(|_| ())
}

/// Rows of these shards, those of each in order, up to `limit` of each. All are of one moment: a row is never seen
/// before one that its transaction waited for.
pub async fn page(connection: &mut PgConnection, shards: &[i16], limit: i64) -> Result<Vec<Row>, Error> {
    within(sqlx::query_as(PAGE).bind(shards).bind(limit).fetch_all(connection)).await
}

/// Deletes rows that Kafka has.
pub async fn forget(connection: &mut PgConnection, rows: &[&Row]) -> Result<(), Error> {
    for slot in 0..SLOTS {
        let (places, ids): (Vec<&str>, Vec<i64>) =
            rows.iter().filter(|row| row.slot == slot).map(|row| (row.place.as_str(), row.id)).unzip();
        if !ids.is_empty() {
            // Where there are many, the ids must be known to the planner, which else compares each with each.
            let (query, few) = (sqlx::query(FORGET).bind(slot), ids.len() < FEW);
            within(query.bind(places).bind(ids).persistent(few).execute(&mut *connection)).await?;
        }
    }
    Ok(())
}

/// Puts a row aside. Those that only have the key of a bad one have no reason; false where that is not there any more.
pub async fn quarantine(connection: &mut PgConnection, row: &Row, reason: Option<&str>) -> Result<bool, Error> {
    let query = sqlx::query(QUARANTINE).bind(row.slot).bind(&row.place).bind(row.id).bind(reason);
    Ok(within(query.execute(connection)).await?.rows_affected() > 0)
}

/// Keys that have a row in quarantine, and how many rows there are.
pub async fn quarantined(connection: &mut PgConnection) -> Result<(Vec<String>, i64), Error> {
    let query = sqlx::query_as("SELECT key, count(*) FROM outbox_quarantine GROUP BY key");
    let held: Vec<(String, i64)> = within(query.fetch_all(connection)).await?;
    let rows = held.iter().map(|(_, rows)| rows).sum();
    Ok((held.into_iter().map(|(key, _)| key).collect(), rows))
}

/// How old the oldest row of any shard is, in seconds; 0 without rows.
pub async fn oldest_s(connection: &mut PgConnection) -> Result<f64, Error> {
    within(sqlx::query_scalar(OLDEST).fetch_one(connection)).await
}

/// Truncates the partition whose turn is longest ago, where all its rows are gone and nobody writes to it. Deleted
/// rows would stay until no transaction anywhere is older than they are.
pub async fn rotate(connection: &mut PgConnection) -> Result<(), Error> {
    let oldest = sqlx::query_as(
        "SELECT slot::smallint, pg_relation_size(format('%I', 'outbox_' || slot)::regclass)
         FROM (SELECT (extract(epoch FROM clock_timestamp())::bigint / 10 + 2) % 4 AS slot) AS turn",
    );
    let (slot, bytes): (i16, i64) = within(oldest.fetch_one(&mut *connection)).await?;
    if bytes < SMALL {
        return Ok(());
    }
    // The name is one of four. Without NOWAIT, writers would queue behind us.
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
