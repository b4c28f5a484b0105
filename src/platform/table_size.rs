//! Counts the rows of a table, for bounds: exactly while it is small, and above that from a sample of its pages.
//!
//! `count(*)` reads the whole table, and the statistics of Postgres are as old as its last `ANALYZE`. A sample of whole
//! pages counts only rows that are visible, costs the same however large the table is, and is off by two or three percent.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, PgPool};

use super::query::{Error, within};

/// Pages that a look reads, in bytes.
const SAMPLE_BYTES: i64 = 16 << 20;
/// Looks take one part in so many of the time at most, where that leaves no pause longer than the longest.
const PARTS: u32 = 10;
/// The longest pause between two looks.
const LONGEST: Duration = Duration::from_secs(10);

/// A table, and what is summed up of its rows. Both are our own words, and never a caller's.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// A table without partitions, or one with.
    pub name: &'static str,
    /// An expression of the bytes of one row.
    pub row_bytes: &'static str,
}

/// The size of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub rows: u64,
    pub bytes: u64,
}

impl Table {
    /// Looks at the table.
    pub async fn measure(&self, pool: &PgPool) -> Result<Size, Error> {
        let Self { name, row_bytes } = self;
        // A table without partitions is no tree.
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

/// Returns the pause after a look that began then: at least `shortest`, and longer where looks take long.
pub fn pause_after(begun: Instant, shortest: Duration) -> Duration {
    (begun.elapsed() * (PARTS - 1)).clamp(shortest, LONGEST)
}
