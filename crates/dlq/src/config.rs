//! Settings of the dead-letter queue.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The dead-letter queue.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Number of partitions of each dead-letter topic; fixed when the topic is created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Serves `/admin/dlq`, where any client that reaches the API port can list, replay and purge
    /// dead letters. `postrider dlq` works either way.
    pub admin: bool,
    /// Maximum time that a request to `/admin/dlq` may spend reading topics, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub scan_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { partitions: 3, admin: true, scan_timeout_ms: 20_000 }
    }
}
