//! Settings of the gateway.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::relay;

/// HTTP to Kafka and back.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether `/produce` to a topic that does not exist makes it, where the brokers allow that.
    pub auto_create_topics: bool,
    pub topics: TopicRules,
    /// Records of one stream in flight at most.
    pub stream_window: usize,
    /// Records in one batch at most.
    pub max_batch_records: usize,
    pub simulator: Simulator,
    /// Topics carried to URLs by the role `relay`.
    pub relays: Vec<relay::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            auto_create_topics: false,
            topics: TopicRules::default(),
            stream_window: 2_000,
            max_batch_records: 10_000,
            simulator: Simulator::default(),
            relays: Vec::new(),
        }
    }
}

/// Which topics may be written to.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TopicRules {
    /// Names, or prefixes ending in `*`. Empty allows all but our own and Kafka's; one of our own
    /// is allowed only by its full name.
    pub allow: Vec<String>,
}

/// The target to test webhooks against.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Simulator {
    /// Whether `/webhook-simulator` is there.
    pub enabled: bool,
    /// Shortest answer time, in milliseconds.
    pub min_delay_ms: u64,
    /// Longest answer time, in milliseconds.
    pub max_delay_ms: u64,
}

impl Default for Simulator {
    fn default() -> Self {
        Self { enabled: false, min_delay_ms: 50, max_delay_ms: 2_000 }
    }
}
