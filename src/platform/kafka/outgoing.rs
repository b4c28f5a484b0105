//! A record on its way to Kafka, and what becomes of it.

use std::time::Instant;

use rdkafka::{error::RDKafkaErrorCode, message::OwnedHeaders};
use tokio::sync::oneshot;
use tracing::{Instrument, Span};

/// What a producer is for. Each has a client of its own, since the client library fails and drains more than what
/// belongs to one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Records of our own topics.
    Internal,
    /// Callers' records.
    Callers,
    /// Callers' records that may not share a batch with others.
    Alone,
}

impl Purpose {
    /// The client's name in logs and metrics.
    pub fn client(self) -> &'static str {
        match self {
            Self::Internal => "producer",
            Self::Callers => "producer-callers",
            Self::Alone => "producer-alone",
        }
    }
}

/// A record on its way to Kafka.
#[derive(Debug, Default)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    /// Chosen from the key's hash when absent.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
    pub headers: Option<OwnedHeaders>,
    /// Milliseconds since the epoch; the client's clock when absent.
    pub timestamp_ms: Option<i64>,
    /// Bytes that the topic takes beyond `kafka.producer.max_message_bytes`.
    pub extra_bytes: usize,
}

/// Where a record was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub partition: i32,
    pub offset: i64,
}

/// Why a record is not known to be stored.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SendError {
    #[error("the bound on records or bytes in flight is reached")]
    Full,
    #[error("no broker answers")]
    Unavailable,
    #[error("topic `{0}` does not exist")]
    UnknownTopic(String),
    #[error("the topic has no such partition")]
    UnknownPartition,
    #[error("the record is larger than the broker takes")]
    TooLarge,
    #[error("handed over, but not confirmed within the delivery timeout")]
    Unknown,
    #[error("{0}")]
    Rejected(RDKafkaErrorCode),
}

/// The answer to come for a record that was taken.
#[derive(Debug)]
pub struct Receipt {
    pub(super) outcome: oneshot::Receiver<Result<Stored, SendError>>,
    pub(super) deadline: Instant,
}

impl Receipt {
    /// Waits for the broker's answer, up to the delivery timeout. After that the outcome is unknown to whoever wrote
    /// the record; the client goes on sending it, since giving it up may store its neighbours twice (librdkafka #4953).
    pub async fn stored(self, topic: &str) -> Result<Stored, SendError> {
        let answered = tokio::time::timeout_at(self.deadline.into(), self.outcome);
        // A span of its own only where the request has one.
        let answered =
            if Span::current().is_none() { answered.await } else { answered.instrument(publish_span(topic)).await };
        answered.map_or(Err(SendError::Unknown), |outcome| outcome.unwrap_or(Err(SendError::Unknown)))
    }
}

fn publish_span(topic: &str) -> Span {
    tracing::info_span!(
        "publish",
        otel.name = format!("publish {topic}"),
        otel.kind = "producer",
        messaging.system = "kafka",
        messaging.destination.name = topic,
    )
}
