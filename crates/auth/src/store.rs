//! API keys in Postgres.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use postrider_postgres::query::{Error, within};
use sqlx::PgPool;

use super::{
    grant::Grant,
    key::{Hash, NewKey},
};

/// A stored key.
#[derive(Debug, Clone)]
pub struct KeyRow {
    pub id: String,
    pub subject: String,
    pub tenant: Option<String>,
    pub scopes: Vec<String>,
    pub note: String,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
}

/// A key that is neither revoked nor expired, as processes check it.
pub(crate) struct LiveKey {
    pub row: KeyRow,
    pub secret_hash: Hash,
}

type Row = (String, String, Option<String>, Vec<String>, String, i64, Option<i64>, Option<i64>, Vec<u8>);

const COLUMNS: &str = "
    id, subject, tenant, scopes, note, (extract(epoch FROM created_at) * 1000)::bigint,
    (extract(epoch FROM expires_at) * 1000)::bigint, (extract(epoch FROM revoked_at) * 1000)::bigint, secret_hash";

/// A trigger counts the change in the same transaction, so whoever reads the count sees the key.
const INSERT: &str = "
    INSERT INTO api_keys (id, secret_hash, subject, tenant, scopes, note, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7::double precision / 1000))";
const REVOKE: &str = "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1";

/// The table of keys.
#[derive(Clone)]
pub struct Store(pub PgPool);

impl Store {
    /// Stores a new key.
    pub async fn insert(&self, new: &NewKey, grant: &Grant) -> Result<(), Error> {
        let subject = grant.subject.as_deref().unwrap_or(&new.id);
        let insert = sqlx::query(INSERT)
            .bind(&new.id)
            .bind(&new.secret_hash[..])
            .bind(subject)
            .bind(&grant.tenant)
            .bind(&grant.scopes)
            .bind(&grant.note)
            .bind(grant.expires_at.map(milliseconds));
        within(insert.execute(&self.0)).await.map(drop)
    }

    /// Revokes a key. Returns false if there is none with this id.
    pub async fn revoke(&self, id: &str) -> Result<bool, Error> {
        within(sqlx::query(REVOKE).bind(id).execute(&self.0)).await.map(|done| done.rows_affected() > 0)
    }

    /// Returns the keys in the order of their ids, after this id, also those that are revoked or
    /// expired.
    pub async fn list(&self, after: &str, limit: u16) -> Result<Vec<KeyRow>, Error> {
        let text = format!("SELECT {COLUMNS} FROM api_keys WHERE id > $1 ORDER BY id LIMIT $2");
        let query = sqlx::query_as(sqlx::AssertSqlSafe(text)).bind(after).bind(i64::from(limit));
        let rows: Vec<Row> = within(query.fetch_all(&self.0)).await?;
        Ok(rows.into_iter().map(|row| live(row).0).collect())
    }

    /// Returns a key.
    pub async fn find(&self, id: &str) -> Result<Option<KeyRow>, Error> {
        let text = format!("SELECT {COLUMNS} FROM api_keys WHERE id = $1");
        let row: Option<Row> =
            within(sqlx::query_as(sqlx::AssertSqlSafe(text)).bind(id).fetch_optional(&self.0)).await?;
        Ok(row.map(|row| live(row).0))
    }

    /// Returns the number of changes so far.
    pub(crate) async fn changes(&self) -> Result<i64, Error> {
        within(sqlx::query_scalar("SELECT count FROM api_key_changes").fetch_one(&self.0)).await
    }

    /// Returns every key that is accepted.
    pub(crate) async fn live(&self) -> Result<Vec<LiveKey>, Error> {
        let text = format!(
            "SELECT {COLUMNS} FROM api_keys WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
        );
        let rows: Vec<Row> = within(sqlx::query_as(sqlx::AssertSqlSafe(text)).fetch_all(&self.0)).await?;
        let keys = rows.into_iter().map(live);
        // The table checks the length.
        Ok(keys.filter_map(|(row, hash)| Some(LiveKey { row, secret_hash: hash.try_into().ok()? })).collect())
    }
}

fn live(row: Row) -> (KeyRow, Vec<u8>) {
    let (id, subject, tenant, scopes, note, created_ms, expires_ms, revoked_ms, hash) = row;
    (KeyRow { id, subject, tenant, scopes, note, created_ms, expires_ms, revoked_ms }, hash)
}

/// Returns a time as milliseconds since 1970.
pub(crate) fn milliseconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Returns the time of these milliseconds since 1970.
pub(crate) fn time_of(milliseconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
}
