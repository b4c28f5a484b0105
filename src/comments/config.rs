//! Settings of the comments room.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Comments: stored once, listed, streamed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topic `comments`; fixed when it is created.
    pub partitions: i32,
    /// Raised when the topic was replaced; what was stored before stays.
    pub epoch: u32,
    /// Longest text of a comment, in bytes. Longer ones that are in the topic already are not stored.
    pub max_text_bytes: usize,
    /// Records of one partition stored at a time.
    pub batch_records: usize,
    /// Live streams at most, per process; further ones are 503 `too_many_streams`.
    pub max_streams: usize,
    /// Comments that a live stream may be behind the others of its process before it is ended.
    pub stream_buffer_records: usize,
    /// Time between heartbeats of a live stream, in milliseconds.
    pub stream_heartbeat_ms: u64,
    /// Time after which live streams look for new comments where no hint says that there are some, in
    /// milliseconds; soon after some were found, a twentieth of it.
    pub stream_sweep_interval_ms: u64,
    /// Time after which a live stream is ended, for its client to resume anywhere, in milliseconds; up to
    /// a tenth more or less. It bounds how long streams stay unevenly spread over processes.
    pub stream_max_age_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            partitions: 3,
            epoch: 0,
            max_text_bytes: 64 << 10,
            batch_records: 1_000,
            max_streams: 1_000,
            stream_buffer_records: 1_024,
            stream_heartbeat_ms: 15_000,
            stream_sweep_interval_ms: 1_000,
            stream_max_age_ms: 3_600_000,
        }
    }
}
