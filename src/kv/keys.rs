//! Names of our keys in Redis. Everything of one Kafka partition shares a hash tag, so that a Redis
//! Cluster keeps it on one shard and it is lost, or rolled back, as one.

use uuid::Uuid;

/// The field of the view that holds its marker. Keys of clients are never empty, and because the
/// marker lives in the hash itself, no part of the view can be lost without it.
pub const MARKER_FIELD: &str = "";

/// The keys of one Kafka partition.
#[derive(Debug, Clone)]
pub struct Keys {
    /// The hash from a client's key to its entry.
    pub view: String,
    /// A sorted set of keys by the time at which their entry ends.
    pub ends: String,
    /// A hash from an hour, counted from 1970, to how many ids expire in it.
    pub id_counts: String,
    ids: String,
}

impl Keys {
    pub fn new(prefix: &str, epoch: u32, partition: i32) -> Self {
        let base = format!("{prefix}kv:{{e{epoch}.p{partition}}}:");
        Self {
            view: format!("{base}view"),
            ends: format!("{base}ends"),
            id_counts: format!("{base}ids"),
            ids: format!("{base}id:"),
        }
    }

    /// The key that remembers at which offset an idempotent write was seen first.
    pub fn id(&self, id: Uuid) -> String {
        format!("{}{}", self.ids, id.simple())
    }
}
