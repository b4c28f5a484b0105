//! The load generator of `bench/run messages`: receivers with WebSockets, and writers, on one thread.
//!
//! Usage: `sockets CONTROL SERVER COUNT [first=N] [peer=TOPIC]`
//!
//! Connection `i` of COUNT is receiver `r-F` with F = first + i. Its loopback address depends on F, so that ports do
//! not run out. SERVER is the product, or, with `peer`, a Centrifugo that consumes TOPIC. The HTTP server at the
//! address CONTROL responds with JSON:
//!
//! - `GET /connect?rate=N` opens all connections at that rate.
//! - `GET /send?to=HOST:PORT&seconds=S&rate=N` posts messages, evenly spaced, to one receiver after the other in a
//!   scattered order. It returns the latencies from the time at which each message was due to its frame.
//! - `GET /send?to=HOST:PORT&seconds=S&window=N` posts as many messages as possible, with N in flight.
//! - `GET /stats` returns the number of connections.
//!
//! Every message must arrive once, at its receiver and at no other. The generator counts violations.

#[path = "sockets/frames.rs"]
mod frames;
mod histogram;
#[path = "sockets/send.rs"]
mod send;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    env,
    error::Error,
    io,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use frames::Frames;
use histogram::Histogram;
use send::Run;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::LocalSet,
};

/// The size of the read buffer, which all connections share.
const READ_BYTES: usize = 64 << 10;

struct Plan {
    control: SocketAddr,
    server: SocketAddr,
    count: u64,
    first: u64,
    /// The topic that the peer consumes; `None` for the product.
    peer: Option<String>,
}

