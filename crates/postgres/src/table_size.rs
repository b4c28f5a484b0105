//! Measures the size of a table, for bounds: exactly while it is small, and above that from a
//! sample of its pages.
//!
//! `count(*)` reads the whole table, and the statistics of Postgres are as old as its last
//! `ANALYZE`. A sample of whole pages counts only visible rows, costs the same for any table size,
//! and is off by two or three percent.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, PgPool};

use super::query::{Error, within};

/// Size of the pages that one measurement reads, in bytes.
const SAMPLE_BYTES: i64 = 16 << 20;
/// Measurements take at most one part in this many of the time, unless that needs a pause longer
/// than [`LONGEST`].
const PARTS: u32 = 10;
/// Longest pause between two measurements.
const LONGEST: Duration = Duration::from_secs(10);

/// A table, and the expression that is summed over its rows. Both are constants, never text from a
/// caller.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Name of a table, partitioned or not.
    pub name: &'static str,
    /// SQL expression for the bytes of one row.
    pub row_bytes: &'static str,
}

/// The size of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub rows: u64,
    pub bytes: u64,
}

impl Table {
    /// Measures the table.
    pub async fn measure(&self, pool: &PgPool) -> Result<Size, Error> {
        let Self { name, row_bytes } = self;
        // `pg_partition_tree` has no rows for a table without partitions.
        let size = format!(
            "SELECT coalesce((SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree('{name}')), pg_relation_size('{name}'))::bigint"
        );
        let bytes: i64 = within(sqlx::query_scalar(AssertSqlSafe(size)).fetch_one(pool)).await?;
        let share = if bytes <= SAMPLE_BYTES { 1.0 } else { SAMPLE_BYTES as f64 / bytes as f64 };
        let sample = if share < 1.0 { format!("TABLESAMPLE SYSTEM ({:.6})", share * 100.0) } else { String::new() };
        let count = format!("SELECT count(*), coalesce(sum({row_bytes}), 0)::bigint FROM {name} {sample}");
        let (rows, bytes): (i64, i64) = within(sqlx::query_as(AssertSqlSafe(count)).fetch_one(pool)).await?;
        let whole = |part: i64| (part.max(0) as f64 / share) as u64;
        Ok(Size { rows: whole(rows), bytes: whole(bytes) })
    }
}

/// Returns the pause after a measurement that started at `begun`: at least `shortest`, and longer
/// if measurements take long.
pub fn pause_after(begun: Instant, shortest: Duration) -> Duration {
    (begun.elapsed() * (PARTS - 1)).clamp(shortest, LONGEST)
}
