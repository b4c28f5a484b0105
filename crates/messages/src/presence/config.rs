//! Settings of presence.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keys::BUCKETS;

/// Presence: which receivers are connected, by query and by events.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Enable presence.
    pub enabled: bool,
    /// Partitions of the topic `presence`; fixed when the topic is created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Retention of the topic in milliseconds; applied when the topic is created.
    #[schemars(range(min = -1))]
    pub topic_retention_ms: i64,
    /// Time after which the connections of a silent process count as ended, in milliseconds. At
    /// least three heartbeats.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub lease_ms: u64,
    /// Interval of a process's heartbeats, in milliseconds.
    #[schemars(range(min = 10, max = 86_400_000))]
    pub heartbeat_ms: u64,
    /// Time for which a receiver still counts as connected after its last connection, in
    /// milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub linger_ms: u64,
    /// Days for which the time of a receiver's last connection is stored.
    #[schemars(range(min = 1, max = 36_500))]
    pub remember_days: u32,
    /// Maximum number of disconnected receivers whose last connection is stored; beyond it, the
    /// time is deleted after a minute. About 260 bytes of Redis each; 0 means unlimited.
    pub max_remembered: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            partitions: 6,
            topic_retention_ms: 604_800_000,
            lease_ms: 10_000,
            heartbeat_ms: 2_500,
            linger_ms: 5_000,
            remember_days: 30,
            max_remembered: 1_000_000,
        }
    }
}

impl Config {
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms.max(10))
    }

    /// Returns the lease in milliseconds: at least three heartbeats, so that one late heartbeat
    /// does no harm.
    pub fn whole_lease_ms(&self) -> u64 {
        self.lease_ms.max(3 * self.heartbeat_ms.max(10))
    }

    pub fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms)
    }

    /// Returns the limit of each bucket.
    pub fn max_remembered_of_a_bucket(&self) -> u64 {
        self.max_remembered.div_ceil(BUCKETS as u64)
    }

    /// Returns the time in seconds, for Redis.
    pub fn remember_s(&self) -> u64 {
        u64::from(self.remember_days.max(1)) * 86_400
    }
}
