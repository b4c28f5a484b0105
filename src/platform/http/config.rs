//! Settings of the public listener.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{body::Limits, client::ForwardedHeader};

/// The listener that clients reach.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses the API listens on, each `host:port`, or `:port` for all of them; port 0 picks a free one.
    pub listen: Vec<String>,
    /// Largest body, and largest record of a stream, in bytes. Larger ones are answered 413.
    pub max_body_bytes: usize,
    /// Time for a whole body to arrive, in milliseconds; then 408.
    pub body_timeout_ms: u64,
    /// Time for a request's head to arrive, in milliseconds; then the connection is closed.
    pub header_timeout_ms: u64,
    /// Time after which a connection without a request is closed, in milliseconds.
    pub idle_timeout_ms: u64,
    /// Time for which a client may take nothing of an answer, in milliseconds; then the connection is cut.
    pub write_timeout_ms: u64,
    /// Open connections at most; further ones are closed as they come, and counted.
    pub max_connections: usize,
    /// Networks of proxies, such as `10.0.0.0/8`, that are believed about whom they speak for.
    pub trusted_proxies: Vec<String>,
    /// The header that they say it in.
    pub forwarded_header: ForwardedHeader,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec!["0.0.0.0:8080".to_owned()],
            max_body_bytes: 1 << 20,
            body_timeout_ms: 30_000,
            header_timeout_ms: 10_000,
            idle_timeout_ms: 90_000,
            write_timeout_ms: 30_000,
            max_connections: 20_000,
            trusted_proxies: Vec::new(),
            forwarded_header: ForwardedHeader::default(),
        }
    }
}

impl Config {
    /// The bounds on a whole body.
    pub fn limits(&self) -> Limits {
        Limits { max_bytes: self.max_body_bytes, timeout: Duration::from_millis(self.body_timeout_ms) }
    }
}
