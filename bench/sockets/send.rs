//! Posts messages over HTTP and measures the time until their frames arrive.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Mutex, Semaphore, mpsc},
    task::JoinSet,
};

use crate::{histogram::Histogram, now_us};

/// The number of connections that post.
const WRITERS: usize = 256;
/// A message's number times this gives its receiver, so successive messages go to distant receivers.
const STRIDE: u64 = 7919;
/// Time limit for messages that have not arrived when the last one was posted.
const PATIENCE: Duration = Duration::from_secs(10);
/// The size of each message's text.
const TEXT_BYTES: usize = 100;

pub enum Load {
    /// Messages per second.
    Rate(f64),
    /// The number of messages in flight.
    Window(usize),
}

pub struct Target {
    pub to: SocketAddr,
    pub peer: Option<String>,
    pub receivers: u64,
    pub first: u64,
}

/// One run of messages.
pub struct Run {
    number: u64,
    target: Target,
    /// For each message, whether it has arrived.
    come: RefCell<Vec<bool>>,
    latency: RefCell<Histogram>,
    posting: RefCell<Histogram>,
    delivered: Cell<u64>,
    twice: Cell<u64>,
    /// Messages that arrived at another receiver.
    foreign: Cell<u64>,
    posted: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<String>,
    window: Semaphore,
    windowed: Cell<bool>,
}

impl Run {
    pub fn new(number: u64, target: Target) -> Self {
        Self {
            number,
            target,
            come: RefCell::default(),
            latency: RefCell::default(),
            posting: RefCell::default(),
            delivered: Cell::new(0),
            twice: Cell::new(0),
            foreign: Cell::new(0),
            posted: Cell::new(0),
            errors: Cell::new(0),
            first_error: RefCell::default(),
            window: Semaphore::new(0),
            windowed: Cell::new(false),
        }
    }

    /// Counts a message that arrived at the receiver of this name.
    pub fn arrive(&self, line: &[u8], name: &str) {
        let Some((run, number, due)) = stamp(line) else { return };
        if run != self.number {
            return;
        }
        if field(line, b"\"receiverId\":\"") != Some(name.as_bytes()) {
            return self.foreign.set(self.foreign.get() + 1);
        }
        let before = self.come.borrow_mut().get_mut(number as usize).map(|come| std::mem::replace(come, true));
        if before != Some(false) {
            return self.twice.set(self.twice.get() + 1);
        }
        self.delivered.set(self.delivered.get() + 1);
        self.latency.borrow_mut().add(now_us().saturating_sub(due));
        if self.windowed.get() {
            self.window.add_permits(1);
        }
    }

    /// Posts for the duration, waits for the frames, and returns the figures.
    pub async fn go(self: Rc<Self>, load: Load, duration: Duration) -> io::Result<Value> {
        let mut writers = JoinSet::new();
        let begun = Instant::now();
        match load {
            Load::Rate(rate) => {
                let due = pace(rate, duration);
                for _ in 0..WRITERS {
                    let (run, due, mut writer) = (self.clone(), due.clone(), Writer::open(&self.target).await?);
                    writers.spawn_local(async move {
                        loop {
                            let Some((number, at)) = due.lock().await.recv().await else { break };
                            run.post(&mut writer, number, at).await;
                        }
                    });
                }
            }
            Load::Window(window) => {
                self.windowed.set(true);
                self.window.add_permits(window);
                let next = Rc::new(Cell::new(0));
                for _ in 0..WRITERS {
                    let (run, next, mut writer) = (self.clone(), next.clone(), Writer::open(&self.target).await?);
                    writers.spawn_local(async move {
                        while let Some(left) = duration.checked_sub(begun.elapsed()) {
                            let Ok(Ok(permit)) = tokio::time::timeout(left, run.window.acquire()).await else { break };
                            permit.forget();
                            let number = next.replace(next.get() + 1);
                            run.post(&mut writer, number, now_us()).await;
                        }
                    });
                }
            }
        }
        // The rate counts only messages that arrive during posting; a backlog that drains later would raise it.
        tokio::time::sleep(duration.saturating_sub(begun.elapsed())).await;
        let (delivered_in_time, seconds) = (self.delivered.get(), begun.elapsed().as_secs_f64());
        while writers.join_next().await.is_some() {}
        let until = Instant::now() + PATIENCE;
        while self.delivered.get() < self.posted.get() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(self.tell(delivered_in_time, seconds))
    }

