//! Body of an answer while the client reads it: its share of the memory budgets, and the detection
//! of stalled clients.
//!
//! HTTP/2 has a flow-control window for each stream. A client that never opens it keeps the stream,
//! and everything that belongs to it, while its connection lives, and neither TCP nor the library
//! notices. So every such stream is supervised: a stream whose window has no space for the next
//! piece within the timeout is reset. The end of an answer may outlive its stream in the library; a
//! connection that does not take it is dropped.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderMap, Response},
};
use bytes::Bytes;
use hyper::body::{Body as _, Frame, SizeHint};
use metrics::counter;
use parking_lot::Mutex;
use postrider_limits::memory::{Lease, budgets};
use tokio::time::Instant;

use super::{
    Code, Problem,
    activity::{Activity, Unsent},
    context::{REQUEST_ID, TRACEPARENT},
};

/// Largest body or piece that is not counted, in bytes: a connection itself costs as much.
const UNCOUNTED: usize = 4 << 10;
/// Largest piece that is handed over at a time, in bytes. The HTTP/2 library accepts pieces beyond
/// the client's window.
const PIECE: usize = 16 << 10;
tokio::task_local! {
    /// HTTP/2 stream that this task serves.
    static STREAM: Arc<Stream>;
}

/// One supervised HTTP/2 stream.
#[derive(Default)]
struct Stream {
    /// Time at which a piece was handed to the library, which asks for more once the client's
    /// window has space for it.
    handed: Mutex<Option<Instant>>,
}

impl Stream {
    fn note(&self, handed: Option<Instant>) {
        *self.handed.lock() = handed;
    }

    fn is_stalled(&self, timeout: Duration) -> bool {
        self.handed.lock().is_some_and(|at| at.elapsed() >= timeout)
    }
}

/// Runs HTTP/2 streams, each until it ends or stalls.
#[derive(Debug, Clone)]
pub struct StreamExecutor {
    /// Longest time that a client may read nothing of an answer.
    pub write_timeout: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for StreamExecutor {
    fn execute(&self, stream: F) {
        tokio::spawn(supervise(stream, self.write_timeout));
    }
}

async fn supervise(stream: impl Future<Output = ()>, timeout: Duration) {
    let state = Arc::<Stream>::default();
    let look = (timeout / 4).max(Duration::from_millis(10));
    let mut running = pin!(STREAM.scope(state.clone(), stream));
    while tokio::time::timeout(look, &mut running).await.is_err() {
        if state.is_stalled(timeout) {
            // Dropping the stream resets it.
            counter!("http_server_stalled_streams_total").increment(1);
            return;
        }
    }
}

/// Makes the body of an answer draw from the budgets, and on HTTP/2 supervises its stream. A large
/// body that does not fit into the budget becomes 503 `overloaded`.
pub fn guard(response: Response<Body>, activity: &Arc<Activity>) -> Response<Body> {
    let size = response.body().size_hint().exact();
    let stream = STREAM.try_with(Arc::clone).ok();
    let is_small = size.is_some_and(|bytes| bytes <= UNCOUNTED as u64);
    if !activity.counts_answers || (is_small && stream.is_none()) {
        return response;
    }
    let (response, whole) = match size {
        Some(bytes) if !is_small => match budgets().responses.lease(usize::try_from(bytes).unwrap_or(usize::MAX)) {
            Some(lease) => (response, Some(Arc::new(lease))),
            None => (overloaded(response.headers()), None),
        },
        _ => (response, None),
    };
    let activity = stream.is_some().then(|| activity.clone());
    response.map(|body| Body::new(Guarded { body, rest: Bytes::new(), rest_lease: None, whole, stream, activity }))
}

fn overloaded(former: &HeaderMap) -> Response<Body> {
    let mut refusal =
        Problem::new(Code::OVERLOADED, "the memory budget for answers is used up; retry later").respond(None);
    for name in [&REQUEST_ID, &TRACEPARENT] {
        if let Some(value) = former.get(name) {
            refusal.headers_mut().insert(name.clone(), value.clone());
        }
    }
    refusal
}

/// A body whose pieces hold their share of a budget until they are sent.
struct Guarded {
    body: Body,
    /// Rest of a large piece.
    rest: Bytes,
    rest_lease: Option<Arc<Lease>>,
    /// Lease for the whole body, if its size was known.
    whole: Option<Arc<Lease>>,
    /// `Some` on HTTP/2.
    stream: Option<Arc<Stream>>,
    activity: Option<Arc<Activity>>,
}

impl Guarded {
    /// Takes the next piece of the rest.
    fn piece(&mut self) -> Bytes {
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        let lease = if self.rest.is_empty() { self.rest_lease.take() } else { self.rest_lease.clone() };
        if let Some(stream) = &self.stream {
            stream.note(Some(Instant::now()));
        }
        match lease {
            Some(lease) => {
                let unsent = self.activity.as_ref().map(|activity| Unsent::new(activity.clone()));
                Bytes::from_owner(Held { piece, _lease: lease, _unsent: unsent })
            }
            None => piece,
        }
    }
}

/// A piece with its lease, until it is sent.
struct Held {
    piece: Bytes,
    _lease: Arc<Lease>,
    _unsent: Option<Unsent>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.piece
    }
}

impl hyper::body::Body for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        if let Some(stream) = &this.stream {
            stream.note(None);
        }
        if this.rest.is_empty() {
            let data = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                other => return Poll::Ready(other),
            };
            this.rest_lease = match &this.whole {
                Some(whole) => Some(whole.clone()),
                None if data.len() <= UNCOUNTED => None,
                None => match budgets().queues.lease(data.len()) {
                    Some(lease) => Some(Arc::new(lease)),
                    // The stream fails, and the client resumes.
                    None => return Poll::Ready(Some(Err(axum::Error::new(BudgetExhausted)))),
                },
            };
            this.rest = data;
        }
        Poll::Ready(Some(Ok(Frame::data(this.piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, mut hint) = (self.rest.len() as u64, self.body.size_hint());
        match hint.exact() {
            Some(exact) => hint.set_exact(exact + rest),
            None => hint.set_lower(hint.lower() + rest),
        }
        hint
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the memory budget for streams is used up")]
struct BudgetExhausted;
