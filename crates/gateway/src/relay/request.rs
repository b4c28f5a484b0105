//! Body and headers of a delivery request.

use std::{cell::RefCell, io::Write};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use bytes::Bytes;
use postrider_kafka::{batch::Record, event};
use postrider_telemetry::trace_context::TraceContext;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::envelope::{Content, Envelope};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Milliseconds since the Unix epoch; the envelope's time has whole seconds only.
static TIMESTAMP: HeaderName = HeaderName::from_static("postrider-timestamp");
/// Distinguishes a null value from an empty one, which look the same in the envelope.
static TOMBSTONE: HeaderName = HeaderName::from_static("postrider-tombstone");

/// Default headers of every request; configured headers override them.
pub const HEADERS: [(HeaderName, HeaderValue); 2] = [
    (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
    (header::USER_AGENT, HeaderValue::from_static("kafka-http-consumer/1.0")),
];

/// Maximum number of headers that [`add_headers`] adds.
pub const MORE_HEADERS: usize = 4;

/// Longest event id, in bytes, that is used as an idempotency key.
const MAX_ID_BYTES: usize = 255;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Maximum scratch space in bytes that a thread keeps after a large record.
const MAX_SCRATCH_BYTES: usize = 1 << 20;

/// Runs `write` on scratch space and returns its output in one allocation.
fn bytes(write: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        write(scratch);
        let written = Bytes::copy_from_slice(scratch);
        scratch.shrink_to(MAX_SCRATCH_BYTES);
        written
    })
}

/// Returns the request body.
pub fn body(envelope: &Envelope, partition: i32, record: &Record<'_>) -> Bytes {
    let content = Content {
        partition,
        offset: record.offset(),
        key: record.key(),
        value: record.value(),
        timestamp_ms: record.timestamp_ms(),
    };
    bytes(|out| envelope.render(out, &content))
}

/// Adds the headers that depend on the record.
pub fn add_headers(headers: &mut HeaderMap, topic: &str, partition: i32, record: &Record<'_>) {
    if let Some(key) = idempotency_key(topic, partition, record) {
        headers.insert(IDEMPOTENCY_KEY.clone(), key);
    }
    headers.insert(TIMESTAMP.clone(), HeaderValue::from(record.timestamp_ms()));
    if record.value().is_none() {
        headers.insert(TOMBSTONE.clone(), HeaderValue::from_static("true"));
    }
    if let Some(trace) = trace(record)
        && let Ok(value) = HeaderValue::from_bytes(&trace.traceparent())
    {
        headers.insert(TRACEPARENT.clone(), value);
    }
}

/// Returns the event id if the record has one, otherwise its topic, partition and offset. The key
/// is the same for every attempt.
fn idempotency_key(topic: &str, partition: i32, record: &Record<'_>) -> Option<HeaderValue> {
    let id = record.header(event::ID).filter(|id| (1..=MAX_ID_BYTES).contains(&id.len()));
    if let Some(id) = id.and_then(|id| HeaderValue::from_bytes(id).ok()) {
        return Some(id);
    }
    let position = bytes(|out| {
        // Writing to memory cannot fail.
        let _ = write!(out, "{topic}/{partition}@{}", record.offset());
    });
    HeaderValue::from_maybe_shared(position).ok()
}

/// Returns the context of the delivery span if it is recorded, otherwise the record's own.
fn trace(record: &Record<'_>) -> Option<TraceContext> {
    let context = record.header(event::TRACEPARENT).and_then(TraceContext::parse)?;
    let span = Span::current();
    match context.sampled && !span.is_disabled() {
        true => TraceContext::from_otel(&span.context()).or(Some(context)),
        false => Some(context),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        Timestamp,
        message::{Header, OwnedHeaders, OwnedMessage},
    };

    use super::*;
    use postrider_kafka::batch::Batch;

    fn headers_of(value: Option<&[u8]>, own: &[(&str, &[u8])]) -> HeaderMap {
        let mut headers = OwnedHeaders::new();
        for (key, value) in own {
            headers = headers.insert(Header { key, value: Some(*value) });
        }
        let (value, time) = (value.map(<[u8]>::to_vec), Timestamp::CreateTime(1_672_574_400_120));
        let mut batch = Batch::default();
        batch.push(&OwnedMessage::new(value, None, "t".to_owned(), time, 3, 1234, Some(headers)));
        let mut headers = HeaderMap::new();
        add_headers(&mut headers, "my-topic", 3, &batch.iter().next().unwrap());
        headers
    }

    #[test]
    fn the_idempotency_key_is_the_event_id_or_else_the_position() {
        assert_eq!(headers_of(Some(b"{}"), &[])["idempotency-key"], "my-topic/3@1234");
        assert_eq!(headers_of(Some(b"{}"), &[("ce_id", b"e-1")])["idempotency-key"], "e-1");
        for odd in [&b""[..], b"two\nlines", &[b'x'; 300]] {
            assert_eq!(headers_of(Some(b"{}"), &[("ce_id", odd)])["idempotency-key"], "my-topic/3@1234");
        }
    }

    #[test]
    fn headers_add_what_the_envelope_lacks() {
        let headers = headers_of(Some(b""), &[]);
        assert_eq!(headers["postrider-timestamp"], "1672574400120");
        assert!(!headers.contains_key("postrider-tombstone") && !headers.contains_key("traceparent"));
        assert_eq!(headers_of(None, &[])["postrider-tombstone"], "true");
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(headers_of(None, &[("traceparent", traceparent.as_bytes())])["traceparent"], traceparent);
        assert!(!headers_of(None, &[("traceparent", b"nonsense")]).contains_key("traceparent"));
    }
}
