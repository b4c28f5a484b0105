//! Activity of a connection: counters that its stream and its requests update, and that the watch
//! reads.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use postrider_process::drain::Draining;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_openssl::SslStream;
use tokio_util::either::Either;

use super::linger::Linger;

/// Clients of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    Callers,
    /// Operators of the process. Their answers do not draw from the memory budgets, because they
    /// report when those are used up.
    Operators,
}

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
    pub(super) cut_short: AtomicBool,
    /// Pieces of answers that the HTTP/2 library has not sent yet: number → time of hand-over.
    unsent: Mutex<BTreeMap<u64, Instant>>,
    pub(super) draining: Draining,
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
        self.unsent.lock()
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

/// Bytes of a connection, as its client sent them or decrypted.
pub type Wire = Either<TcpStream, Box<SslStream<TcpStream>>>;

fn socket(wire: &mut Wire) -> &mut TcpStream {
    match wire {
        Wire::Left(stream) => stream,
        Wire::Right(stream) => stream.get_mut(),
    }
}

/// Stream of a connection that counts the bytes read.
pub struct Metered {
    stream: Wire,
    activity: Arc<Activity>,
    linger: Linger,
    /// Bytes of HTTP/2's preface read so far; `None` if the connection began with something else.
    preface: Option<usize>,
}

/// First bytes of every HTTP/2 connection; no HTTP/1 request begins with them.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Metered {
    pub fn new(stream: Wire, activity: Arc<Activity>) -> Self {
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
        linger.poll(socket(stream), activity.cut_short.load(Relaxed), cx).map(Ok)
    }
}

/// A request that is not answered yet.
pub(super) struct Running(pub(super) Arc<Activity>);

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
