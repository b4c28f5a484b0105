//! Records on their way to Kafka, and their outcomes.

use std::time::Instant;

use rdkafka::{error::RDKafkaErrorCode, message::OwnedHeaders};
use tokio::sync::oneshot;
use tracing::{Instrument, Span};

/// Purpose of a producer. Each has its own librdkafka client, because the library fails and drains
/// more than one record when a record fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Records of postrider's own topics.
    Internal,
    /// Callers' records.
    Callers,
    /// Callers' records that must not share a batch.
    Alone,
}

impl Purpose {
    /// Returns the client's name in logs and metrics.
    pub fn client(self) -> &'static str {
        match self {
            Self::Internal => "producer",
            Self::Callers => "producer-callers",
            Self::Alone => "producer-alone",
        }
    }
}

/// Record on its way to Kafka.
#[derive(Debug, Default)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    /// Target partition; `None` chooses it from the key's hash.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
    pub headers: Option<OwnedHeaders>,
    /// Timestamp in milliseconds since the epoch; `None` uses the client's clock.
    pub timestamp_ms: Option<i64>,
    /// Bytes that the topic allows beyond `kafka.producer.max_message_bytes`.
    pub extra_bytes: usize,
}

/// Partition and offset of a stored record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub partition: i32,
    pub offset: i64,
}

/// Reason why a record is not known to be stored.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SendError {
    #[error("the limit on records or bytes in flight is reached; retry later")]
    Full,
    #[error("no broker answers")]
    Unavailable,
    #[error("topic `{0}` does not exist")]
    UnknownTopic(String),
    #[error("the topic does not have this partition")]
    UnknownPartition,
    /// Sizes in bytes, each as a batch of one record. The limit is unknown if the broker has refused
    /// the record.
    #[error("the record has {bytes} bytes; {}", accepted(*.limit))]
    TooLarge { bytes: u32, limit: Option<u32> },
    #[error("the record was sent but not confirmed within the delivery timeout, so it may or may not be stored")]
    Unknown,
    #[error("{0}")]
    Rejected(RDKafkaErrorCode),
}

impl SendError {
    /// Returns the error of a record of this size.
    pub(super) fn too_large(bytes: usize, limit: Option<usize>) -> Self {
        let size = |bytes| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self::TooLarge { bytes: size(bytes), limit: limit.map(size) }
    }
}

fn accepted(limit: Option<u32>) -> String {
    match limit {
        Some(limit) => format!("at most {limit} are accepted (`kafka.producer.max_message_bytes`)"),
        None => "its topic accepts less (`max.message.bytes`)".to_owned(),
    }
}

/// Pending outcome of an accepted record.
#[derive(Debug)]
pub struct Receipt {
    pub(super) outcome: oneshot::Receiver<Result<Stored, SendError>>,
    pub(super) deadline: Instant,
}

impl Receipt {
    /// Waits for the broker's answer, up to the delivery timeout. After that the caller gets an
    /// unknown outcome; the client keeps trying to send the record, because dropping it could store
    /// the records next to it twice (librdkafka #4953).
    pub async fn stored(self, topic: &str) -> Result<Stored, SendError> {
        let answered = tokio::time::timeout_at(self.deadline.into(), self.outcome);
        // Creates a span only if the request has one.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_record_that_is_too_large_has_its_sizes() {
        assert_eq!(
            SendError::too_large(3_000, Some(2_999)).to_string(),
            "the record has 3000 bytes; at most 2999 are accepted (`kafka.producer.max_message_bytes`)"
        );
        assert_eq!(
            SendError::too_large(3_000, None).to_string(),
            "the record has 3000 bytes; its topic accepts less (`max.message.bytes`)"
        );
        assert_eq!(size_of::<SendError>(), size_of::<String>(), "it is part of every answer of the producer");
    }
}
