//! Settings of the feed capability.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Posts, follows and feeds.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Number of partitions of the topic `post-events`; fixed when the topic is created.
    #[schemars(range(min = 1))]
    pub partitions: i32,
    /// Epoch of the topic. Increase it after replacing the topic; feeds are kept.
    pub epoch: u32,
    /// Retention of the topic, in milliseconds; used when the topic is created.
    #[schemars(range(min = -1))]
    pub topic_retention_ms: i64,
    /// Maximum length of a post's content, in bytes.
    #[schemars(range(min = 1))]
    pub max_content_bytes: usize,
    /// Maximum number of posts, or follows, stored by one commit.
    #[schemars(range(min = 1, max = 100_000))]
    pub group_rows: usize,
    /// Maximum number of concurrent commits, per process and kind of write.
    #[schemars(range(min = 1, max = 1_000))]
    pub groups_in_flight: usize,
    /// Maximum number of records of one partition applied to feeds at a time.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch_records: usize,
    /// Maximum number of followers for which a post is fanned out at once; for more followers a job
    /// does it in steps.
    #[schemars(range(min = 0))]
    pub inline_followers: i64,
    /// Number of rows per step of a job.
    #[schemars(range(min = 1, max = 100_000))]
    pub chunk_rows: i64,
    /// Maximum number of jobs that a process runs concurrently.
    #[schemars(range(min = 1, max = 1_000))]
    pub jobs_in_flight: usize,
    /// Number of followers from which an author's posts are merged at read instead of fanned out.
    /// Fan-out resumes below nine tenths of this number.
    #[schemars(range(min = 1))]
    pub celebrity_followers: i64,
    /// Number of newest posts of a feed that Redis keeps. Above 110, a timeline takes several times
    /// the memory.
    #[schemars(range(min = 1, max = 100_000))]
    pub timeline_ids: usize,
    /// TTL of a timeline in Redis, in milliseconds. An expired timeline is built again.
    #[schemars(range(min = 1_000))]
    pub timeline_ttl_ms: u64,
    /// Maximum number of timelines in the near cache of an api process, about 1 KiB each. An entry
    /// is used for as long as Redis reports no change. 0 turns the near cache off; it is also off
    /// with a Redis Cluster, or with a server that does not support `CLIENT TRACKING`.
    pub timelines_in_memory: usize,
    /// Minimum number of newest rows that a feed keeps. A feed may temporarily have up to a tenth
    /// more, plus the rows that arrive during one walk over all feeds. At least twice
    /// `timeline_ids` is kept; 0 keeps all rows forever.
    pub keep_rows: u32,
    /// Pause between two trimming walks over all feeds, in milliseconds.
    #[schemars(range(min = 1))]
    pub trim_interval_ms: u64,
    /// Maximum number of concurrent feed reads from Postgres per process. Further reads wait up to
    /// three seconds and then get 503 `too_many_reads`.
    #[schemars(range(min = 1))]
    pub max_postgres_reads: usize,
    /// Number of days for which events and idempotency keys are remembered.
    #[schemars(range(min = 1, max = 3_650))]
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

    /// Returns the minimum number of rows that a feed keeps; `None` keeps all. It is at least twice
    /// the timeline's length, so that the posts of a timeline are never trimmed.
    pub fn kept_rows(&self) -> Option<i64> {
        (self.keep_rows > 0).then(|| i64::from(self.keep_rows).max(2 * self.timeline_ids as i64))
    }

    /// Returns the number of followers below which an author stops being a celebrity.
    pub fn ordinary_below(&self) -> i64 {
        self.celebrity_followers - self.celebrity_followers / 10
    }
}
