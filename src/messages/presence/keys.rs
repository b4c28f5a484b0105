//! Names of our keys in Redis. Receivers are spread over buckets; everything of a bucket shares a hash tag, so
//! that a Redis Cluster keeps it on one shard, one script can change all of it, and it is lost, or rolled back, as one.

use crate::platform::kafka::partition_of;

/// Fixed for ever: a receiver's bucket must be the same for all processes.
pub const BUCKETS: usize = 16;

/// A part of all receivers.
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

/// Keys after their common prefix.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(key_prefix: &str) -> Self {
        Self { prefix: format!("{key_prefix}presence:") }
    }

    /// Sorted set of processes by when their lease ends. `leaving:` stands before those to be taken over.
    pub fn processes(&self) -> String {
        format!("{}processes", self.prefix)
    }

    /// Held by who looks for events that nobody has sent.
    pub fn sweeper(&self) -> String {
        format!("{}sweeper", self.prefix)
    }

    /// Hash: since when the bucket is there (`born`), and the processes that have something in it (`p:NAME`).
    pub fn head(&self, bucket: Bucket) -> String {
        self.within(bucket, "head")
    }

    /// Hash of events that are not known to be in Kafka: `VERSION RECEIVER` to `VERSION STATE AT CONNECTIONS RECEIVER`.
    pub fn due(&self, bucket: Bucket) -> String {
        self.within(bucket, "due")
    }

    /// Hash from a day, counted from 1970, to how many receivers that have gone are forgotten on it.
    pub fn gone(&self, bucket: Bucket) -> String {
        self.within(bucket, "gone")
    }

    /// Hash of what a process has registered: receiver to connections; under the empty field its marker.
    pub fn own(&self, bucket: Bucket, process: &str) -> String {
        self.within(bucket, &format!("of:{process}"))
    }

    /// Hash of one receiver: `state`, `version`, `since`, `seen`, and for each process `p:NAME` to connections.
    pub fn receiver(&self, bucket: Bucket, receiver: &str) -> String {
        self.within(bucket, &format!("is:{receiver}"))
    }

    fn within(&self, Bucket(number): Bucket, name: &str) -> String {
        format!("{}{{b{number}}}:{name}", self.prefix)
    }
}
