//! What a connection is doing, so that one that stalls in a request's head, or idles for long, can
//! be closed. One look now and then costs less than a timer armed for every request.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, body::Body, extract::Request, http::Response, http::StatusCode, routing::future::RouteFuture};
use futures_util::{FutureExt, future::Map};
use hyper::body::{Body as _, Incoming};
use std::convert::Infallible;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tower::Service;

use super::linger::Linger;

/// Counters of one connection.
#[derive(Default)]
pub struct Activity {
    bytes_read: AtomicU64,
    /// `bytes_read` when the last answer was ready: what came after belongs to the next request.
    bytes_settled: AtomicU64,
    requests: AtomicU64,
    /// Requests that are not answered yet, streamed answers included.
    active: AtomicU64,
    /// It speaks HTTP/2, where bytes come between requests too: answers to our pings among them.
    http2: AtomicBool,
    /// The last answer may have come before its request was read to the end.
    cut_short: AtomicBool,
}

/// What to do with a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    /// No request for long: it is told to close.
    Idle,
    /// A request's head does not get finished.
    Stalled,
}

/// Looks at a connection now and then.
pub struct Watch {
    activity: Arc<Activity>,
    idle_timeout: Duration,
    every: Duration,
    last_requests: u64,
    idle: Duration,
    in_head: bool,
}

impl Watch {
    pub fn new(activity: Arc<Activity>, header_timeout: Duration, idle_timeout: Duration) -> Self {
        let every = (header_timeout / 2).max(Duration::from_millis(10));
        Self { activity, idle_timeout, every, last_requests: 0, idle: Duration::ZERO, in_head: false }
    }

    /// Waits until there is something to be done.
    pub async fn verdict(&mut self) -> Verdict {
        loop {
            tokio::time::sleep(self.every).await;
            let verdict = self.look();
            if verdict != Verdict::Keep {
                return verdict;
            }
        }
    }

    fn look(&mut self) -> Verdict {
        let activity = &self.activity;
        let requests = activity.requests.load(Relaxed);
        let busy = activity.active.load(Relaxed) > 0 || requests != self.last_requests;
        let in_head = !busy
            && !activity.http2.load(Relaxed)
            && activity.bytes_read.load(Relaxed) > activity.bytes_settled.load(Relaxed);
        let stalled = in_head && self.in_head;
        self.idle = if busy || in_head { Duration::ZERO } else { self.idle + self.every };
        (self.in_head, self.last_requests) = (in_head, requests);
        match () {
            () if stalled => Verdict::Stalled,
            () if self.idle >= self.idle_timeout => Verdict::Idle,
            () => Verdict::Keep,
        }
    }
}

/// Counts what is read.
pub struct Metered {
    stream: TcpStream,
    activity: Arc<Activity>,
    linger: Linger,
    /// How much of HTTP/2's preface was read, while that is all that was read.
    preface: Option<usize>,
}

/// What every HTTP/2 connection begins with, and no HTTP/1 request.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Metered {
    pub fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity, linger: Linger::default(), preface: Some(0) }
    }
}

/// How much of the preface there is after these bytes, and `None` when it is something else.
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

/// The router of one connection, counting requests.
#[derive(Clone)]
pub struct Counted {
    pub router: Router,
    pub activity: Arc<Activity>,
}

type Answer = Result<Response<Body>, Infallible>;

impl hyper::service::Service<Request<Incoming>> for Counted {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Map<RouteFuture<Infallible>, Box<dyn FnOnce(Answer) -> Answer + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let running = Running::start(&self.activity);
        let settle = move |answer: Answer| {
            answer.map(|response| {
                running.0.cut_short.store(is_cut_short(response.status()), Relaxed);
                match response.body().size_hint().exact() {
                    Some(_) => response,
                    None => response.map(|body| Body::new(Streaming { body, _running: running })),
                }
            })
        };
        self.router.clone().call(request.map(Body::new)).map(Box::new(settle))
    }
}

/// Whether such an answer may come before its request was read to the end.
fn is_cut_short(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 405 | 408 | 413 | 415)
}

/// A request that is not answered yet.
struct Running(Arc<Activity>);

impl Running {
    fn start(activity: &Arc<Activity>) -> Self {
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

/// A streamed answer: the request runs until its end.
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

    fn watch() -> Watch {
        Watch::new(Arc::default(), Duration::from_secs(10), Duration::from_secs(20))
    }

    #[test]
    fn a_head_that_is_not_finished_is_a_stall_at_the_second_look() {
        let mut watch = watch();
        watch.activity.bytes_read.store(5, Relaxed);
        assert_eq!(watch.look(), Verdict::Keep);
        assert_eq!(watch.look(), Verdict::Stalled);
    }

    #[test]
    fn a_request_that_runs_for_long_is_kept() {
        let mut watch = watch();
        watch.activity.bytes_read.store(5, Relaxed);
        let running = Running::start(&watch.activity);
        assert!((0..100).all(|_| watch.look() == Verdict::Keep));
        drop(running);
        assert_eq!(watch.look(), Verdict::Keep);
    }

    #[test]
    fn what_comes_between_requests_on_http2_is_no_head_but_does_not_keep_it_either() {
        let mut watch = watch();
        watch.activity.http2.store(true, Relaxed);
        watch.activity.bytes_read.store(60, Relaxed);
        let looks: Vec<Verdict> = (0..4).map(|_| watch.look()).collect();
        assert_eq!(looks, [Verdict::Keep, Verdict::Keep, Verdict::Keep, Verdict::Idle]);
    }

    #[test]
    fn the_preface_is_known_in_whatever_pieces_it_comes() {
        assert_eq!(preface_seen(0, PREFACE), Some(PREFACE.len()));
        assert_eq!(preface_seen(0, b"PRI * HT").and_then(|seen| preface_seen(seen, b"TP/2.0\r\n")), Some(16));
        assert_eq!(preface_seen(PREFACE.len(), b"more"), Some(PREFACE.len()));
        for other in [&b"POST /push"[..], b"PRI * HTTP/1.1"] {
            assert_eq!(preface_seen(0, other), None);
        }
    }

    #[test]
    fn a_connection_without_requests_is_idle_after_its_time() {
        let mut watch = watch();
        let looks: Vec<Verdict> = (0..4).map(|_| watch.look()).collect();
        assert_eq!(looks, [Verdict::Keep, Verdict::Keep, Verdict::Keep, Verdict::Idle]);
    }
}
