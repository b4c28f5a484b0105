//! Settings of the key-value view.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Key-value view in Redis.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topic `messages`; fixed when the topic is created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Raise it after the topic was replaced or its partition count changed; rebuilds the view.
    pub epoch: u32,
    /// Longest key, in bytes.
    #[schemars(range(min = 1))]
    pub max_key_bytes: usize,
    /// Record reads in the topic `audit`: `async` drops and counts events while the producer's
    /// queue is full; `required` answers a read only once its audit event is stored; `off` records
    /// none.
    pub audit: AuditMode,
    /// Partitions of the topic `audit`.
    #[schemars(range(min = 1))]
    pub audit_partitions: i32,
    /// Longest wait for a write to become visible (`Postrider-After`), in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub visibility_timeout_ms: u64,
    /// Maximum number of writes with an `Idempotency-Key` stored in Redis, each for 36 hours,
    /// across all partitions; further ones are refused with 503 `too_many_idempotency_keys`, while
    /// writes without a key continue. About 200 bytes of Redis each; 0 means unlimited.
    pub max_idempotency_ids: u64,
    /// Maximum number of records of one partition in one batch.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_records: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            partitions: 6,
            epoch: 0,
            max_key_bytes: 32 << 10,
            audit: AuditMode::Async,
            audit_partitions: 6,
            visibility_timeout_ms: 5_000,
            max_idempotency_ids: 20_000_000,
            batch_records: 2_000,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuditMode {
    Async,
    Required,
    Off,
}
