//! The Postgres pool, its migrations, and the watch behind its readiness check.

pub mod query;
pub mod table_size;
pub mod transaction;
pub mod upkeep;

use std::{
    io,
    str::FromStr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::{Mutex, MutexGuard};
use postrider_config::{SecretUrl, trial::Fault};
use postrider_health::Check;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::{
    Connection, Executor, PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::query::within;

/// Settings of every session. The server ends a session whose client does not respond for about
/// eight seconds, so that its locks are released, and a session that was left in the middle of a
/// transaction.
const SESSION: [(&str, &str); 5] = [
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "1"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "8000"),
    ("idle_in_transaction_session_timeout", "30000"),
];
/// A connection that was used less than this long ago is taken from the pool without a test.
const MAX_UNTESTED: Duration = Duration::from_secs(1);
/// Time limit of testing settings before they are put into use.
const TRIAL_PATIENCE: Duration = Duration::from_secs(10);
/// Time limit of a test, after which a connection counts as silent.
const PING_PATIENCE: Duration = Duration::from_secs(1);

/// Migrations of this version. A newer version may have applied more, which keep what this one
/// needs (migrations/README.md).
static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("../../migrations");
    migrations.set_ignore_missing(true);
    migrations
});

/// Variable that sets `postgres.url`, and an example of its value.
const URL_VARIABLE: &str = "POSTRIDER_POSTGRES__URL";
const URL_EXAMPLE: &str = "postgres://user:password@host:5432/database";

/// Connection to Postgres.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `postgres://user:password@host:port/database`; TLS by `?sslmode=verify-full&sslrootcert=…`.
    pub url: SecretUrl,
    /// Schema that holds postrider's tables.
    pub schema: String,
    /// Maximum number of connections per process.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_connections: u32,
    /// Number of connections that are kept open.
    #[schemars(range(max = 10_000))]
    pub min_connections: u32,
    /// Longest wait for a connection, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub acquire_timeout_ms: u64,
    /// Maximum number of prepared statements per connection; 0 for PgBouncer in transaction mode.
    pub statement_cache: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: SecretUrl::default(),
            schema: "postrider".to_owned(),
            max_connections: 16,
            min_connections: 1,
            acquire_timeout_ms: 3_000,
            statement_cache: 100,
        }
    }
}

/// Errors before any query.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`postgres.url` is not set; set it, or the variable {URL_VARIABLE}, to a URL such as {URL_EXAMPLE}")]
    NoUrl,
    #[error("`postgres.schema` may only contain letters, digits and `_`")]
    BadSchema,
    #[error("`postgres.url` is not a Postgres URL: {0}")]
    BadUrl(String),
    #[error("Postgres: {0}")]
    Database(#[from] sqlx::Error),
    #[error("migrations: {0}")]
    Migration(#[from] MigrateError),
}

/// Checks the settings without connecting.
pub fn check(config: &Config) -> Result<(), Error> {
    session_options(config).map(drop)
}

/// Returns the options of new sessions.
fn session_options(config: &Config) -> Result<PgConnectOptions, Error> {
    if config.url.is_empty() {
        return Err(Error::NoUrl);
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if config.schema.is_empty() || !config.schema.bytes().all(plain) {
        return Err(Error::BadSchema);
    }
    Ok(connect_options(&config.url)?
        .application_name("postrider")
        .statement_cache_capacity(config.statement_cache)
        // Statements are short, and the planner's estimate of the cost of partitions makes it
        // compile some of them for longer than they run.
        .options([("search_path", config.schema.as_str()), ("jit", "off")])
        .options(SESSION))
}

/// Creates a pool that connects when first used.
pub fn pool(config: &Config) -> Result<PgPool, Error> {
    let options = session_options(config)?;
    let silence = Arc::new(Silence::default());
    let at_release = silence.clone();
    Ok(PgPoolOptions::new()
        .max_connections(config.max_connections)
        .min_connections(config.min_connections)
        .acquire_timeout(Duration::from_millis(config.acquire_timeout_ms))
        // The pool's own test waits forever on a connection that hangs.
        .test_before_acquire(false)
        .before_acquire(move |connection, about| {
            let silence = silence.clone();
            Box::pin(async move {
                let tested = about.idle_for < MAX_UNTESTED;
                Ok(silence.admits(about.idle_for) && (tested || silence.test(connection).await?))
            })
        })
        .after_release(move |connection, _| {
            let silence = at_release.clone();
            Box::pin(async move { silence.test(connection).await })
        })
        .connect_lazy_with(options))
}

/// Parameters of a URL that sqlx knows. It logs other parameters with their values.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// Parses the URL. Removes unknown parameters, and masks credentials in errors.
fn connect_options(url: &SecretUrl) -> Result<PgConnectOptions, Error> {
    let invalid = |error: &dyn std::fmt::Display| Error::BadUrl(url.mask_in(&error.to_string()));
    let mut parsed = url::Url::parse(url.expose()).map_err(|error| invalid(&error))?;
    if !["postgres", "postgresql"].contains(&parsed.scheme()) {
        return Err(invalid(&"it must begin with postgres:// or postgresql://"));
    }
    let pairs: Vec<(String, String)> = parsed.query_pairs().into_owned().collect();
    let is_known = |name: &str| PARAMETERS.contains(&name) || name.starts_with("options[");
    if let Some((name, _)) = pairs.iter().find(|(name, _)| !is_known(name)) {
        tracing::warn!(parameter = name, "unknown parameter of `postgres.url` ignored");
        let known = pairs.iter().filter(|(name, _)| is_known(name));
        parsed.query_pairs_mut().clear().extend_pairs(known);
    }
    PgConnectOptions::from_str(parsed.as_str()).map_err(|error| invalid(&error))
}

/// Time at which a connection last hung. The network has then probably dropped the state of all
/// open connections, so connections that have been idle since are closed rather than tested one
/// after the other.
#[derive(Default)]
struct Silence(Mutex<Option<Instant>>);

impl Silence {
    fn last(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock()
    }

    fn admits(&self, idle: Duration) -> bool {
        self.last().is_none_or(|silent_at| silent_at.elapsed() >= idle)
    }

    /// Returns whether a connection works. Silence is an error, after which the pool closes the
    /// connection without sending anything more.
    async fn test(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        let Ok(answer) = tokio::time::timeout(PING_PATIENCE, connection.ping()).await else {
            *self.last() = Some(Instant::now());
            counter!("postrider_postgres_connections_silent_total").increment(1);
            let text = format!("no answer within {} s on an open connection", PING_PATIENCE.as_secs());
            return Err(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text)));
        };
        Ok(answer.is_ok())
    }
}

