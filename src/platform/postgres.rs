//! The Postgres pool, its migrations, and the watch that readiness shows.

use std::{str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::{
    Executor, PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{config::Secret, ops::Check};

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// How Postgres is reached.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `postgres://user:password@host:port/database`; TLS by `?sslmode=verify-full&sslrootcert=…`.
    pub url: Secret,
    /// Schema that holds our tables.
    pub schema: String,
    /// Connections at most, per process.
    pub max_connections: u32,
    /// Connections kept warm.
    pub min_connections: u32,
    /// Wait for a connection, in milliseconds.
    pub acquire_timeout_ms: u64,
    /// Prepared statements kept per connection; 0 for PgBouncer in transaction mode.
    pub statement_cache: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: Secret::default(),
            schema: "postrider".to_owned(),
            max_connections: 16,
            min_connections: 1,
            acquire_timeout_ms: 3_000,
            statement_cache: 100,
        }
    }
}

/// What can be wrong before any query.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`postgres.url` is not set")]
    NoUrl,
    #[error("`postgres.schema` may have letters, digits and `_` only")]
    BadSchema,
    #[error("Postgres: {0}")]
    Database(#[from] sqlx::Error),
    #[error("migrations: {0}")]
    Migration(#[from] MigrateError),
}

/// A pool that connects when first used.
pub fn pool(config: &Config) -> Result<PgPool, Error> {
    if config.url.is_empty() {
        return Err(Error::NoUrl);
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if config.schema.is_empty() || !config.schema.bytes().all(plain) {
        return Err(Error::BadSchema);
    }
    let options = PgConnectOptions::from_str(config.url.expose())?
        .application_name("postrider")
        .statement_cache_capacity(config.statement_cache)
        // Statements are short, and the planner's guess at the cost of partitions makes it compile some of them for longer
        // than they run.
        .options([("search_path", config.schema.as_str()), ("jit", "off")]);
    Ok(PgPoolOptions::new()
        .max_connections(config.max_connections)
        .min_connections(config.min_connections)
        .acquire_timeout(Duration::from_millis(config.acquire_timeout_ms))
        .connect_lazy_with(options))
}

/// Creates the schema and applies what is missing; safe to run beside itself and the old version.
/// Returns how many migrations there are.
pub async fn migrate(config: &Config) -> Result<usize, Error> {
    let pool = pool(config)?;
    let mut connection = pool.acquire().await?;
    create_schema(&mut connection, &config.schema).await?;
    MIGRATIONS.run(&mut *connection).await?;
    Ok(MIGRATIONS.iter().count())
}

/// Asks first, because creating needs a right that whoever made the schema for us may not have given.
async fn create_schema(connection: &mut PgConnection, schema: &str) -> Result<(), sqlx::Error> {
    let found: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)")
        .bind(schema)
        .fetch_one(&mut *connection)
        .await?;
    if found {
        return Ok(());
    }
    // `pool` has checked the name.
    let create = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
    match connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(create))).await {
        // Somebody else made it between the question and the statement.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Asks every two seconds whether Postgres answers and has our tables.
pub async fn watch(pool: PgPool, check: Check) {
    let newest = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0);
    loop {
        match applied(&pool).await {
            Ok(version) if version >= newest => check.pass(),
            Ok(version) => {
                check.fail(format!("schema is at {version}, this version needs {newest}: run `postrider migrate`"))
            }
            Err(error) => check.fail(format!("Postgres does not answer: {error}")),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

async fn applied(pool: &PgPool) -> Result<i64, sqlx::Error> {
    let known: Option<String> =
        sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations')::text").fetch_one(pool).await?;
    if known.is_none() {
        return Ok(0);
    }
    let version: Option<i64> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success").fetch_one(pool).await?;
    Ok(version.unwrap_or(0))
}
