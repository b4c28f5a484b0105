//! Settings of the comments capability.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Comments: stored once, listed and streamed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Number of partitions of the topic `comments`; fixed when the topic is created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Epoch of the topic. Increase it after replacing the topic; comments stored before are kept.
    pub epoch: u32,
    /// Maximum length of a comment's text, in bytes. Longer comments that are already in the topic
    /// are not stored.
    #[schemars(range(min = 1))]
    pub max_text_bytes: usize,
    /// Maximum number of records of one partition that are stored at a time.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_records: usize,
    /// Maximum number of open live streams per process; further ones get 503 `too_many_streams`.
    #[schemars(range(min = 1))]
    pub max_streams: usize,
    /// Number of comments that a live stream may lag behind the other streams of its process before
    /// it is closed.
    #[schemars(range(min = 1))]
    pub stream_buffer_records: usize,
    /// Time between heartbeats of a live stream, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub stream_heartbeat_ms: u64,
    /// Maximum time between two reads of new comments for live streams when no notification
    /// arrives, in milliseconds. Soon after comments were found, the time is a twentieth of it.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub stream_sweep_interval_ms: u64,
    /// Maximum age of a live stream, in milliseconds, up to a tenth more or less. The stream is
    /// then closed, and its client resumes on any process. This bounds how long streams stay
    /// unevenly spread over processes.
    #[schemars(range(min = 1))]
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
