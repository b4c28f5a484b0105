//! Tables with a partition for each day (UTC). Partitions are created ahead, and dropped when they
//! are past their retention. A default partition takes rows whose day has no partition.
//!
//! Postgres refuses a day's partition while the default partition holds rows of that day. So the
//! day's table is created separately, takes its rows out of the default partition, and is attached,
//! all in one transaction: readers see each row exactly once. Writers wait meanwhile; readers wait
//! only at the end, when the table is attached.

use std::time::Duration;

use metrics::gauge;
use sqlx::{AssertSqlSafe, PgPool};

use super::{PATIENCE, days::Cutoff, in_chunks};
use crate::{
    query::{Error, within, within_at_most},
    transaction::Transaction,
};

/// Time limit of moving the rows of a day, or of reading the default partition; the server ends a
/// move a little earlier.
const MOVE_PATIENCE: Duration = Duration::from_secs(330);
/// Limits the wait for a lock, because other sessions wait behind it meanwhile, and the time of a
/// statement.
const LOCKS: &str = "SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '300s'";
/// Maximum number of expired rows of the default partition that one statement deletes.
const CHUNK: u64 = 10_000;

/// A table with daily partitions `NAME_dYYYYMMDD` and `NAME_default`.
#[derive(Debug, Clone, Copy)]
pub struct DailyTable {
    pub name: &'static str,
    /// Name in logs.
    pub title: &'static str,
    /// Column that the table is partitioned by.
    pub time: &'static str,
    /// Number of days that are created ahead.
    pub days_ahead: i32,
}

/// A day without a partition, as texts from Postgres.
#[derive(Debug, sqlx::FromRow)]
struct Day {
    table: String,
    first: String,
    next: String,
}

impl Day {
    /// Returns the SQL condition for the rows of the day.
    fn covers(&self, time: &str) -> String {
        format!("{time} >= '{} 00:00+00' AND {time} < '{} 00:00+00'", self.first, self.next)
    }
}

