//! Settings of presence.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keys::BUCKETS;

/// Who is connected: asked by id, and told by events.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether it is kept at all.
    pub enabled: bool,
    /// Partitions of the topic `presence`; fixed when it is created.
    pub partitions: i32,
    /// Time for which the topic keeps events, in milliseconds; used when it is created.
    pub topic_retention_ms: i64,
    /// Time after which the connections of a silent process count as gone, in milliseconds. At least three heartbeats.
    pub lease_ms: u64,
    /// Time between two signs of life of a process, in milliseconds.
    pub heartbeat_ms: u64,
    /// Time for which a receiver without connections still counts as connected, in milliseconds.
    pub linger_ms: u64,
    /// Days for which is known when somebody was seen last.
    pub remember_days: u32,
    /// Receivers that have gone and of which that is known, at most; of further ones it is not known a minute later. About
    /// 260 bytes of Redis each; 0 for any number.
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

    /// The lease in milliseconds: at least three heartbeats, so that one that is late costs nothing.
    pub fn whole_lease_ms(&self) -> u64 {
        self.lease_ms.max(3 * self.heartbeat_ms.max(10))
    }

    pub fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms)
    }

    /// Of each bucket.
    pub fn max_remembered_of_a_bucket(&self) -> u64 {
        self.max_remembered.div_ceil(BUCKETS as u64)
    }

    /// In seconds, for Redis.
    pub fn remember_s(&self) -> u64 {
        u64::from(self.remember_days.max(1)) * 86_400
    }
}
