//! How many rows a table has, for bounds: exactly while it is small, and above that from a sample of its pages.
//!
//! `count(*)` reads the whole table, and the statistics of Postgres are as old as its last `ANALYZE`. A sample of whole
//! pages counts only rows that are visible, costs the same however large the table is, and is off by two or three percent.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, PgPool};

use super::query::{Error, within};

/// Pages that a look reads, in bytes.
const SAMPLE_BYTES: i64 = 16 << 20;
/// Parts of the time that looks may take.
const SHARE: u32 = 50;
/// The longest pause between two looks.
const LONGEST: Duration = Duration::from_secs(60);

/// A table, and what is summed up of its rows. Both are our own words, and never a caller's.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// A table without partitions, or one with.
    pub name: &'static str,
    /// An expression of the bytes of one row.
    pub row_bytes: &'static str,
}

/// What there is of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub rows: u64,
    pub bytes: u64,
}

impl Table {
    /// Looks at the table.
    pub async fn measure(&self, pool: &PgPool) -> Result<Size, Error> {
        let size = format!(
            "SELECT coalesce(sum(pg_relation_size(relid)), 0)::bigint FROM pg_partition_tree('{0}')",
            self.name
        );
        let bytes: i64 = within(sqlx::query_scalar(AssertSqlSafe(size)).fetch_one(pool)).await?;
        let share = if bytes <= SAMPLE_BYTES { 1.0 } else { SAMPLE_BYTES as f64 / bytes as f64 };
        let sample = if share < 1.0 { format!("TABLESAMPLE SYSTEM ({:.6})", share * 100.0) } else { String::new() };
        let count =
            format!("SELECT count(*), coalesce(sum({}), 0)::bigint FROM {} {sample}", self.row_bytes, self.name);
        let (rows, bytes): (i64, i64) = within(sqlx::query_as(AssertSqlSafe(count)).fetch_one(pool)).await?;
        let whole = |part: i64| (part.max(0) as f64 / share) as u64;
        Ok(Size { rows: whole(rows), bytes: whole(bytes) })
    }
}

/// Returns the pause after looks that took so long: at least `shortest`, and so long that they take two percent of the time.
pub fn pause_after(begun: Instant, shortest: Duration) -> Duration {
    (begun.elapsed() * (SHARE - 1)).clamp(shortest, LONGEST)
}