impl DailyTable {
    /// Creates the partitions of today, of the days ahead, and of all days that the default
    /// partition holds rows of. A day that fails does not stop the others; the first error is
    /// returned.
    pub async fn create(&self, pool: &PgPool) -> Result<(), Error> {
        let mut outcome = Ok(());
        for day in self.missing(pool).await? {
            match within_at_most(MOVE_PATIENCE, self.create_day(pool, &day)).await {
                Ok(Some(moved)) => {
                    tracing::info!(
                        table = day.table,
                        rows.moved = moved,
                        "created a day's partition of {}",
                        self.title
                    );
                }
                // Another process has created it.
                Ok(None) => {}
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// Drops partitions that are past their retention, each separately, and deletes such rows of
    /// the default partition. Reports the number of partitions that are kept only because there are
    /// fewer days in use than the clock says.
    pub async fn expire(&self, pool: &PgPool, retention_days: u32) -> Result<(), Error> {
        let cutoff = Cutoff::of(pool, retention_days).await?;
        let old: Vec<(String, bool)> = within(
            sqlx::query_as(AssertSqlSafe(self.old())).bind(&cutoff.day_by_clock).bind(&cutoff.day).fetch_all(pool),
        )
        .await?;
        let held = old.iter().filter(|(_, droppable)| !droppable).count();
        gauge!("postrider_retention_held_partitions", "table" => self.name).set(held as f64);
        if held > 0 {
            tracing::warn!(
                table = self.name,
                partitions = held,
                "partitions past their retention by the clock of Postgres kept, too few days in use since"
            );
        }
        let mut outcome = Ok(());
        for (table, _) in old.iter().filter(|(_, droppable)| *droppable) {
            match within_at_most(PATIENCE, self.drop_day(pool, table)).await {
                Ok(()) => {
                    tracing::info!(
                        table,
                        retention.days = retention_days,
                        "dropped a day's partition of {}",
                        self.title
                    );
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.and(self.expire_default(pool, &cutoff).await)
    }

    /// Reports the number of rows in the default partition.
    pub async fn count_default(&self, pool: &PgPool) -> Result<(), Error> {
        let count = format!("SELECT count(*) FROM {}_default", self.name);
        let rows: i64 = within_at_most(MOVE_PATIENCE, sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(pool)).await?;
        gauge!("postrider_default_partition_rows", "table" => self.name).set(rows as f64);
        Ok(())
    }

    async fn missing(&self, pool: &PgPool) -> Result<Vec<Day>, Error> {
        let Self { name, time, .. } = self;
        let query = format!(
            r#"WITH days AS (
                SELECT (now() AT TIME ZONE 'UTC')::date + ahead AS day FROM generate_series(0, $1::int) AS ahead
                UNION
                SELECT ({time} AT TIME ZONE 'UTC')::date FROM {name}_default WHERE isfinite({time})
            ), named AS (
                SELECT day, '{name}_d' || to_char(day, 'YYYYMMDD') AS "table" FROM days
            )
            SELECT "table", day::text AS first, (day + 1)::text AS next FROM named
            WHERE "table" ~ '_d[0-9]{{8}}$' AND day > date '0001-01-01' AND to_regclass(quote_ident("table")) IS NULL
            ORDER BY day < (now() AT TIME ZONE 'UTC')::date, day"#
        );
        within_at_most(MOVE_PATIENCE, sqlx::query_as(AssertSqlSafe(query)).bind(self.days_ahead).fetch_all(pool)).await
    }

    /// Creates a day's partition with its rows. Returns the number of rows; `None` if the partition
    /// exists.
    async fn create_day(&self, pool: &PgPool, day: &Day) -> Result<Option<u64>, sqlx::Error> {
        let Self { name, time, .. } = self;
        let Day { table, first, next } = day;
        let mut transaction = self.begin(pool).await?;
        if exists(&mut transaction, table).await? {
            transaction.rollback().await?;
            return Ok(None);
        }
        let covers = day.covers(time);
        // The CHECK constraint avoids the scan of the day's rows while everything waits. Attaching
        // alone does not lock the table against readers: one that has planned with the old
        // partitions, and then waits for the default one, would miss the moved rows.
        let statements = format!(
            "LOCK TABLE ONLY {name} IN SHARE ROW EXCLUSIVE MODE;
             LOCK TABLE {name}_default IN SHARE ROW EXCLUSIVE MODE;
             CREATE TABLE {table} (LIKE {name} INCLUDING ALL, CONSTRAINT {table}_day CHECK ({covers}));
             WITH moved AS (DELETE FROM {name}_default WHERE {covers} RETURNING *) INSERT INTO {table} SELECT * FROM moved;
             LOCK TABLE ONLY {name} IN ACCESS EXCLUSIVE MODE;
             ALTER TABLE {name} ATTACH PARTITION {table} FOR VALUES FROM ('{first} 00:00+00') TO ('{next} 00:00+00');
             ALTER TABLE {table} DROP CONSTRAINT {table}_day"
        );
        let moved = sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut *transaction).await?.rows_affected();
        transaction.commit().await?;
        Ok(Some(moved))
    }

    async fn drop_day(&self, pool: &PgPool, table: &str) -> Result<(), sqlx::Error> {
        let mut transaction = self.begin(pool).await?;
        // Another process may have dropped it already.
        let statement = AssertSqlSafe(format!("DROP TABLE IF EXISTS {table}"));
        sqlx::raw_sql(statement).execute(&mut *transaction).await?;
        transaction.commit().await
    }

    async fn expire_default(&self, pool: &PgPool, cutoff: &Cutoff) -> Result<(), Error> {
        let Self { name, time, .. } = self;
        let delete = format!(
            "DELETE FROM {name}_default WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM {name}_default WHERE {time} < $1::text::timestamptz LIMIT {CHUNK}))"
        );
        let delete = || async {
            let query = sqlx::query(AssertSqlSafe(delete.as_str())).bind(&cutoff.time);
            query.execute(pool).await.map(|done| done.rows_affected())
        };
        in_chunks(CHUNK, delete).await.map(|_| ())
    }

    /// Begins a transaction that excludes those of other processes, of this version or another.
    async fn begin(&self, pool: &PgPool) -> Result<Transaction, sqlx::Error> {
        let mut transaction = Transaction::begin(pool).await?;
        let lock = format!("{LOCKS}; SELECT pg_advisory_xact_lock(hashtext(current_schema() || '.{}'))", self.name);
        sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *transaction).await?;
        Ok(transaction)
    }

    /// Returns the query for partitions that are past their retention by the clock, and whether
    /// also by the days in use.
    fn old(&self) -> String {
        let name = self.name;
        format!(
            "SELECT relname::text, day < $2::text::date FROM (
                SELECT relname, to_date(right(relname, 8), 'YYYYMMDD') AS day
                FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
                WHERE inhparent = '{name}'::regclass AND relname ~ '^{name}_d[0-9]{{8}}$'
             ) AS partitions
             WHERE day < $1::text::date ORDER BY relname"
        )
    }
}

async fn exists(transaction: &mut Transaction, table: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT to_regclass(quote_ident($1)) IS NOT NULL")
        .bind(table)
        .fetch_one(&mut **transaction)
        .await
}