fn plan() -> Result<Plan, Box<dyn Error>> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [control, server, count, more @ ..] = &words[..] else {
        return Err("usage: sockets CONTROL SERVER COUNT [first=N] [peer=TOPIC]".into());
    };
    let (control, server, count) = (control.parse()?, server.parse()?, count.parse()?);
    let mut plan = Plan { control, server, count, first: 0, peer: None };
    for word in more {
        match word.split_once('=') {
            Some(("first", first)) => plan.first = first.parse()?,
            Some(("peer", topic)) => plan.peer = Some(topic.to_owned()),
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    Ok(plan)
}

/// Counts since the start.
#[derive(Default)]
struct Stats {
    connected: u64,
    refused: u64,
    /// Connections that ended after they were open.
    ended: u64,
    pings: u64,
    first_refusal: String,
}

pub struct Shared {
    plan: Plan,
    stats: RefCell<Stats>,
    handshakes: RefCell<Histogram>,
    run: RefCell<Option<Rc<Run>>>,
    runs: Cell<u64>,
    buffer: RefCell<Vec<u8>>,
}

pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Shared {
    /// Opens one connection.
    async fn open(&self, receiver: u64) -> io::Result<(TcpStream, Vec<u8>)> {
        let socket = TcpSocket::new_v4()?;
        // One address has too few ports, so receivers are spread over several addresses.
        let from = Ipv4Addr::new(127, 1, (receiver / 1_000 % 250) as u8, 1 + (receiver % 4) as u8);
        socket.bind(SocketAddr::from((from, 0)))?;
        let mut stream = socket.connect(self.plan.server).await?;
        stream.set_nodelay(true)?;
        let path = match self.plan.peer {
            Some(_) => "/connection/websocket".to_owned(),
            None => format!("/api/v1/websocket/message?receiverId=r-{receiver}"),
        };
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            self.plan.server
        );
        stream.write_all(request.as_bytes()).await?;
        let rest = after_head(&mut stream, b"HTTP/1.1 101").await?;
        if self.plan.peer.is_some() {
            let subscribe = format!(
                "{{\"id\":1,\"connect\":{{}}}}\n{{\"id\":2,\"subscribe\":{{\"channel\":\"to:r-{receiver}\"}}}}"
            );
            stream.write_all(&frames::masked(frames::TEXT, subscribe.as_bytes())).await?;
        }
        Ok((stream, rest))
    }

    /// Runs one receiver, from its handshake to the end of its connection.
    async fn follow(self: Rc<Self>, receiver: u64) {
        let begun = Instant::now();
        let opened = tokio::time::timeout(Duration::from_secs(30), self.open(receiver)).await;
        let opened = opened.unwrap_or_else(|_| Err(io::Error::other("no handshake within 30 s")));
        let (stream, rest) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let mut stats = self.stats.borrow_mut();
                stats.refused += 1;
                if stats.first_refusal.is_empty() {
                    stats.first_refusal = error.to_string();
                }
                return;
            }
        };
        if self.plan.peer.is_none() {
            self.connected(begun);
        }
        if let Err(error) = self.read(&stream, rest, receiver, begun).await {
            eprintln!("receiver {receiver}: {error}");
        }
        self.stats.borrow_mut().ended += 1;
    }

    fn connected(&self, begun: Instant) {
        self.stats.borrow_mut().connected += 1;
        self.handshakes.borrow_mut().add(begun.elapsed().as_micros() as u64);
    }

    async fn read(&self, stream: &TcpStream, mut kept: Vec<u8>, receiver: u64, begun: Instant) -> io::Result<()> {
        let name = format!("r-{receiver}");
        loop {
            if kept.is_empty() {
                // An idle connection keeps no buffer.
                kept = Vec::new();
            }
            stream.readable().await?;
            let mut buffer = self.buffer.borrow_mut();
            let read = match stream.try_read(&mut buffer) {
                Ok(0) => return Err(io::Error::other("ended by the server")),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let fresh = &buffer[..read];
            let whole: &[u8] = if kept.is_empty() {
                fresh
            } else {
                kept.extend_from_slice(fresh);
                &kept
            };
            let mut frames = Frames::new(whole);
            for (opcode, payload) in &mut frames {
                match opcode {
                    frames::TEXT if payload == b"{}" => self.answer(stream, frames::TEXT, payload)?,
                    frames::TEXT => self.hear(payload, &name, begun)?,
                    frames::PING => self.answer(stream, frames::PONG, payload)?,
                    frames::CLOSE => {
                        return Err(io::Error::other(format!("closed: {}", String::from_utf8_lossy(payload))));
                    }
                    _ => {}
                }
            }
            let rest = frames.rest().to_vec();
            kept = rest;
        }
    }

    /// Handles a text frame: one message, or, from the peer, replies and pushes, one per line.
    fn hear(&self, payload: &[u8], name: &str, begun: Instant) -> io::Result<()> {
        for line in payload.split(|&byte| byte == b'\n') {
            if line.starts_with(b"{\"id\":2,\"subscribe\"") {
                self.connected(begun);
            } else if line.starts_with(b"{\"id\":1,\"connect\"") {
            } else if self.plan.peer.is_some() && line.starts_with(b"{\"id\":") {
                return Err(io::Error::other(String::from_utf8_lossy(line)));
            } else if let Some(run) = &*self.run.borrow() {
                run.arrive(line, name);
            }
        }
        Ok(())
    }

    fn answer(&self, stream: &TcpStream, opcode: u8, payload: &[u8]) -> io::Result<()> {
        self.stats.borrow_mut().pings += 1;
        // The frame fits into an empty send buffer.
        stream.try_write(&frames::masked(opcode, payload)).map(|_| ())
    }

    async fn connect_all(self: &Rc<Self>, rate: f64) -> Value {
        let begun = tokio::time::Instant::now();
        for number in 0..self.plan.count {
            let due = begun + Duration::from_secs_f64(number as f64 / rate);
            // Timers have a resolution of 1 ms, so connections that are due in the same one open together.
            if due > tokio::time::Instant::now() {
                tokio::time::sleep_until(due).await;
            }
            tokio::task::spawn_local(self.clone().follow(self.plan.first + number));
        }
        let settled = |stats: &Stats| stats.connected + stats.refused >= self.plan.count;
        while !settled(&self.stats.borrow()) && begun.elapsed() < Duration::from_secs(120) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut told = self.tell();
        let (seconds, handshakes) = (begun.elapsed().as_secs_f64(), self.handshakes.borrow());
        told["seconds"] = json!(seconds);
        told["per_second"] = json!((self.stats.borrow().connected as f64 / seconds).round());
        told["handshake_p50_ms"] = json!(handshakes.quantile(0.5) as f64 / 1e3);
        told["handshake_p99_ms"] = json!(handshakes.quantile(0.99) as f64 / 1e3);
        told
    }

    fn tell(&self) -> Value {
        let Stats { connected, refused, ended, pings, first_refusal } = &*self.stats.borrow();
        json!({ "connected": connected, "refused": refused, "ended": ended, "pings": pings, "first_refusal": first_refusal })
    }

    async fn answer_control(self: &Rc<Self>, target: &str) -> Result<Value, Box<dyn Error>> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let options: HashMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let number = |name: &str| options.get(name).map(|digits| digits.parse::<f64>()).transpose();
        match path {
            "/stats" => Ok(self.tell()),
            "/connect" => Ok(self.connect_all(number("rate")?.ok_or("rate=N is missing")?).await),
            "/send" => {
                let to = options.get("to").ok_or("to=HOST:PORT is missing")?.parse()?;
                let seconds = Duration::from_secs_f64(number("seconds")?.ok_or("seconds=N is missing")?);
                let load = match (number("rate")?, number("window")?) {
                    (Some(rate), None) => send::Load::Rate(rate),
                    (None, Some(window)) => send::Load::Window(window as usize),
                    _ => return Err("either rate=N or window=N is required".into()),
                };
                self.runs.set(self.runs.get() + 1);
                let Plan { count, first, peer, .. } = &self.plan;
                let target = send::Target { to, peer: peer.clone(), receivers: *count, first: *first };
                let run = Rc::new(Run::new(self.runs.get(), target));
                *self.run.borrow_mut() = Some(run.clone());
                run.go(load, seconds).await.map_err(Into::into)
            }
            _ => Err("no such path".into()),
        }
    }
}

