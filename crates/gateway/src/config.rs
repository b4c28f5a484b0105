//! Settings of the gateway.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::relay;

/// HTTP to Kafka and Kafka to HTTP.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Create the topic of a `/produce` request if it does not exist and the brokers allow
    /// automatic creation.
    pub auto_create_topics: bool,
    pub topics: TopicRules,
    /// Maximum number of records of one stream in flight.
    #[schemars(range(min = 1))]
    pub stream_window: usize,
    /// Maximum number of records in one batch.
    #[schemars(range(min = 1))]
    pub max_batch_records: usize,
    pub simulator: Simulator,
    /// Topics that the role `relay` delivers to URLs.
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

/// Topics that may be written to.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TopicRules {
    /// Names, or prefixes ending in `*`. Empty allows all topics except postrider's own and
    /// Kafka's. postrider's own topics are allowed only by full name.
    pub allow: Vec<String>,
}

/// Target for testing webhooks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Simulator {
    /// Serve `/webhook-simulator`.
    pub enabled: bool,
    /// Shortest response time, in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub min_delay_ms: u64,
    /// Longest response time, in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub max_delay_ms: u64,
}

impl Default for Simulator {
    fn default() -> Self {
        Self { enabled: false, min_delay_ms: 50, max_delay_ms: 2_000 }
    }
}
