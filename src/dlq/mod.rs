//! Dead letters: records that were given up are kept in compacted topics until somebody replays or
//! purges them. A replay restores key, value, headers and event id, and deletes the letter only
//! after Kafka has the record. Faults of the platform and of customers' endpoints are kept apart.

mod change;
mod config;
mod filter;
mod http;
mod letter;
mod queue;
mod search;

pub use change::{Item, Outcome, Report};
pub use config::Config;
pub use filter::{Filter, Letters, parse_since};
pub use http::routes;
pub use letter::{Detail, HeaderValue, Summary};
pub use queue::{Listing, Query, Queue};
pub use search::{Bounds, Progress};

use rdkafka::error::KafkaError;

use crate::platform::kafka::{self, TopicError, TopicSpec, dead_letter, scan::ScanError};

/// The topic of records that our own processing gave up, before the prefix.
pub const EVENTS_TOPIC: &str = "dead-letter-events";
/// The topic of records that somebody's endpoint did not take, before the prefix.
pub const DELIVERIES_TOPIC: &str = "dead-letter-deliveries";

/// The room's topics.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    const REMEDY: &str = "set `dlq.partitions` to what the topic has";
    let spec = |name| dead_letter::topic_spec(kafka, name, config.partitions, REMEDY);
    vec![spec(EVENTS_TOPIC), spec(DELIVERIES_TOPIC)]
}

/// Why dead letters could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another request is reading the dead letters")]
    Busy,
    #[error("the dead letters could not be read in the time for it; narrow the filter, or use `postrider dlq`")]
    Deadline,
    #[error("more than {0} letters match; narrow the filter, for instance with a topic or a time")]
    TooMany(usize),
    #[error("topic `{0}` does not exist")]
    UnknownTopic(String),
    #[error("Kafka does not answer: {0}")]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Topic(#[from] TopicError),
    #[error("the work ended early")]
    Ended,
}

impl From<ScanError> for Error {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Deadline => Self::Deadline,
            ScanError::Kafka(error) => Self::Kafka(error),
        }
    }
}
