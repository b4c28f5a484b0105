//! Server-sent events, in the format of all live streams.

use std::{
    convert::Infallible,
    fmt::Display,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use postrider_identity::Principal;

/// A stream as clients get it: as text, or from a parser event by event.
#[derive(utoipa::ToSchema)]
#[serde(untagged)]
#[schema(as = EventStream)]
#[allow(dead_code, reason = "only described")]
pub enum Described {
    Text(String),
    Event(Event),
}

/// One event, as clients parse it.
#[derive(utoipa::ToSchema)]
#[schema(as = ServerSentEvent)]
#[allow(dead_code, reason = "only described")]
pub struct Event {
    /// Position of the stream after this event.
    id: String,
    /// Type of the event; `message` if absent.
    #[schema(nullable = false)]
    event: Option<String>,
    data: String,
}

/// Time that a client waits before it resumes, in milliseconds.
const RETRY_MS: u32 = 1_000;

/// Comment line that shows that the stream is alive.
pub const HEARTBEAT: Bytes = Bytes::from_static(b": heartbeat\n\n");

/// Returns the beginning of a stream. It has no data and only sets the position from which the
/// client resumes if it must do so before the first event.
pub fn hello(position: &impl Display) -> Bytes {
    Bytes::from(format!("retry: {RETRY_MS}\nid: {position}\n\n"))
}

/// Returns an event with these lines of data.
pub fn event(position: &impl Display, data: &[u8]) -> Bytes {
    let mut event = Vec::with_capacity(data.len() + 64);
    event.extend_from_slice(format!("id: {position}\n").as_bytes());
    for line in data.split(|&byte| byte == b'\n' || byte == b'\r') {
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(line);
        event.push(b'\n');
    }
    event.push(b'\n');
    event.into()
}

/// Returns the lifetime of a stream: up to a tenth more or less than the maximum age, so that
/// streams opened together do not end together.
pub fn age(max_age_ms: u64) -> Duration {
    let tenth = max_age_ms / 10;
    Duration::from_millis((max_age_ms - tenth).saturating_add(fastrand::u64(0..=2 * tenth)))
}

/// Last event of a stream whose credential is no longer accepted. Clients that resume get 401.
const ENDED: Bytes = Bytes::from_static(
    b"event: error\ndata: {\"code\":\"unauthenticated\",\"detail\":\"the credential has expired or was revoked\"}\n\n",
);

/// Returns the answer that carries a stream. It ends with an event `error` when the principal's
/// credential does.
pub fn respond(
    events: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
    principal: Arc<Principal>,
) -> Response<Body> {
    let ended = principal.clone();
    let events = events.take_until(async move { ended.ended().await });
    let last = stream::once(async move { principal.must_close(SystemTime::now()).then_some(Ok(ENDED)) });
    let events = events.chain(last.filter_map(std::future::ready));
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Turns off the buffering of answers in proxies that know this header.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_of_several_lines_stays_one_event() {
        assert_eq!(event(&7, b"{\n\"a\":1}"), "id: 7\ndata: {\ndata: \"a\":1}\n\n");
    }
}
