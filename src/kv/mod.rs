//! A key-value view: pushes go to the compacted topic `messages`, the processor projects them into
//! Redis, pulls read from there. Redis may vanish at any moment and is rebuilt from the topic; until
//! the view is complete a pull is 503, never a false 404, and a value never goes back.

mod audit;
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
mod view_status;

pub use config::{AuditMode, Config};
pub use http::{routes, short_cuts};
pub use project::Projector;
pub use service::{Background, Service};

use crate::platform::kafka::{self, TopicSpec};

/// The topic of pushes, before the prefix.
pub const TOPIC: &str = "messages";
/// The topic of reads, before the prefix.
const AUDIT_TOPIC: &str = "audit";

/// Up to which offset a record speaks that the projection wrote: of all writes of its key up to there,
/// the newest is what it says. The newest version of a key wins, whatever order records arrive in.
const VERSION_HEADER: &str = "postrider-version";
/// When the value ends, in milliseconds since the epoch.
const EXPIRES_HEADER: &str = "postrider-expires-at";

/// The consumer group of the projection, before the prefix.
pub const GROUP: &str = "postrider-kv";

/// The room's topics.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    vec![
        TopicSpec {
            name: kafka.topic(TOPIC),
            partitions: config.partitions,
            settings: vec![
                setting("cleanup.policy", "compact"),
                setting("message.timestamp.type", "LogAppendTime"),
                // A double may come a day after its write. What was written in between must still be there
                // until the projection, which may be down for some hours, has said it again.
                setting("min.compaction.lag.ms", "129600000"),
                setting("delete.retention.ms", "86400000"),
            ],
            required: vec![("cleanup.policy", "compact"), ("message.timestamp.type", "LogAppendTime")],
            remedy: "set `kv.partitions` to the count that the topic was made with. If partitions were added to it, keys stay where they were written and cannot be found any more: start with a new topic, by another `kafka.topic_prefix`, or by deleting this one and raising `kv.epoch`, and push again".to_owned(),
        },
        TopicSpec {
            name: kafka.topic(AUDIT_TOPIC),
            partitions: config.audit_partitions,
            settings: vec![setting("cleanup.policy", "delete"), setting("message.timestamp.type", "LogAppendTime")],
            required: vec![],
            remedy: "set `kv.audit_partitions` to what the topic has".to_owned(),
        },
    ]
}
