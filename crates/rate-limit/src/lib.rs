//! Rates of requests and bytes per caller: its principal, or its address while authentication is
//! off.
//!
//! Each caller has two token buckets in Redis, which all processes share: a script takes from them
//! for each request. While Redis does not answer, each process has buckets of its own.

mod bucket;
mod codes;
mod counting;
mod limiter;
mod middleware;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use codes::ALL as CODES;
pub use limiter::Limiter;
pub use middleware::limit;

/// Limits per caller.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Requests per second of one caller; 0: no limit. A WebSocket or a stream is one request.
    pub requests_per_second: u32,
    /// Bytes of bodies per second of one caller, as they are sent; 0: no limit.
    pub bytes_per_second: u64,
    /// Time whose requests and bytes a caller may send at once, in seconds.
    #[schemars(range(min = 1, max = 3_600))]
    pub burst_seconds: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { requests_per_second: 0, bytes_per_second: 0, burst_seconds: 1 }
    }
}

impl Config {
    pub fn is_on(&self) -> bool {
        self.requests_per_second > 0 || self.bytes_per_second > 0
    }
}
