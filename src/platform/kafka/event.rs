//! CloudEvents 1.0 attributes and trace context as record headers (Kafka binary content mode).

use rdkafka::message::{BorrowedHeaders, Header, Headers, OwnedHeaders};
use uuid::Uuid;

use crate::platform::{clock, trace_context::TraceContext};

/// Header names shared by writers and readers.
pub const ID: &str = "ce_id";
pub const TYPE: &str = "ce_type";
pub const TRACEPARENT: &str = "traceparent";

/// What an event says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// A UUIDv7, or a UUIDv5 of the idempotency key.
    pub id: Uuid,
    pub kind: &'a str,
    /// A path such as `/kv`.
    pub source: &'a str,
    pub trace: TraceContext,
}

impl Event<'_> {
    /// The headers of the event's record, with room for `more`.
    pub fn headers(&self, more: usize) -> OwnedHeaders {
        let mut id = Uuid::encode_buffer();
        let id = self.id.hyphenated().encode_lower(&mut id);
        OwnedHeaders::new_with_capacity(6 + more)
            .insert(Header { key: "ce_specversion", value: Some("1.0") })
            .insert(Header { key: ID, value: Some(&*id) })
            .insert(Header { key: TYPE, value: Some(self.kind) })
            .insert(Header { key: "ce_source", value: Some(self.source) })
            .insert(Header { key: "ce_time", value: Some(&clock::rfc3339(clock::now_ms())) })
            .insert(Header { key: TRACEPARENT, value: Some(&self.trace.traceparent()[..]) })
    }
}

/// The last value of a header, as Kafka's own clients read it.
pub fn header<'a>(headers: &'a BorrowedHeaders, name: &str) -> Option<&'a [u8]> {
    headers.iter().filter(|header| header.key == name).last().and_then(|header| header.value)
}
