//! Quarantined rows of the outbox: operators list them, release them to the outbox, or drop them.

use postrider_postgres::{
    query::{Error, within},
    transaction::Transaction,
};
use serde::Serialize;
use sqlx::PgPool;

/// Maximum time to wait for a drain that is quarantining rows.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '4s'";

/// Keeps rows from being quarantined while others are released. Otherwise a row that a drain
/// quarantines because an earlier one of its key is there would stay behind alone.
const LOCK: &str = "LOCK TABLE outbox_quarantine IN SHARE ROW EXCLUSIVE MODE";

/// Maximum number of keys released per transaction; all rows of a key are released together.
const KEYS: i64 = 100;

macro_rules! chosen {
    () => {
        " FROM outbox_quarantine WHERE (cardinality($1::bigint[]) = 0 OR id = ANY($1)) AND ($2::text IS NULL OR key = $2)"
    };
}

const LIST: &str = concat!(
    "SELECT id, topic, key, event_id::text, kind, octet_length(value) AS value_bytes, reason,
            to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') AS created_at,
            to_char(quarantined_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') AS quarantined_at",
    chosen!(),
    " ORDER BY id LIMIT $3"
);

const COUNT: &str = concat!("SELECT count(DISTINCT key), count(*)", chosen!());

/// Moves rows back with their original ids, before all later rows.
const RELEASE: &str = "
    WITH chosen AS MATERIALIZED (
        SELECT DISTINCT key FROM outbox_quarantine WHERE ($1::text IS NULL OR key = $1) AND key > $2 ORDER BY key LIMIT $3
    ), taken AS (
        DELETE FROM outbox_quarantine USING chosen WHERE outbox_quarantine.key = chosen.key RETURNING outbox_quarantine.*
    ), back AS (
        INSERT INTO outbox (id, topic, key, event_id, kind, source, traceparent, value)
        SELECT id, topic, key, event_id, kind, source, traceparent, value FROM taken ORDER BY id
    )
    SELECT count(DISTINCT key), count(*), max(key) FROM taken";

const DROP: &str =
    concat!("DELETE FROM outbox_quarantine WHERE id = ANY(ARRAY(SELECT id", chosen!(), " ORDER BY id LIMIT $3))");

/// Maximum number of rows per deletion.
const ROWS: i64 = 5_000;

/// Conditions on rows; all rows match if none is set.
#[derive(Debug, Default, Clone)]
pub struct Filter {
    pub ids: Vec<i64>,
    pub key: Option<String>,
}

/// A quarantined row, without its value.
#[derive(Debug, Serialize, sqlx::FromRow)]
pub struct Held {
    pub id: i64,
    /// Topic before the prefix.
    pub topic: String,
    pub key: String,
    pub event_id: String,
    pub kind: String,
    pub value_bytes: i32,
    /// Reason of the quarantine. Null for a row that was quarantined only because an earlier row of
    /// its key was.
    pub reason: Option<String>,
    /// Time in UTC, like `quarantined_at`.
    pub created_at: String,
    pub quarantined_at: String,
}

/// Matching rows, and their number.
#[derive(Debug, Serialize)]
pub struct Listing {
    pub matched: i64,
    /// The rows in the order of their ids.
    pub rows: Vec<Held>,
}

/// Number of keys and rows that were changed, or would be in a dry run.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    pub dry_run: bool,
    pub keys: i64,
    pub rows: i64,
}

/// The quarantine. Cheap to clone.
#[derive(Clone)]
pub struct Quarantine(PgPool);

impl Quarantine {
    pub fn new(pool: PgPool) -> Self {
        Self(pool)
    }

    /// Returns the oldest matching rows.
    pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Listing, Error> {
        let rows = sqlx::query_as(LIST).bind(&filter.ids).bind(&filter.key).bind(limit);
        Ok(Listing { matched: self.count(filter).await?.1, rows: within(rows.fetch_all(&self.0)).await? })
    }

    /// Counts matching keys and rows.
    async fn count(&self, filter: &Filter) -> Result<(i64, i64), Error> {
        within(sqlx::query_as(COUNT).bind(&filter.ids).bind(&filter.key).fetch_one(&self.0)).await
    }

    /// Moves all quarantined rows of a key, or of all keys, back to the outbox.
    pub async fn release(&self, key: Option<&str>, dry_run: bool) -> Result<Outcome, Error> {
        if dry_run {
            let (keys, rows) = self.count(&Filter { ids: Vec::new(), key: key.map(str::to_owned) }).await?;
            return Ok(Outcome { dry_run, keys, rows });
        }
        let (mut outcome, mut after) = (Outcome::default(), Some(String::new()));
        // Releases each key once: rows that are quarantined again in the meantime need another
        // call.
        while let Some(last) = after {
            let mut transaction = self.begin().await?;
            let release = sqlx::query_as(RELEASE).bind(key).bind(last).bind(KEYS);
            let (keys, rows, last): (i64, i64, Option<String>) = within(release.fetch_one(&mut *transaction)).await?;
            within(transaction.commit()).await?;
            outcome.keys += keys;
            outcome.rows += rows;
            after = last.filter(|_| keys >= KEYS);
        }
        Ok(outcome)
    }

    /// Deletes rows permanently. Later rows of their keys stay in quarantine until they are
    /// released.
    pub async fn drop_rows(&self, filter: &Filter, dry_run: bool) -> Result<Outcome, Error> {
        let mut outcome = Outcome { dry_run, ..Outcome::default() };
        (outcome.keys, outcome.rows) = self.count(filter).await?;
        let mut left = if dry_run { 0 } else { outcome.rows };
        while left > 0 {
            let query = sqlx::query(DROP).bind(&filter.ids).bind(&filter.key).bind(left.min(ROWS));
            let deleted = within(query.execute(&self.0)).await?.rows_affected().cast_signed();
            left = if deleted == 0 { 0 } else { left - deleted };
        }
        Ok(outcome)
    }

    async fn begin(&self) -> Result<Transaction, Error> {
        let mut transaction = within(Transaction::begin(&self.0)).await?;
        within(sqlx::raw_sql(LOCK_TIMEOUT).execute(&mut *transaction)).await?;
        within(sqlx::raw_sql(LOCK).execute(&mut *transaction)).await?;
        Ok(transaction)
    }
}
