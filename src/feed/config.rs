//! Settings of the feed room.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Posts, who follows whom, and everybody's feed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Partitions of the topic `post-events`; fixed when it is created.
    pub partitions: i32,
    /// Raised when the topic was replaced; feeds stay.
    pub epoch: u32,
    /// Time for which the topic keeps records, in milliseconds; used when it is created.
    pub topic_retention_ms: i64,
    /// Longest content of a post, in bytes.
    pub max_content_bytes: usize,
    /// Posts, or follows, that are stored by one commit at most.
    pub group_rows: usize,
    /// Commits under way at a time, per process and kind of write.
    pub groups_in_flight: usize,
    /// Records of one partition carried into feeds at a time.
    pub batch_records: usize,
    /// Followers up to which a post is fanned out at once; above it by a job, in chunks.
    pub inline_followers: i64,
    /// Rows of one chunk of a job.
    pub chunk_rows: i64,
    /// Jobs that a process works on at a time.
    pub jobs_in_flight: usize,
    /// Followers from which on an author's posts are merged at read instead of fanned out. They are fanned out again
    /// below nine tenths of it.
    pub celebrity_followers: i64,
    /// Newest posts of a feed that Redis keeps. Above 110 a timeline takes several times the memory.
    pub timeline_ids: usize,
    /// Time after which a timeline in Redis is made anew, in milliseconds.
    pub timeline_ttl_ms: u64,
    /// Timelines that an api process keeps in memory, about 1 KiB each, for as long as Redis says that they have not
    /// changed. 0 for none; a Redis Cluster, or a server that does not know `CLIENT TRACKING`, has none either.
    pub timelines_in_memory: usize,
    /// Rows that a feed keeps at least, the newest; up to a tenth more may stand, and what comes within one walk over all
    /// feeds. Twice `timeline_ids` or more; 0 for all rows, forever.
    pub keep_rows: u32,
    /// Pause between two walks over all feeds that trim them, in milliseconds.
    pub trim_interval_ms: u64,
    /// Feeds read from Postgres at a time, per process; others wait up to three seconds, then 503 `too_many_reads`.
    pub max_postgres_reads: usize,
    /// Days for which events and idempotency keys are remembered.
    pub memory_days: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            partitions: 3,
            epoch: 0,
            topic_retention_ms: 7 * 24 * 3_600_000,
            max_content_bytes: 16 << 10,
            group_rows: 256,
            groups_in_flight: 2,
            batch_records: 1_000,
            inline_followers: 1_000,
            chunk_rows: 2_500,
            jobs_in_flight: 4,
            celebrity_followers: 10_000,
            timeline_ids: 100,
            timeline_ttl_ms: 3_600_000,
            timelines_in_memory: 10_000,
            keep_rows: 10_000,
            trim_interval_ms: 3_600_000,
            max_postgres_reads: 8,
            memory_days: 7,
        }
    }
}

impl Config {
    pub fn timeline_ttl(&self) -> Duration {
        Duration::from_millis(self.timeline_ttl_ms)
    }

    pub fn trim_interval(&self) -> Duration {
        Duration::from_millis(self.trim_interval_ms)
    }

    /// Rows that a feed keeps at least; `None` for all. What Redis has of a feed is never trimmed.
    pub fn kept_rows(&self) -> Option<i64> {
        (self.keep_rows > 0).then(|| i64::from(self.keep_rows).max(2 * self.timeline_ids as i64))
    }

    /// An author with fewer followers is no celebrity any more.
    pub fn ordinary_below(&self) -> i64 {
        self.celebrity_followers - self.celebrity_followers / 10
    }
}
