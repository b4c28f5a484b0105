//! An HTTP target on 127.0.0.1 whose behavior a test controls, down to the bytes.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::wait::until_now;

/// The reaction to one request.
#[derive(Debug, Clone)]
pub enum Act {
    /// Answers with this status, these additional header lines and this body.
    Answer(u16, &'static str, &'static str),
    /// Answers with this status after a wait.
    After(Duration, u16),
    /// Never answers, and keeps the connection open.
    Hang,
    /// Resets the connection.
    Reset,
    /// Sends these bytes and closes the connection.
    Bytes(&'static [u8]),
    /// Sends a head with this status, and then an endless body, byte by byte with pauses.
    Trickle(u16),
    /// Sends a head with this status, and a body of this many bytes as fast as the client reads.
    Flood(u16, u64),
}

impl Act {
    pub const OK: Act = Act::Answer(200, "", "");

    pub fn status(status: u16) -> Act {
        Act::Answer(status, "", "")
    }
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Seen {
    pub at: Instant,
    pub head: String,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

type Decide = dyn Fn(&Seen) -> Act + Send + Sync;

struct Inner {
    script: Mutex<VecDeque<Act>>,
    decide: Mutex<Arc<Decide>>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    /// Bytes of `Flood` bodies that were sent.
    flooded: AtomicUsize,
}

/// A running target, which stops on drop.
pub struct Target {
    pub address: SocketAddr,
    scheme: &'static str,
    inner: Arc<Inner>,
    server: JoinHandle<()>,
}

impl Target {
    /// Starts a target that answers 200 by default.
    pub async fn start() -> Self {
        Self::build(None).await
    }

    /// Like [`Target::start`], with TLS.
    pub async fn with_tls(identity: native_tls::Identity) -> Self {
        let acceptor = native_tls::TlsAcceptor::new(identity).unwrap();
        Self::build(Some(acceptor.into())).await
    }

    async fn build(tls: Option<tokio_native_tls::TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            script: Mutex::default(),
            decide: Mutex::new(Arc::new(|_| Act::OK)),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            flooded: AtomicUsize::new(0),
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        let server = tokio::spawn(accept(listener, tls, inner.clone()));
        Self { address, scheme, inner, server }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}://127.0.0.1:{}{path}", self.scheme, self.address.port())
    }

    /// Handles the next requests with these acts, in this order. Later requests follow the rule of
    /// [`Target::decide`].
    pub fn script(&self, acts: impl IntoIterator<Item = Act>) {
        self.inner.script.lock().unwrap().extend(acts);
    }

    /// Handles requests by this rule from now on.
    pub fn decide(&self, rule: impl Fn(&Seen) -> Act + Send + Sync + 'static) {
        *self.inner.decide.lock().unwrap() = Arc::new(rule);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.inner.seen.lock().unwrap().len()
    }

    /// Returns the requests, once there are this many.
    pub async fn await_seen(&self, count: usize, within: Duration) -> Vec<Seen> {
        until_now(&format!("the target has {count} requests"), within, || {
            Some(self.seen()).filter(|seen| seen.len() >= count)
        })
        .await
    }

    pub fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::Relaxed)
    }

    pub fn flooded(&self) -> usize {
        self.inner.flooded.load(Ordering::Relaxed)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(listener: TcpListener, tls: Option<tokio_native_tls::TlsAcceptor>, inner: Arc<Inner>) {
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        inner.connections.fetch_add(1, Ordering::Relaxed);
        let (inner, tls) = (inner.clone(), tls.clone());
        tasks.spawn(async move {
            match tls {
                None => {
                    // A reset needs the raw socket.
                    if let Some(stream) = talk(stream, &inner).await {
                        reset(&stream);
                    }
                }
                Some(acceptor) => {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        talk(stream, &inner).await;
                    }
                }
            }
        });
    }
}

/// Discards unsent data on close, which makes the kernel send a reset.
fn reset(stream: &TcpStream) {
    stream.set_zero_linger().unwrap();
}

/// Answers requests until the connection ends. Returns the stream if it is to be reset.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, inner: &Inner) -> Option<S> {
    let mut ahead = Vec::new();
    while let Some(seen) = read_request(&mut stream, &mut ahead).await {
        let scripted = inner.script.lock().unwrap().pop_front();
        let rule = inner.decide.lock().unwrap().clone();
        let act = scripted.unwrap_or_else(|| rule(&seen));
        inner.seen.lock().unwrap().push(seen);
        match act {
            Act::Answer(status, head, body) => {
                let length = body.len();
                let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{head}\r\n{body}");
                stream.write_all(answer.as_bytes()).await.ok()?;
            }
            Act::After(wait, status) => {
                tokio::time::sleep(wait).await;
                let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.ok()?;
            }
            Act::Hang => std::future::pending().await,
            Act::Reset => return Some(stream),
            Act::Bytes(bytes) => {
                stream.write_all(bytes).await.ok()?;
                stream.shutdown().await.ok()?;
                return None;
            }
            Act::Trickle(status) => {
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: 1000000\r\n\r\n");
                stream.write_all(head.as_bytes()).await.ok()?;
                loop {
                    stream.write_all(b"x").await.ok()?;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            Act::Flood(status, bytes) => {
                let head = format!("HTTP/1.1 {status} X\r\ntransfer-encoding: chunked\r\n\r\n");
                stream.write_all(head.as_bytes()).await.ok()?;
                let chunk = [b"2000\r\n".as_slice(), &[b'x'; 0x2000], b"\r\n"].concat();
                for _ in 0..bytes / 0x2000 {
                    stream.write_all(&chunk).await.ok()?;
                    inner.flooded.fetch_add(0x2000, Ordering::Relaxed);
                }
                stream.write_all(b"0\r\n\r\n").await.ok()?;
            }
        }
    }
    None
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin), ahead: &mut Vec<u8>) -> Option<Seen> {
    let end = loop {
        if let Some(at) = ahead.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(ahead).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(ahead[..end].to_vec()).unwrap();
    let mut seen = Seen { at: Instant::now(), head, body: Vec::new() };
    let length: usize = seen.header("content-length").unwrap_or("0").parse().unwrap();
    while ahead.len() < end + length {
        if stream.read_buf(ahead).await.ok()? == 0 {
            return None;
        }
    }
    seen.body = ahead[end..end + length].to_vec();
    seen.at = Instant::now();
    ahead.drain(..end + length);
    Some(seen)
}
