//! Settings of the public listener.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{body::Limits, origin, tls};

/// The HTTP listener for clients.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses of the API, each `host:port`, or `:port` for all addresses of the host; port 0
    /// picks a free one.
    pub listen: Vec<String>,
    /// Largest body, and largest record of a stream, in bytes, after decompression; a larger one
    /// gets 413.
    #[schemars(range(min = 1))]
    pub max_body_bytes: usize,
    /// Time limit for a whole body to arrive, in milliseconds; after it, the answer is 408.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub body_timeout_ms: u64,
    /// Time limit for a request's head to arrive, in milliseconds; after it, the connection is
    /// closed.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub header_timeout_ms: u64,
    /// Time after which a connection without a request is closed, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub idle_timeout_ms: u64,
    /// Longest time that a client may read nothing of an answer, in milliseconds; after it, the
    /// connection is closed.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub write_timeout_ms: u64,
    /// Maximum number of open connections; further ones are closed at once, and counted.
    #[schemars(range(min = 1))]
    pub max_connections: usize,
    /// Networks of trusted proxies, such as `10.0.0.0/8`. The client's address is read from the
    /// header that they send.
    pub trusted_proxies: Vec<String>,
    /// Header in which trusted proxies name the client.
    pub forwarded_header: ForwardedHeader,
    /// Serve the API reference for browsers at `/docs`. `/openapi.json` is served in any case.
    pub docs: bool,
    pub cors: origin::Config,
    pub tls: tls::Config,
    /// Serve `/admin/…`, the routes of operators, here too, and not only on the management port.
    pub expose_admin: bool,
    /// Serve `/metrics` here too, and not only on the management port.
    pub expose_metrics: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec!["127.0.0.1:8080".to_owned()],
            max_body_bytes: 1 << 20,
            body_timeout_ms: 30_000,
            header_timeout_ms: 10_000,
            idle_timeout_ms: 90_000,
            write_timeout_ms: 30_000,
            max_connections: 20_000,
            trusted_proxies: Vec::new(),
            forwarded_header: ForwardedHeader::default(),
            docs: true,
            cors: origin::Config::default(),
            tls: tls::Config::default(),
            expose_admin: false,
            expose_metrics: false,
        }
    }
}

impl Config {
    /// Returns the limits of a whole body.
    pub fn limits(&self) -> Limits {
        Limits { max_bytes: self.max_body_bytes, timeout: Duration::from_millis(self.body_timeout_ms) }
    }
}

/// Header in which proxies name the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardedHeader {
    /// `X-Forwarded-For`.
    #[default]
    XForwardedFor,
    /// `Forwarded`, as defined by RFC 7239.
    Forwarded,
}
