//! Settings of the key-value room.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The key-value view.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topic `messages`; fixed when it is created.
    pub partitions: i32,
    /// Raised when the topic was replaced or its partition count changed; rebuilds the view.
    pub epoch: u32,
    /// Longest key, in bytes.
    pub max_key_bytes: usize,
    /// Whether reads are recorded in the topic `audit`: `async` drops, and counts, when the producer
    /// is full; `required` answers only when the event is stored.
    pub audit: AuditMode,
    /// Partitions of the topic `audit`.
    pub audit_partitions: i32,
    /// Longest wait for a write to become visible (`Postrider-After`), in milliseconds.
    pub visibility_timeout_ms: u64,
    /// Writes with an `Idempotency-Key` that Redis may remember, each for 36 hours, over all partitions; further ones are
    /// 503 `too_many_idempotency_keys`, and writes without a key go on. About 200 bytes of Redis each; 0 for any number.
    pub max_idempotency_ids: u64,
    /// Records of one partition projected at a time.
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
