//! Activity of a connection: counters that its stream and its requests update, and that the watch
//! reads.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderValue, Response, StatusCode, header},
    routing::future::RouteFuture,
};
use futures_util::future::Either;
use hyper::body::{Body as _, Incoming};
use pin_project_lite::pin_project;
use postrider_process::drain::Draining;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tower::Service;

use super::{
    answer,
    client::{ClientAddress, Proxies},
    layer::Answering,
    linger::Linger,
    serve::Audience,
    shortcut::{Answer, ShortCuts},
};

/// Counters of one connection.
#[derive(Default)]
pub struct Activity {
    pub(super) bytes_read: AtomicU64,
    /// `bytes_read` when the last answer was ready; later bytes belong to the next request.
    pub(super) bytes_settled: AtomicU64,
    pub(super) requests: AtomicU64,
    /// Requests that are not answered yet, including streamed answers.
    pub(super) active: AtomicU64,
    /// Set if the connection speaks HTTP/2, where bytes arrive between requests too, such as
    /// answers to pings.
    pub(super) http2: AtomicBool,
    /// Set if the last answer may have been sent before its request was read to the end.
    cut_short: AtomicBool,
    /// Pieces of answers that the HTTP/2 library has not sent yet: number → time of hand-over.
    unsent: Mutex<BTreeMap<u64, Instant>>,
    draining: Draining,
    /// Set if answers draw from the memory budgets.
    pub(super) counts_answers: bool,
}

impl Activity {
    pub fn new(draining: Draining, audience: Audience) -> Self {
        Self { draining, counts_answers: audience == Audience::Callers, ..Self::default() }
    }
}

impl Activity {
    fn unsent(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how long the oldest unsent piece of an answer has been waiting for its client.
    pub(super) fn unsent_for(&self) -> Option<Duration> {
        self.unsent().first_key_value().map(|(_, since)| since.elapsed())
    }
}

/// A piece of an answer that the HTTP/2 library holds; dropped when it is sent, or its stream is
/// reset.
pub(super) struct Unsent {
    activity: Arc<Activity>,
    number: u64,
}

impl Unsent {
    pub fn new(activity: Arc<Activity>) -> Self {
        let mut unsent = activity.unsent();
        let number = unsent.last_key_value().map_or(0, |(last, _)| last + 1);
        unsent.insert(number, Instant::now());
        drop(unsent);
        Self { activity, number }
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.activity.unsent().remove(&self.number);
    }
}

/// Stream of a connection that counts the bytes read.
pub struct Metered {
    stream: TcpStream,
    activity: Arc<Activity>,
    linger: Linger,
    /// Bytes of HTTP/2's preface read so far; `None` if the connection began with something else.
    preface: Option<usize>,
}

/// First bytes of every HTTP/2 connection; no HTTP/1 request begins with them.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Metered {
    pub fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity, linger: Linger::default(), preface: Some(0) }
    }
}

/// Returns how much of the preface has been read after these bytes; `None` if they differ from it.
fn preface_seen(seen: usize, bytes: &[u8]) -> Option<usize> {
    let wanted = &PREFACE[seen..];
    let compared = wanted.len().min(bytes.len());
    (wanted[..compared] == bytes[..compared]).then_some(seen + compared)
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let read = buffer.filled().len() - before;
        if read > 0 {
            if let Some(seen) = self.preface {
                self.preface = preface_seen(seen, &buffer.filled()[before..]);
                self.activity.http2.store(self.preface == Some(PREFACE.len()), Relaxed);
            }
            self.activity.bytes_read.fetch_add(read as u64, Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, activity, linger, .. } = self.get_mut();
        ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        linger.poll(stream, activity.cut_short.load(Relaxed), cx).map(Ok)
    }
}

/// The routes of one connection; counts the requests.
#[derive(Clone)]
pub struct Counted {
    pub router: Router,
    pub short_cuts: Arc<ShortCuts>,
    pub peer: IpAddr,
    pub proxies: Proxies,
    pub activity: Arc<Activity>,
}

impl hyper::service::Service<Request<Incoming>> for Counted {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Counting;

    fn call(&self, request: Request<Incoming>) -> Counting {
        let running = Some(Running::start(&self.activity));
        let mut request = request.map(Body::new);
        let answer = match self.short_cuts.find(&request) {
            Some(short_cut) => Either::Left(short_cut.call(request)),
            None => {
                let client = self.proxies.client(self.peer, request.headers());
                request.extensions_mut().insert(ClientAddress(client));
                Either::Right(self.router.clone().call(request))
            }
        };
        Counting { answer, running }
    }
}

pin_project! {
    /// Pending answer to a counted request.
    pub struct Counting {
        #[pin]
        answer: Either<Answering<Answer>, RouteFuture<Infallible>>,
        running: Option<Running>,
    }
}

impl Future for Counting {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = match ready!(this.answer.poll(cx)) {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let Some(running) = this.running.take() else { return Poll::Ready(Ok(response)) };
        response = answer::guard(response, &running.0);
        running.0.cut_short.store(is_cut_short(response.status()), Relaxed);
        // `Connection: close` makes the client send its next request elsewhere. Otherwise that
        // request may arrive just when the connection is closed.
        let closes = running.0.draining.has_begun() || leaves_body(response.status());
        if closes && !running.0.http2.load(Relaxed) && !is_upgrade(response.status()) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Poll::Ready(Ok(match response.body().size_hint().exact() {
            Some(_) => response,
            None => response.map(|body| Body::new(Streaming { body, _running: running })),
        }))
    }
}

fn is_upgrade(status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS
}

/// Returns whether an answer with this status is sent while the rest of the request is still
/// arriving. Nothing reads that rest, so the connection is closed.
fn leaves_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT)
}

/// Returns whether an answer with this status may be sent before its request was read to the end.
fn is_cut_short(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 405 | 408 | 413 | 415 | 503)
}

/// A request that is not answered yet.
pub(super) struct Running(Arc<Activity>);

impl Running {
    pub(super) fn start(activity: &Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Relaxed);
        activity.active.fetch_add(1, Relaxed);
        Self(activity.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.bytes_settled.store(self.0.bytes_read.load(Relaxed), Relaxed);
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// Body of a streamed answer; the request counts as running until its end.
struct Streaming {
    body: Body,
    _running: Running,
}

impl hyper::body::Body for Streaming {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preface_is_recognized_however_it_is_split() {
        assert_eq!(preface_seen(0, PREFACE), Some(PREFACE.len()));
        assert_eq!(preface_seen(0, b"PRI * HT").and_then(|seen| preface_seen(seen, b"TP/2.0\r\n")), Some(16));
        assert_eq!(preface_seen(PREFACE.len(), b"more"), Some(PREFACE.len()));
        for other in [&b"POST /push"[..], b"PRI * HTTP/1.1"] {
            assert_eq!(preface_seen(0, other), None);
        }
    }
}
