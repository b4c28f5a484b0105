//! Dead letters: records that could not be processed are kept in compacted topics until an operator
//! replays or purges them. A replay restores key, value, headers and event id, and deletes the
//! letter only after Kafka has the record. Failures of the platform and failures of customers'
//! endpoints have separate topics.

mod change;
pub mod codes;
mod config;
mod filter;
mod http;
mod letter;
mod queue;
mod search;

pub use change::{Item, Outcome, Report};
pub use config::Config;
pub use filter::{Filter, KeyError, Letters, SinceError, parse_key, parse_since};
pub use http::routes;
pub use letter::{Detail, HeaderValue, Summary};
pub use queue::{Listing, Query, Queue};
pub use search::{Bounds, Progress};

use postrider_kafka::{self as kafka, TopicError, TopicSpec, dead_letter, scan::ScanError};
use rdkafka::error::KafkaError;

/// The topic of records that postrider itself could not process, before the prefix.
pub const EVENTS_TOPIC: &str = "dead-letter-events";
/// The topic of records that a customer's endpoint did not accept, before the prefix.
pub const DELIVERIES_TOPIC: &str = "dead-letter-deliveries";

/// Returns the topics of the capability.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    const REMEDY: &str = "set `dlq.partitions` to the number of partitions of the topic";
    let spec = |name| dead_letter::topic_spec(kafka, name, config.partitions, REMEDY);
    vec![spec(EVENTS_TOPIC), spec(DELIVERIES_TOPIC)]
}

/// The reason why dead letters could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another request is reading the dead letters; retry later")]
    Busy,
    #[error("reading the dead letters took too long; narrow the filter, or use `postrider dlq`")]
    Deadline,
    #[error("more than {0} letters match; narrow the filter, for instance by topic or time")]
    TooMany(usize),
    #[error("topic `{0}` does not exist")]
    UnknownTopic(String),
    #[error("Kafka does not answer: {0}")]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Topic(#[from] TopicError),
    #[error("the operation stopped before it finished; retry it")]
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
