//! The target of the relay: a minimal HTTP server on one thread, so that the relay is the limit.
//!
//! Usage: `target ADDRESS [delay_us=N] [hang=KEY]`
//!
//! - Every POST gets 200, at once or after the delay. Requests for the key of `hang` are never answered.
//! - The first letter of the path names the member that delivers.
//! - The target parses every envelope. It checks that the offsets of a key rise, and measures the time since `at` in
//!   the value (microseconds since the epoch).
//! - `GET /stats` returns the figures as JSON. `POST /!reset` clears them, except for the offsets of keys.

mod histogram;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    env,
    error::Error,
    io,
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use histogram::Histogram;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok";

#[derive(Default)]
struct Plan {
    delay: Duration,
    hang: Option<Vec<u8>>,
}

/// Deliveries of one partition.
#[derive(Default)]
struct Arrivals {
    last_us: u64,
    longest_gap_us: u64,
    by_member: BTreeMap<char, u64>,
}

#[derive(Default)]
struct Seen {
    /// For each key, the highest offset, and whether its request is still unanswered.
    keys: HashMap<Box<[u8]>, (i64, bool)>,
    /// Records that arrived for the first time and in the order of their key.
    fresh: u64,
    window: Window,
}

/// The figures that a reset clears.
#[derive(Default)]
struct Window {
    count: u64,
    /// Records whose offset does not rise: redeliveries, or records out of order.
    again: u64,
    overlapping: u64,
    hung: u64,
    first_us: u64,
    last_us: u64,
    latency: Histogram,
    busy_us: u64,
    answered: u64,
    partitions: BTreeMap<i64, Arrivals>,
}

impl Seen {
    fn arrive(&mut self, member: char, key: &[u8], partition: i64, offset: i64, at: Option<i64>) {
        let now = now_us();
        let window = &mut self.window;
        window.count += 1;
        window.last_us = now;
        if window.first_us == 0 {
            window.first_us = now;
        }
        if let Some(at) = at {
            window.latency.add(now.saturating_sub(at.unsigned_abs()));
        }
        let arrivals = window.partitions.entry(partition).or_default();
        if arrivals.last_us != 0 {
            arrivals.longest_gap_us = arrivals.longest_gap_us.max(now - arrivals.last_us);
        }
        arrivals.last_us = now;
        *arrivals.by_member.entry(member).or_default() += 1;
        let Some((highest, unanswered)) = self.keys.get_mut(key) else {
            self.fresh += 1;
            self.keys.insert(key.into(), (offset, true));
            return;
        };
        window.overlapping += u64::from(*unanswered);
        if offset > *highest {
            self.fresh += 1;
        } else {
            window.again += 1;
        }
        (*highest, *unanswered) = (offset.max(*highest), true);
    }

    fn answered(&mut self, key: &[u8], took: Duration) {
        self.window.answered += 1;
        self.window.busy_us += took.as_micros() as u64;
        if let Some((_, unanswered)) = self.keys.get_mut(key) {
            *unanswered = false;
        }
    }

    fn stats(&self) -> Value {
        let (window, now) = (&self.window, now_us());
        let partitions: Vec<Value> = window
            .partitions
            .iter()
            .map(|(partition, arrivals)| {
                let gap = arrivals.longest_gap_us.max(now.saturating_sub(arrivals.last_us));
                json!({ "partition": partition, "longest_gap_ms": arrivals.longest_gap_us as f64 / 1e3,
                    "longest_gap_ms_until_now": gap as f64 / 1e3, "by_member": arrivals.by_member })
            })
            .collect();
        let ms = |quantile| window.latency.quantile(quantile) as f64 / 1e3;
        json!({
            "fresh": self.fresh, "count": window.count, "again": window.again, "overlapping": window.overlapping,
            "hung": window.hung, "first_us": window.first_us, "last_us": window.last_us, "now_us": now,
            "p50_ms": ms(0.5), "p90_ms": ms(0.9), "p99_ms": ms(0.99), "p99.9_ms": ms(0.999), "max_ms": ms(1.0),
            "answer_ms": window.busy_us as f64 / 1e3 / window.answered.max(1) as f64, "partitions": partitions,
        })
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Parses the number after a field's name, if there is one.
fn number(text: &[u8], name: &[u8]) -> Option<i64> {
    let digits = after(text, name)?;
    let length = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    std::str::from_utf8(&digits[..length]).ok()?.parse().ok()
}

fn after<'a>(text: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let start = text.windows(name.len()).position(|part| part == name)?;
    Some(&text[start + name.len()..])
}

/// Reads until one request is complete; returns the length of its head and of the whole request, `None` at the end.
async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<(usize, usize)>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|part| part == b"\r\n\r\n") {
            let length = number(&buffer[..end], b"content-length: ").unwrap_or(0) as usize;
            if buffer.len() >= end + 4 + length {
                return Ok(Some((end + 4, end + 4 + length)));
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

async fn serve(mut stream: TcpStream, plan: Rc<Plan>, seen: Rc<RefCell<Seen>>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    while let Some((head, whole)) = request(&mut stream, &mut buffer).await? {
        let begun = Instant::now();
        let (path, body) = (&buffer[..head], &buffer[head..whole]);
        if path.starts_with(b"GET ") {
            let stats = seen.borrow().stats().to_string();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{stats}", stats.len());
            stream.write_all(answer.as_bytes()).await?;
        } else if path.starts_with(b"POST /!reset") {
            seen.borrow_mut().window = Window::default();
            stream.write_all(ANSWER).await?;
        } else {
            let key = after(body, b"\"key\":\"").unwrap_or_default();
            let key = key.split(|&byte| byte == b'"').next().unwrap_or_default();
            if plan.hang.as_deref() == Some(key) {
                seen.borrow_mut().window.hung += 1;
                return std::future::pending().await;
            }
            let place = number(body, b"\"partition\":").zip(number(body, b"\"offset\":"));
            let (partition, offset) = place.ok_or_else(|| io::Error::other("not an envelope"))?;
            let member = path.get(6).map_or('/', |&letter| char::from(letter));
            seen.borrow_mut().arrive(member, key, partition, offset, number(body, b"\"at\":"));
            if !plan.delay.is_zero() {
                tokio::time::sleep(plan.delay).await;
            }
            seen.borrow_mut().answered(key, begun.elapsed());
            stream.write_all(ANSWER).await?;
        }
        buffer.drain(..whole);
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = env::args().skip(1).collect();
    let (address, options) = words.split_first().ok_or("usage: target ADDRESS [delay_us=N] [hang=KEY]")?;
    let mut plan = Plan::default();
    for option in options {
        match option.split_once('=') {
            Some(("delay_us", us)) => plan.delay = Duration::from_micros(us.parse()?),
            Some(("hang", key)) => plan.hang = Some(key.as_bytes().to_vec()),
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let (plan, seen) = (Rc::new(plan), Rc::<RefCell<Seen>>::default());
    let listener = TcpListener::bind(address).await?;
    let accept = async move {
        loop {
            let (stream, _) = listener.accept().await?;
            let connection = serve(stream, plan.clone(), seen.clone());
            tokio::task::spawn_local(async move {
                if let Err(error) = connection.await {
                    eprintln!("a connection ended: {error}");
                }
            });
        }
    };
    let result: io::Result<()> = LocalSet::new().run_until(accept).await;
    Ok(result?)
}
