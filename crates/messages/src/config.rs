//! Settings of messages.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::presence;

/// Messages: from HTTP or any producer to every open connection of their receiver.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topics `message` and `message-events`; fixed when the topics are created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Raise it after the topic was replaced; messages stored before are kept.
    pub epoch: u32,
    /// Consumer group of the projection, without `kafka.group_prefix`.
    pub group: String,
    /// Retention of the topics in milliseconds; applied when the topics are created.
    #[schemars(range(min = -1))]
    pub topic_retention_ms: i64,
    /// Days for which messages are stored. Older messages are deleted one day at a time.
    #[schemars(range(min = 1, max = 36_500))]
    pub retention_days: u32,
    /// Maximum number of receivers in Postgres; beyond it, messages to new receivers are refused
    /// with 503 `too_many_receivers`. A receiver is deleted when it has had no message for twice
    /// `retention_days` plus one day. 0 means unlimited.
    pub max_receivers: u64,
    /// Maximum number of records of one partition in one batch.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_records: usize,
    /// Time after which an undelivered message produces an event in `message-events`, in
    /// milliseconds; 0 disables these events.
    pub undelivered_after_ms: u64,
    /// Maximum number of open connections and streams per process; further ones are refused with
    /// 503 `too_many_streams`.
    #[schemars(range(min = 1))]
    pub max_connections: usize,
    /// Maximum number of open connections per receiver and process; further ones are refused with
    /// 429 `too_many_connections`.
    #[schemars(range(min = 1))]
    pub max_connections_per_receiver: usize,
    /// Maximum number of open connections per client address (for IPv6, its /64) and process; 0
    /// means unlimited. Behind proxies, set `http.trusted_proxies`.
    pub max_connections_per_address: usize,
    /// Maximum size of a connection's send queue in bytes. Messages beyond it are read from
    /// Postgres instead.
    #[schemars(range(min = 1))]
    pub connection_buffer_bytes: usize,
    /// Time after which a client that accepts no data is closed with 1013, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub write_timeout_ms: u64,
    /// Interval of pings, and of heartbeats of event streams, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub ping_interval_ms: u64,
    /// Time after which a silent client, which does not even send a pong, is closed, in
    /// milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub idle_timeout_ms: u64,
    /// Largest message that a client may send, in bytes; a larger one closes the connection with
    /// 1009.
    #[schemars(range(min = 1))]
    pub max_incoming_bytes: usize,
    /// Maximum number of frames that a client may send per second; more close the connection with
    /// 1008.
    #[schemars(range(min = 1))]
    pub max_incoming_per_second: u32,
    /// Time after which an event stream ends, in milliseconds, varied by a tenth; its client
    /// resumes it.
    #[schemars(range(min = 1))]
    pub stream_max_age_ms: u64,
    /// Window within which connections are closed at a stop, in milliseconds, each at a random
    /// time.
    #[schemars(range(max = 86_400_000))]
    pub close_jitter_ms: u64,
    /// Interval at which a process looks for messages that were not announced, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub sweep_interval_ms: u64,
    pub presence: presence::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            partitions: 3,
            epoch: 0,
            group: "client-response-group".to_owned(),
            topic_retention_ms: 604_800_000,
            retention_days: 30,
            max_receivers: 10_000_000,
            batch_records: 1_000,
            undelivered_after_ms: 60_000,
            max_connections: 20_000,
            max_connections_per_receiver: 64,
            max_connections_per_address: 0,
            connection_buffer_bytes: 256 << 10,
            write_timeout_ms: 10_000,
            ping_interval_ms: 20_000,
            idle_timeout_ms: 60_000,
            max_incoming_bytes: 16 << 10,
            max_incoming_per_second: 100,
            stream_max_age_ms: 3_600_000,
            close_jitter_ms: 2_000,
            sweep_interval_ms: 15_000,
            presence: presence::Config::default(),
        }
    }
}

impl Config {
    pub fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }

    pub fn ping_interval(&self) -> Duration {
        Duration::from_millis(self.ping_interval_ms.max(1))
    }

    pub fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms.max(1))
    }

    pub fn sweep_interval(&self) -> Duration {
        Duration::from_millis(self.sweep_interval_ms.max(1))
    }
}
