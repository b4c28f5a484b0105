//! Settings of the messages room.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::presence;

/// Messages: from HTTP or any producer to every open connection of their receiver.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topics `message` and `message-events`; fixed when they are created.
    pub partitions: i32,
    /// Raised when the topic was replaced; what was stored before stays.
    pub epoch: u32,
    /// Consumer group of the projection, before `kafka.group_prefix`.
    pub group: String,
    /// Time for which the topics keep records, in milliseconds; used when they are created.
    pub topic_retention_ms: i64,
    /// Days for which messages can be read again. Older ones are dropped by the day.
    pub retention_days: u32,
    /// Receivers that Postgres may know; then messages to new ones are 503 `too_many_receivers`. A receiver is forgotten
    /// when it has had no message for twice `retention_days` and a day. 0 for any number.
    pub max_receivers: u64,
    /// Records of one partition stored at a time.
    pub batch_records: usize,
    /// Time after which a message that its receiver has not got is told of in `message-events`, in milliseconds; 0 tells
    /// of none.
    pub undelivered_after_ms: u64,
    /// Open connections and streams at most, per process; further ones are 503 `too_many_streams`.
    pub max_connections: usize,
    /// The same for one receiver; further ones are 429 `too_many_connections`.
    pub max_connections_per_receiver: usize,
    /// The same for one client address, or for IPv6 its /64; 0 for any number. Behind proxies, set `http.trusted_proxies`.
    pub max_connections_per_address: usize,
    /// Origins that a browser may connect from, such as `https://example.com`; none allows all.
    pub allowed_origins: Vec<String>,
    /// Messages that wait for one connection, in bytes. What is over that is read again from Postgres.
    pub connection_buffer_bytes: usize,
    /// Time for which a client may take nothing, in milliseconds; then it is closed with 1013.
    pub write_timeout_ms: u64,
    /// Time between pings, and between heartbeats of event streams, in milliseconds.
    pub ping_interval_ms: u64,
    /// Time after which a client that says nothing, not even a pong, is closed, in milliseconds.
    pub idle_timeout_ms: u64,
    /// Largest message that a client may send, in bytes; larger ones are closed with 1009.
    pub max_incoming_bytes: usize,
    /// Frames that a client may send per second; more are closed with 1008.
    pub max_incoming_per_second: u32,
    /// Time after which an event stream is ended, in milliseconds, a tenth more or less; its client resumes it.
    pub stream_max_age_ms: u64,
    /// Connections are closed within this time at a stop, in milliseconds, each at a time of its own.
    pub close_jitter_ms: u64,
    /// Time after which is looked for messages that nobody announced, in milliseconds.
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
            allowed_origins: Vec::new(),
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
