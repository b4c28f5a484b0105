//! Restates the newest value of a key when the topic's last record of the key is an older one.
//!
//! Compaction keeps a key's last record, so the last record must be the newest. It is not if a late
//! duplicate of an older write, or the tombstone of an expired value, was appended after a newer
//! write.

use postrider_kafka::{
    Outgoing, Producer, Receipt, SendError,
    consumer::Failure,
    event::{self, Event},
};
use postrider_telemetry::trace_context::TraceContext;
use rdkafka::message::{Header, OwnedHeaders};

use super::{
    EXPIRES_HEADER, VERSION_HEADER,
    entry::{Entry, State},
};

/// A record that the projection appends: the newest state of its key up to the offset `version`.
#[derive(Debug)]
pub struct Restatement {
    kind: &'static str,
    pub key: Vec<u8>,
    /// `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    pub version: i64,
    expires_ms: Option<i64>,
}

impl Restatement {
    /// Restates an entry. `version` is not the entry's own version: after a rebuild, the overruled
    /// record may no longer be recognized as a duplicate, and would then count as newer.
    pub fn of_entry(key: &[u8], entry: &Entry<'_>, version: i64) -> Self {
        let (value, expires_ms) = match entry.state {
            State::Value { value, expires_ms } => (Some(value.to_vec()), expires_ms),
            State::Deleted => (None, None),
        };
        Self { kind: "postrider.kv.restated", key: key.to_vec(), value, version, expires_ms }
    }

    /// Returns the tombstone of an expired value. It deletes writes up to the offset `version` and
    /// nothing newer.
    pub fn of_expired(key: &[u8], version: i64) -> Self {
        Self { kind: "postrider.kv.expired", key: key.to_vec(), value: None, version, expires_ms: None }
    }

    pub fn headers(&self) -> OwnedHeaders {
        let event = Event { id: event::new_id(), kind: self.kind, source: "/kv", trace: TraceContext::root() };
        let version = self.version.to_string();
        let headers = event.headers(2).insert(Header { key: VERSION_HEADER, value: Some(&version) });
        match self.expires_ms {
            Some(ms) => headers.insert(Header { key: EXPIRES_HEADER, value: Some(&ms.to_string()) }),
            None => headers,
        }
    }
}

/// Appends restatements to the topic.
pub struct Restater {
    producer: Producer,
    topic: String,
}

impl Restater {
    pub fn new(producer: Producer, topic: String) -> Self {
        Self { producer, topic }
    }

    pub fn send(&self, partition: i32, restatement: &Restatement) -> Result<Receipt, SendError> {
        self.producer.send(Outgoing {
            topic: &self.topic,
            partition: Some(partition),
            key: Some(&restatement.key),
            payload: restatement.value.as_deref(),
            headers: Some(restatement.headers()),
            ..Outgoing::default()
        })
    }

    /// Waits until Kafka has stored a record.
    pub async fn stored(&self, receipt: Result<Receipt, SendError>) -> Result<(), Failure> {
        let outcome = match receipt {
            Ok(receipt) => receipt.stored(&self.topic).await.map(|_| ()),
            Err(error) => Err(error),
        };
        outcome.map_err(|error| Failure::Retry(format!("Kafka: {error}")))
    }
}