    async fn post(&self, writer: &mut Writer, number: u64, due: u64) {
        {
            let mut come = self.come.borrow_mut();
            if come.len() <= number as usize {
                come.resize(number as usize + 1, false);
            }
        }
        let receiver = self.target.first + number * STRIDE % self.target.receivers;
        let mut text = format!("{}.{number}.{due}.", self.number);
        text.extend(std::iter::repeat_with(fastrand::alphanumeric).take(TEXT_BYTES.saturating_sub(text.len())));
        match writer.post(receiver, &text).await {
            Ok(()) => {
                self.posted.set(self.posted.get() + 1);
                self.posting.borrow_mut().add(now_us().saturating_sub(due));
            }
            Err(error) => {
                self.errors.set(self.errors.get() + 1);
                let mut first = self.first_error.borrow_mut();
                if first.is_empty() {
                    *first = error.to_string();
                }
            }
        }
    }

    fn tell(&self, delivered_in_time: u64, seconds: f64) -> Value {
        let (latency, posting) = (self.latency.borrow(), self.posting.borrow());
        let ms = |histogram: &Histogram, quantile| histogram.quantile(quantile) as f64 / 1e3;
        json!({
            "posted": self.posted.get(), "errors": self.errors.get(), "first_error": *self.first_error.borrow(),
            "delivered": self.delivered.get(), "lost": self.posted.get().saturating_sub(self.delivered.get()),
            "twice": self.twice.get(), "foreign": self.foreign.get(), "seconds": seconds,
            "rps": (delivered_in_time as f64 / seconds).round(),
            "p50_ms": ms(&latency, 0.5), "p90_ms": ms(&latency, 0.9), "p99_ms": ms(&latency, 0.99),
            "p99.9_ms": ms(&latency, 0.999), "max_ms": ms(&latency, 1.0),
            "posting_p50_ms": ms(&posting, 0.5), "posting_p99_ms": ms(&posting, 0.99),
        })
    }
}

type Due = Rc<Mutex<mpsc::UnboundedReceiver<(u64, u64)>>>;

/// Sends the number and time of each message when it is due, from a thread, because a thread sleeps more precisely than
/// the runtime's timers.
fn pace(rate: f64, duration: Duration) -> Due {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (begun, begun_us) = (Instant::now(), now_us());
    std::thread::spawn(move || {
        for number in 0..(rate * duration.as_secs_f64()) as u64 {
            let after = Duration::from_secs_f64(number as f64 / rate);
            std::thread::sleep(after.saturating_sub(begun.elapsed()));
            if sender.send((number, begun_us + after.as_micros() as u64)).is_err() {
                return;
            }
        }
    });
    Rc::new(Mutex::new(receiver))
}

/// A connection that posts one message at a time.
struct Writer {
    stream: TcpStream,
    host: SocketAddr,
    peer: Option<String>,
    buffer: Vec<u8>,
}

impl Writer {
    async fn open(target: &Target) -> io::Result<Self> {
        let stream = TcpStream::connect(target.to).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, host: target.to, peer: target.peer.clone(), buffer: Vec::with_capacity(1024) })
    }

    async fn post(&mut self, receiver: u64, text: &str) -> io::Result<()> {
        let message =
            format!(r#"{{"chatId":"c-{receiver}","senderId":"s-1","receiverId":"r-{receiver}","content":"{text}"}}"#);
        let (path, body) = match &self.peer {
            None => ("/api/v1/message/action", message),
            // The peer reads the record's value as a command. It goes through the same HTTP server and Kafka.
            Some(topic) => (
                "/produce",
                format!(
                    r#"{{"topic":"{topic}","key":"r-{receiver}","payload":{{"method":"publish","payload":{{"channel":"to:r-{receiver}","data":{message}}}}}}}"#
                ),
            ),
        };
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::Error::other("the connection ended"));
            }
            if whole_answer(&self.buffer) {
                break;
            }
        }
        if self.buffer.starts_with(b"HTTP/1.1 2") {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(&self.buffer)))
    }
}

fn whole_answer(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|part| part == b"\r\n\r\n") else { return false };
    let length = after(&bytes[..end], b"content-length: ").and_then(digits).unwrap_or(0);
    bytes.len() >= end + 4 + length as usize
}

fn after<'a>(text: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let start = text.windows(name.len()).position(|part| part == name)?;
    Some(&text[start + name.len()..])
}

fn digits(text: &[u8]) -> Option<u64> {
    let length = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    std::str::from_utf8(&text[..length]).ok()?.parse().ok()
}

fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    after(line, name)?.split(|&byte| byte == b'"').next()
}

/// Parses run, number and due time from a message's text.
fn stamp(line: &[u8]) -> Option<(u64, u64, u64)> {
    let mut parts = field(line, b"\"content\":\"")?.split(|&byte| byte == b'.');
    Some((digits(parts.next()?)?, digits(parts.next()?)?, digits(parts.next()?)?))
}
