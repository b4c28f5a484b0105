//! Saying a key's newest value again, where the topic's last record of it is an older one.
//!
//! Compaction keeps a key's last record, so the last one must be the newest. It is not, when a late
//! double of an older write, or the tombstone of an expired value, came after a newer write.

use rdkafka::message::{Header, OwnedHeaders};

use super::{
    EXPIRES_HEADER, VERSION_HEADER,
    entry::{Entry, State},
};
use crate::platform::{
    kafka::{
        Outgoing, Producer, Receipt, SendError,
        event::{self, Event},
        lanes::Failure,
    },
    trace_context::TraceContext,
};

/// Writes records that repeat what the view has.
pub struct Restater {
    producer: Producer,
    topic: String,
}

impl Restater {
    pub fn new(producer: Producer, topic: String) -> Self {
        Self { producer, topic }
    }

    /// Writes the entry again, as the newest of its key up to the offset `version`, and waits until Kafka
    /// has it. Not with the entry's own version: a rebuild may no longer find out that the record which
    /// this one overrules is a double, and take that for newer.
    pub async fn restate(&self, partition: i32, key: &[u8], entry: &Entry<'_>, version: i64) -> Result<(), Failure> {
        let (value, expires_ms) = match entry.state {
            State::Value { value, expires_ms } => (Some(value), expires_ms),
            State::Deleted => (None, None),
        };
        let receipt = self.send("postrider.kv.restated", partition, key, value, version, expires_ms);
        self.stored(receipt).await
    }

    /// Writes the tombstone of a value that has expired. It deletes what was written up to the offset
    /// `version`, and nothing newer.
    pub fn expire(&self, partition: i32, key: &[u8], version: i64) -> Result<Receipt, SendError> {
        self.send("postrider.kv.expired", partition, key, None, version, None)
    }

    pub async fn stored(&self, receipt: Result<Receipt, SendError>) -> Result<(), Failure> {
        let outcome = match receipt {
            Ok(receipt) => receipt.stored(&self.topic).await.map(|_| ()),
            Err(error) => Err(error),
        };
        outcome.map_err(|error| Failure::Retry(format!("Kafka: {error}")))
    }

    fn send(
        &self,
        kind: &str,
        partition: i32,
        key: &[u8],
        value: Option<&[u8]>,
        version: i64,
        expires_ms: Option<i64>,
    ) -> Result<Receipt, SendError> {
        let event = Event { id: event::new_id(), kind, source: "/kv", trace: TraceContext::root() };
        let mut headers: OwnedHeaders =
            event.headers(2).insert(Header { key: VERSION_HEADER, value: Some(&version.to_string()) });
        if let Some(ms) = expires_ms {
            headers = headers.insert(Header { key: EXPIRES_HEADER, value: Some(&ms.to_string()) });
        }
        self.producer.send(Outgoing {
            topic: &self.topic,
            partition: Some(partition),
            key: Some(key),
            payload: value,
            headers: Some(headers),
            timestamp_ms: None,
        })
    }
}
