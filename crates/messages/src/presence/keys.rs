//! Names of the presence keys in Redis. Receivers are spread over buckets. All keys of a bucket
//! share a hash tag, so that a Redis Cluster keeps them on one shard, one script can change them,
//! and they are lost or rolled back together.

use postrider_kafka::partition_of;

/// Number of buckets. Must never change: all processes must agree on a receiver's bucket.
pub const BUCKETS: usize = 16;

/// A share of all receivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bucket(pub usize);

impl Bucket {
    pub fn of(receiver: &str) -> Self {
        let bucket = partition_of(receiver.as_bytes(), BUCKETS as i32);
        Self(usize::try_from(bucket).unwrap_or_default())
    }

    pub fn all() -> impl Iterator<Item = Self> {
        (0..BUCKETS).map(Self)
    }
}

/// Builds keys with a common prefix.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(key_prefix: &str) -> Self {
        Self { prefix: format!("{key_prefix}presence:") }
    }

    /// Sorted set of processes by expiry of their lease. The prefix `leaving:` marks those to be
    /// taken over.
    pub fn processes(&self) -> String {
        format!("{}processes", self.prefix)
    }

    /// Lock of the process that searches for overdue events.
    pub fn sweeper(&self) -> String {
        format!("{}sweeper", self.prefix)
    }

    /// Lock of the process that compares Redis with the topic.
    pub fn reconciler(&self) -> String {
        format!("{}reconciler", self.prefix)
    }

    /// Version of the oldest change that a process has yet to send, or 0 while it registers its
    /// receivers again; missing otherwise.
    pub fn unsent(&self, process: &str) -> String {
        format!("{}unsent:{process}", self.prefix)
    }

    /// Hash: creation time of the bucket (`born`), the creation time for which it was reconciled
    /// with the topic (`reconciled`), the run of its server (`run`), and the processes that have
    /// entries in it (`p:NAME`).
    pub fn head(&self, bucket: Bucket) -> String {
        self.within(bucket, "head")
    }

    /// Hash of events that Kafka may not have stored: `VERSION RECEIVER` to `VERSION STATE AT
    /// CONNECTIONS RECEIVER`.
    pub fn due(&self, bucket: Bucket) -> String {
        self.within(bucket, "due")
    }

    /// Hash from a day, counted from 1970, to the number of disconnected receivers whose record
    /// expires on it.
    pub fn gone(&self, bucket: Bucket) -> String {
        self.within(bucket, "gone")
    }

    /// Hash of a process's registered connections: receiver to connection count; the empty field
    /// has its marker.
    pub fn own(&self, bucket: Bucket, process: &str) -> String {
        self.within(bucket, &format!("of:{process}"))
    }

    /// Hash of one receiver: `state`, `version`, `since`, `seen`, and per process `p:NAME` to
    /// connection count.
    pub fn receiver(&self, bucket: Bucket, receiver: &str) -> String {
        self.within(bucket, &format!("is:{receiver}"))
    }

    fn within(&self, Bucket(number): Bucket, name: &str) -> String {
        format!("{}{{b{number}}}:{name}", self.prefix)
    }
}