/// Reads a response's head, and returns the bytes after it.
async fn after_head(stream: &mut TcpStream, wanted: &[u8]) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    loop {
        if stream.read_buf(&mut head).await? == 0 {
            return Err(io::Error::other(format!("answered {}", String::from_utf8_lossy(&head))));
        }
        if let Some(end) = head.windows(4).position(|part| part == b"\r\n\r\n") {
            if !head.starts_with(wanted) {
                return Err(io::Error::other(format!("answered {}", String::from_utf8_lossy(&head))));
            }
            return Ok(head.split_off(end + 4));
        }
    }
}

async fn control(shared: Rc<Shared>, mut stream: TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|part| part == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let target = head.split(' ').nth(1).unwrap_or_default();
    let (status, body) = match shared.answer_control(target).await {
        Ok(value) => ("200 OK", value.to_string()),
        Err(error) => ("400 Bad Request", error.to_string()),
    };
    let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let plan = plan()?;
    let listener = TcpListener::bind(plan.control).await?;
    let shared = Rc::new(Shared {
        plan,
        stats: RefCell::default(),
        handshakes: RefCell::default(),
        run: RefCell::default(),
        runs: Cell::new(0),
        buffer: RefCell::new(vec![0; READ_BYTES]),
    });
    let accept = async move {
        loop {
            let (stream, _) = listener.accept().await?;
            let connection = control(shared.clone(), stream);
            tokio::task::spawn_local(async move {
                if let Err(error) = connection.await {
                    eprintln!("control: {error}");
                }
            });
        }
    };
    let result: io::Result<()> = LocalSet::new().run_until(accept).await;
    Ok(result?)
}