/// Creates the schema and applies missing migrations. Safe to run concurrently with itself and with
/// the old version, and on the schema of a newer version. Returns the number of migrations of this
/// version.
pub async fn migrate(config: &Config) -> Result<usize, Error> {
    let pool = pool(config)?;
    let mut connection = pool.acquire().await?;
    create_schema(&mut connection, &config.schema).await?;
    MIGRATIONS.run(&mut *connection).await?;
    Ok(MIGRATIONS.iter().count())
}

/// Creates the schema if it is missing. Checks first, because creating needs a privilege that an
/// operator who created the schema may not have granted.
async fn create_schema(connection: &mut PgConnection, schema: &str) -> Result<(), sqlx::Error> {
    let found: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)")
        .bind(schema)
        .fetch_one(&mut *connection)
        .await?;
    if found {
        return Ok(());
    }
    // `pool` has validated the name.
    let create = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
    match connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(create))).await {
        // Another process created it between the query and the statement.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Checks every two seconds whether Postgres answers and has all migrations of this version. Never
/// returns.
pub async fn watch(pool: PgPool, check: Check) {
    loop {
        match missing(&pool).await {
            Ok(missing) if missing.is_empty() => check.pass(),
            Ok(missing) => {
                check.fail(format!("the schema lacks migrations {missing:?} of this version; run `postrider migrate`"));
            }
            Err(error) => check.fail(format!("Postgres does not answer: {error}")),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Returns the numbers of this version's migrations that are not applied. Those of a newer version
/// do not matter.
async fn missing(pool: &PgPool) -> Result<Vec<i64>, query::Error> {
    let mut connection = within(pool.acquire()).await?;
    within(missing_over(&mut connection)).await
}

async fn missing_over(connection: &mut PgConnection) -> Result<Vec<i64>, sqlx::Error> {
    let known: Option<String> =
        sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations')::text").fetch_one(&mut *connection).await?;
    let applied: Vec<i64> = match known {
        Some(_) => {
            sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(connection).await?
        }
        None => Vec::new(),
    };
    let ours = MIGRATIONS.iter().map(|migration| migration.version);
    Ok(ours.filter(|version| !applied.contains(version)).collect())
}

/// Tests settings before they are put into use: opens a session and, if `with_tables` is set,
/// checks the migrations.
pub async fn try_out(config: &Config, with_tables: bool) -> Result<(), Fault> {
    let options = session_options(config).map_err(|error| Fault::Refused(error.to_string()))?;
    let attempt = async {
        let mut connection = PgConnection::connect_with(&options).await?;
        connection.execute("SELECT 1").await?;
        let missing = if with_tables { missing_over(&mut connection).await? } else { Vec::new() };
        Ok((missing, connection.close().await).0)
    };
    match tokio::time::timeout(TRIAL_PATIENCE, attempt).await {
        Ok(Ok(missing)) if missing.is_empty() => Ok(()),
        Ok(Ok(missing)) => Err(Fault::Refused(format!("the schema lacks migrations {missing:?} of this version"))),
        Ok(Err(error)) => Err(fault(config, &error)),
        Err(_) => Err(Fault::Unreachable(format!("no answer within {} s", TRIAL_PATIENCE.as_secs()))),
    }
}

fn fault(config: &Config, error: &sqlx::Error) -> Fault {
    let text = config.url.mask_in(&error.to_string());
    // SQLSTATE classes of connection exceptions, too many connections, and a server that starts or
    // stops.
    let is_busy = |code: &str| ["08", "53", "57"].iter().any(|class| code.starts_with(class));
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => Fault::Unreachable(text),
        sqlx::Error::Database(error) if error.code().is_some_and(|code| is_busy(&code)) => Fault::Unreachable(text),
        _ => Fault::Refused(text),
    }
}
