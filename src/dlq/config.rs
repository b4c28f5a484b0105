//! Settings of the dead letters.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The dead letters.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of each dead-letter topic; fixed when it is created.
    pub partitions: i32,
    /// Whether `/admin/dlq` is there, where dead letters are listed, replayed and purged by whoever
    /// reaches the API port. `postrider dlq` works either way.
    pub admin: bool,
    /// Longest time that a request to `/admin/dlq` may take to read topics, in milliseconds.
    pub scan_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { partitions: 3, admin: true, scan_timeout_ms: 20_000 }
    }
}
