//! Rows that were put aside: listed, put back, or dropped, as somebody decides.

use serde::Serialize;
use sqlx::{PgPool, Postgres, Transaction};

use crate::platform::query::{Error, within};

/// Time to wait for a relay that is putting rows aside just now.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '4s'";

/// Nothing comes to the quarantine while rows leave it: a row that a relay puts aside because one before it is there
/// would else stay behind alone.
const LOCK: &str = "LOCK TABLE outbox_quarantine IN SHARE ROW EXCLUSIVE MODE";

/// Keys that are put back together, to bound a transaction; all rows of a key are.
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

/// With the ids they had: before everything that came later.
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

/// Rows of one deletion.
const ROWS: i64 = 5_000;

/// Which rows; all where nothing is said.
#[derive(Debug, Default, Clone)]
pub struct Filter {
    pub ids: Vec<i64>,
    pub key: Option<String>,
}

/// A row, without its value.
#[derive(Debug, Serialize, sqlx::FromRow)]
pub struct Held {
    pub id: i64,
    /// Before the prefix.
    pub topic: String,
    pub key: String,
    pub event_id: String,
    pub kind: String,
    pub value_bytes: i32,
    /// Null for those that only came later than one with a reason.
    pub reason: Option<String>,
    /// UTC, as `quarantined_at`.
    pub created_at: String,
    pub quarantined_at: String,
}

/// Rows and how many match.
#[derive(Debug, Serialize)]
pub struct Listing {
    pub matched: i64,
    /// In their order.
    pub rows: Vec<Held>,
}

/// What was done, or would be.
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

    /// The oldest rows that match.
    pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Listing, Error> {
        let rows = sqlx::query_as(LIST).bind(&filter.ids).bind(&filter.key).bind(limit);
        Ok(Listing { matched: self.count(filter).await?.1, rows: within(rows.fetch_all(&self.0)).await? })
    }

    /// Keys and rows.
    async fn count(&self, filter: &Filter) -> Result<(i64, i64), Error> {
        within(sqlx::query_as(COUNT).bind(&filter.ids).bind(&filter.key).fetch_one(&self.0)).await
    }

    /// Puts all rows of a key back into the outbox, or those of all keys.
    pub async fn release(&self, key: Option<&str>, dry_run: bool) -> Result<Outcome, Error> {
        if dry_run {
            let (keys, rows) = self.count(&Filter { ids: Vec::new(), key: key.map(str::to_owned) }).await?;
            return Ok(Outcome { dry_run, keys, rows });
        }
        let (mut outcome, mut after) = (Outcome::default(), Some(String::new()));
        // Each key once: what is put aside again meanwhile is for another time.
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

    /// Deletes rows for good. Later rows of their keys wait until they are released.
    pub async fn drop_rows(&self, filter: &Filter, dry_run: bool) -> Result<Outcome, Error> {
        let mut outcome = Outcome { dry_run, ..Outcome::default() };
        (outcome.keys, outcome.rows) = self.count(filter).await?;
        let mut left = if dry_run { 0 } else { outcome.rows };
        while left > 0 {
            let query = sqlx::query(DROP).bind(&filter.ids).bind(&filter.key).bind(left.min(ROWS));
            let gone = within(query.execute(&self.0)).await?.rows_affected().cast_signed();
            left = if gone == 0 { 0 } else { left - gone };
        }
        Ok(outcome)
    }

    async fn begin(&self) -> Result<Transaction<'static, Postgres>, Error> {
        let mut transaction = within(self.0.begin()).await?;
        within(sqlx::raw_sql(LOCK_TIMEOUT).execute(&mut *transaction)).await?;
        within(sqlx::raw_sql(LOCK).execute(&mut *transaction)).await?;
        Ok(transaction)
    }
}
