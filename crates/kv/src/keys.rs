//! Names of the view's keys in Redis. All keys of a Kafka partition share a hash tag, so that a
//! Redis Cluster keeps them on one shard, and they are lost or rolled back together.

use uuid::Uuid;

/// Field of the view that holds its marker. Clients' keys are never empty. Because the marker is in
/// the hash itself, no part of the view can be lost without it.
pub const MARKER_FIELD: &str = "";

/// Keys of one Kafka partition.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Hash from a client's key to its entry.
    pub view: String,
    /// Sorted set of keys by the time at which their entry expires.
    pub ends: String,
    /// Hash from an hour, counted from 1970, to the number of ids that expire in it.
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

    /// Returns the key that stores the first offset of an idempotent write.
    pub fn id(&self, id: Uuid) -> String {
        format!("{}{}", self.ids, id.simple())
    }
}
