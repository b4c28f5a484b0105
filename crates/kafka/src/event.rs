//! CloudEvents 1.0 attributes and trace context as record headers (Kafka binary content mode).

use std::cell::RefCell;

use postrider_telemetry::trace_context::TraceContext;
use postrider_time::clock;
use rdkafka::message::{Header, OwnedHeaders};
use uuid::{NoContext, Timestamp, Uuid};

/// Header names shared by writers and readers.
pub const ID: &str = "ce_id";
pub const TYPE: &str = "ce_type";
pub const TRACEPARENT: &str = "traceparent";

/// Attributes of an event.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// Event id: a UUIDv7, or a UUIDv5 of the idempotency key.
    pub id: Uuid,
    pub kind: &'a str,
    /// Source path, such as `/kv`.
    pub source: &'a str,
    pub trace: TraceContext,
}

impl Event<'_> {
    /// Returns the headers of the event's record, with capacity for `more` additional ones.
    pub fn headers(&self, more: usize) -> OwnedHeaders {
        let mut id = Uuid::encode_buffer();
        let id = self.id.hyphenated().encode_lower(&mut id);
        let headers = OwnedHeaders::new_with_capacity(6 + more)
            .insert(Header { key: "ce_specversion", value: Some("1.0") })
            .insert(Header { key: ID, value: Some(&*id) })
            .insert(Header { key: TYPE, value: Some(self.kind) })
            .insert(Header { key: "ce_source", value: Some(self.source) })
            .insert(Header { key: TRACEPARENT, value: Some(&self.trace.traceparent()[..]) });
        with_time(|time| headers.insert(Header { key: "ce_time", value: Some(time) }))
    }
}

/// Returns an id for a new event. It does not use the shared counter that orders ids created within
/// a millisecond: nothing relies on that order, and every request would contend for the counter's
/// lock.
pub fn new_id() -> Uuid {
    Uuid::new_v7(Timestamp::now(NoContext))
}

thread_local! {
    /// Cache of the last formatted time, because most events share their millisecond with others.
    static TIME: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
}

fn with_time<T>(use_it: impl FnOnce(&str) -> T) -> T {
    TIME.with_borrow_mut(|(written_ms, text)| {
        let now_ms = clock::now_ms();
        if now_ms != *written_ms {
            (*written_ms, *text) = (now_ms, clock::rfc3339(now_ms));
        }
        use_it(text)
    })
}
