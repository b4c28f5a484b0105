//! Key-value view: pushes go to the compacted topic `messages`, the processor projects them into
//! Redis, and pulls read from Redis. Redis may lose its data at any moment; the projection then
//! rebuilds the view from the topic. Until the view is complete a pull returns 503, never a false
//! 404, and a value never goes back to an older version.

mod audit;
pub mod codes;
#[cfg(test)]
mod compaction;
mod config;
mod entry;
mod expire;
mod http;
mod ids;
mod keys;
mod lookup;
mod plan;
mod project;
mod record;
mod restate;
mod script;
mod service;
mod view;

use postrider_kafka::{self as kafka, TopicSpec};

pub use config::{AuditMode, Config};
pub use http::{routes, short_cuts};
pub use project::Projector;
pub use service::{Background, Service};

/// Topic of pushes, without the prefix.
pub const TOPIC: &str = "messages";
/// Topic of reads, without the prefix.
const AUDIT_TOPIC: &str = "audit";

/// Header of records that the projection writes: the record holds the newest write of its key up to
/// this offset. The newest version of a key applies, in whatever order records arrive.
const VERSION_HEADER: &str = "postrider-version";
/// Header with the expiry of the value, in milliseconds since the Unix epoch.
const EXPIRES_HEADER: &str = "postrider-expires-at";

/// Consumer group of the projection, without the prefix.
pub const GROUP: &str = "postrider-kv";

/// Returns the topics of this capability.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    vec![
        TopicSpec {
            name: kafka.topic(TOPIC),
            partitions: config.partitions,
            settings: vec![
                setting("cleanup.policy", "compact"),
                setting("message.timestamp.type", "LogAppendTime"),
                // A duplicate may arrive a day after its write. Writes in between must not be
                // compacted until the projection, which may be down for some hours, has restated
                // them.
                setting("min.compaction.lag.ms", "129600000"),
                setting("delete.retention.ms", "86400000"),
            ],
            required: vec![("cleanup.policy", "compact"), ("message.timestamp.type", "LogAppendTime")],
            remedy: "set `kv.partitions` to the partition count with which the topic was created. If partitions were added later, earlier keys stay in their old partitions and cannot be found: use a new topic, with another `kafka.topic_prefix` or by deleting this one and raising `kv.epoch`, and push the values again".to_owned(),
        },
        TopicSpec {
            name: kafka.topic(AUDIT_TOPIC),
            partitions: config.audit_partitions,
            settings: vec![setting("cleanup.policy", "delete"), setting("message.timestamp.type", "LogAppendTime")],
            required: vec![],
            remedy: "set `kv.audit_partitions` to the partition count of the topic".to_owned(),
        },
    ]
}
