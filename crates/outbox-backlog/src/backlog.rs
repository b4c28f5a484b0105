//! Bound on the rows that wait in the outbox. It keeps Postgres from filling up while Kafka is
//! unavailable.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use postrider_http::Problem;
use postrider_limits::bound::{Admitted, Bound};
use postrider_postgres::{
    query::{Error, within},
    table_size::{Table, pause_after},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;

use crate::codes;

/// Bytes added to each row for its other columns, its header, and its index entry.
const ROW_BYTES: u64 = 256;
const OUTBOX: Table = Table { name: "outbox", row_bytes: "octet_length(value) + octet_length(key) + 256" };
/// Shortest time between two measurements.
const LOOK: Duration = Duration::from_secs(1);
/// Maximum number of keys with a full quarantine that a process refuses.
const FULL_KEYS: i64 = 10_000;
/// Seconds after which a refused write may be retried.
const RETRY_AFTER_S: u32 = 5;

const FULL: &str = "SELECT key FROM outbox_quarantine GROUP BY key HAVING count(*) >= $1 LIMIT $2";

/// Limits on the rows that wait in Postgres for Kafka.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Maximum number of rows that wait for Kafka; further posts and follows get 503 `outbox_full`.
    /// 0 means no limit.
    pub max_rows: u64,
    /// Maximum number of bytes in rows that wait for Kafka, with 256 added to each row; further
    /// posts and follows get 503 `outbox_full`. 0 means no limit.
    pub max_bytes: u64,
    /// Maximum number of rows of one author that wait behind a row in quarantine; further ones of
    /// that author get 503 `outbox_full`. 0 means no limit.
    pub max_quarantined_rows_per_key: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_rows: 2_000_000, max_bytes: 2 << 30, max_quarantined_rows_per_key: 10_000 }
    }
}

/// The outbox and its bounds, as known to this process.
pub struct Backlog {
    rows: Arc<Bound>,
    bytes: Arc<Bound>,
    max_quarantined_rows_per_key: u64,
    /// Keys whose quarantine is full.
    full: ArcSwap<HashSet<String>>,
}

impl Backlog {
    pub fn new(config: &Config) -> Arc<Self> {
        Arc::new(Self {
            rows: Bound::new("outbox_rows", config.max_rows),
            bytes: Bound::new("outbox_bytes", config.max_bytes),
            max_quarantined_rows_per_key: config.max_quarantined_rows_per_key,
            full: ArcSwap::default(),
        })
    }

    /// Admits a row before any of it is stored, or refuses the write that it belongs to. Hold the
    /// result until the write has ended.
    pub fn admit(&self, key: &str, value_bytes: usize) -> Result<[Admitted; 2], Problem> {
        let row_bytes = (value_bytes + key.len()) as u64 + ROW_BYTES;
        for (bound, more, what) in [(&self.rows, 1, "rows"), (&self.bytes, row_bytes, "bytes")] {
            if !bound.has_room(more) {
                bound.count_refusal();
                let limit = bound.limit();
                return Err(refusal(format!(
                    "the outbox has reached its limit of {limit} {what}; nothing was stored, retry later"
                )));
            }
        }
        if self.full.load().contains(key) {
            let limit = self.max_quarantined_rows_per_key;
            return Err(refusal(format!(
                "`{key}` has reached the limit of {limit} rows in quarantine; nothing was stored, see `postrider outbox quarantine list`"
            )));
        }
        Ok([self.rows.admit(1), self.bytes.admit(row_bytes)])
    }

    /// Measures the outbox repeatedly; never returns. While Postgres does not answer, the last
    /// measurement stays valid: writes fail by themselves then.
    pub async fn watch(self: Arc<Self>, pool: PgPool) {
        loop {
            let begun = Instant::now();
            if let Err(error) = self.look(&pool).await {
                tracing::debug!(error = %error, "could not measure the outbox");
            }
            tokio::time::sleep(pause_after(begun, LOOK)).await;
        }
    }

    async fn look(&self, pool: &PgPool) -> Result<(), Error> {
        let (rows, bytes) = (self.rows.look(), self.bytes.look());
        let size = OUTBOX.measure(pool).await?;
        self.rows.set(rows, size.rows);
        self.bytes.set(bytes, size.bytes);
        if self.max_quarantined_rows_per_key > 0 {
            let most = i64::try_from(self.max_quarantined_rows_per_key).unwrap_or(i64::MAX);
            let full: Vec<String> = within(sqlx::query_scalar(FULL).bind(most).bind(FULL_KEYS).fetch_all(pool)).await?;
            self.full.store(Arc::new(full.into_iter().collect()));
        }
        Ok(())
    }
}

fn refusal(detail: String) -> Problem {
    Problem { retry_after_s: Some(RETRY_AFTER_S), ..Problem::new(codes::OUTBOX_FULL, detail) }
}
