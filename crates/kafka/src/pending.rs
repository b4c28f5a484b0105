//! Records that are not settled yet: what travels with a record through the client, and a record
//! that waits to be handed over.

use std::time::Instant;

use rdkafka::message::OwnedHeaders;
use tokio::sync::oneshot;

use super::{
    admission::Permit,
    outgoing::{Outgoing, SendError, Stored},
};

/// Channel that receives the outcome of a record.
pub(super) type Answer = oneshot::Sender<Result<Stored, SendError>>;

/// State that travels with a record through the client.
pub(super) struct Pending {
    _permit: Permit,
    pub accepted: Instant,
    /// The record's timestamp, which the client library does not report for a failed record.
    pub timestamp_ms: Option<i64>,
    pub answer: Option<Answer>,
}

impl Pending {
    pub fn new(permit: Permit, answer: Option<Answer>) -> Box<Self> {
        Box::new(Self { _permit: permit, accepted: Instant::now(), timestamp_ms: None, answer })
    }
}

/// An owned copy of an outgoing record, with its pending answer.
pub(super) struct Waiting {
    topic: String,
    partition: Option<i32>,
    /// The key, followed by the payload.
    bytes: Vec<u8>,
    key_len: Option<usize>,
    has_payload: bool,
    headers: Option<OwnedHeaders>,
    timestamp_ms: Option<i64>,
    pending: Box<Pending>,
}

impl Waiting {
    pub fn new(record: Outgoing<'_>, pending: Box<Pending>) -> Self {
        let (key, payload) = (record.key.unwrap_or_default(), record.payload.unwrap_or_default());
        let mut bytes = Vec::with_capacity(key.len() + payload.len());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(payload);
        Self {
            topic: record.topic.to_owned(),
            partition: record.partition,
            bytes,
            key_len: record.key.map(<[u8]>::len),
            has_payload: record.payload.is_some(),
            headers: record.headers,
            timestamp_ms: record.timestamp_ms,
            pending,
        }
    }

    /// Returns the pending answer and drops the record.
    pub fn into_pending(self) -> Box<Pending> {
        self.pending
    }

    /// Passes the record, borrowed, and its pending answer to `hand_over`.
    pub fn use_with<T>(self, hand_over: impl FnOnce(Outgoing<'_>, Box<Pending>) -> T) -> T {
        let (key, payload) = self.bytes.split_at(self.key_len.unwrap_or(0));
        let record = Outgoing {
            topic: &self.topic,
            partition: self.partition,
            key: self.key_len.map(|_| key),
            payload: self.has_payload.then_some(payload),
            headers: self.headers,
            timestamp_ms: self.timestamp_ms,
            extra_bytes: 0,
        };
        hand_over(record, self.pending)
    }
}
