//! Query plans of the statements that run for each read or batch. All of them must use indexes, so
//! that their cost does not grow with the tables.

use postrider_postgres::transaction::Transaction;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Executor, PgPool, Row};

use super::{fan_out, job_steps, reads, trim};

/// Tables that grow with users and posts.
const LARGE: [&str; 4] = ["posts", "follows", "feed_rows", "feed_authors"];

/// Hot statements: name, SQL, and parameter values for `EXPLAIN`.
const HOT: [(&str, &str, &str); 7] = [
    ("page", reads::PAGE, "'u7', 1000000, 20"),
    ("own rows", reads::OWN_ROWS, "'u7', 1000000, 100"),
    ("whom to merge", reads::MERGED, "'u7'"),
    ("posts of an author", reads::OF_AUTHOR, "'u7', 1000000, 100"),
    ("fan-out of a batch", fan_out::FAN_OUT, "ARRAY[11, 12, 13]::bigint[]"),
    ("fan-out of a step", job_steps::FAN_OUT, "'u7', '', 12, 1000"),
    ("trimming", trim::CHUNK, "'u7', 100, 10000, 11000"),
];

/// The plan of a statement for unknown parameter values.
#[derive(Debug, Serialize)]
pub struct Explained {
    pub statement: &'static str,
    pub plan: String,
    /// Large tables that the plan reads sequentially.
    pub scanned: Vec<&'static str>,
}

/// Explains all hot statements without running them.
pub async fn explain_hot(pool: &PgPool) -> Result<Vec<Explained>, sqlx::Error> {
    let mut all = Vec::new();
    for (name, statement, values) in HOT {
        all.push(explain(pool, name, statement, values).await?);
    }
    Ok(all)
}

/// Explains a statement. Postgres must be able to infer the parameter types from the statement.
pub async fn explain(
    pool: &PgPool,
    statement: &'static str,
    sql: &str,
    values: &str,
) -> Result<Explained, sqlx::Error> {
    let mut transaction = Transaction::begin(pool).await?;
    let prepare = format!("SET LOCAL plan_cache_mode = force_generic_plan; PREPARE feed_hot AS {sql}");
    transaction.execute(sqlx::raw_sql(AssertSqlSafe(prepare))).await?;
    let explain = format!("EXPLAIN EXECUTE feed_hot({values})");
    let rows = transaction.fetch_all(sqlx::raw_sql(AssertSqlSafe(explain))).await?;
    transaction.execute("DEALLOCATE feed_hot").await?;
    transaction.rollback().await?;
    let lines: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let scans = |table: &&str| {
        let scan = format!("Seq Scan on {table}");
        lines
            .iter()
            .any(|line| line.split_once(&scan).is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with(' ')))
    };
    let scanned = LARGE.iter().copied().filter(|table| scans(table)).collect();
    Ok(Explained { statement, plan: lines.join("\n"), scanned })
}
