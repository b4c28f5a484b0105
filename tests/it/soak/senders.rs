//! Clients that write, each to its own keys, and record everything in the ledger.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    fleet::Fleet,
    inject::{Inject, Injection},
    ledger::{Kind, Ledger, Outcome, Place, Sight},
    readers::RECEIVERS,
};
use crate::harness::{Answer, wait::seconds};

/// Error codes that mean that nothing was stored.
const REFUSALS: [&str; 4] = ["kafka_unavailable", "kafka_rejected", "overloaded", "postgres_unavailable"];
/// Time limit for retries of a write after the load has ended.
const LAST_ATTEMPTS: Duration = Duration::from_secs(60);

/// The context that all clients share.
#[derive(Clone)]
pub struct Clients {
    pub fleet: Arc<Fleet>,
    pub ledger: Ledger,
    /// The full name of the topic that clients write to by `/produce`.
    pub orders: String,
    pub stop: CancellationToken,
    pub injection: Injection,
}

/// Writes of a sender, and its retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Pushes, deletes, and values with a TTL; all with idempotency keys and retries.
    View,
    /// Pushes, each sent once.
    PushOnce,
    Produce,
    ProduceOnce,
    /// Batches, each sent once.
    Batch,
    /// Streams, each sent once.
    Stream,
    Comment,
    /// Messages to receivers to whom other senders write as well.
    Message,
    /// Messages, each sent once.
    MessageOnce,
}

/// A client that writes.
pub struct Sender {
    clients: Clients,
    style: Style,
    name: String,
    client: Client,
    rng: Rng,
    number: u64,
    last_attempts: LastAttempts,
}

/// Limits how long a client retries its last write after the stop.
#[derive(Default)]
pub struct LastAttempts(Option<Instant>);

impl LastAttempts {
    pub fn are_over(&mut self, stop: &CancellationToken) -> bool {
        let now = Instant::now();
        stop.is_cancelled() && now > *self.0.get_or_insert(now + LAST_ATTEMPTS)
    }
}

pub fn client() -> Client {
    // Longer than the product takes to respond with `outcome_unknown`.
    Client::builder().timeout(seconds(8)).build().unwrap()
}

impl Sender {
    pub fn new(clients: Clients, style: Style, name: &str, seed: u64) -> Self {
        let (name, rng) = (name.to_owned(), Rng::with_seed(seed));
        Self { clients, style, name, client: client(), rng, number: 0, last_attempts: LastAttempts::default() }
    }

    /// Writes until the stop, and finishes the current write.
    pub async fn run(mut self) {
        while !self.clients.stop.is_cancelled() {
            match self.style {
                Style::Batch | Style::Stream => self.many().await,
                _ => self.one().await,
            }
            let pause = Duration::from_millis(self.rng.u64(10..if self.is_bulk() { 500 } else { 60 }));
            let _ = self.clients.stop.run_until_cancelled(sleep(pause)).await;
        }
    }

    fn is_bulk(&self) -> bool {
        matches!(self.style, Style::Batch | Style::Stream)
    }

    fn repeats(&self) -> bool {
        matches!(self.style, Style::View | Style::Produce | Style::Comment | Style::Message)
    }

    fn next(&mut self) -> (String, u64) {
        self.number += 1;
        let keys = if self.style == Style::View { 12 } else { 4 };
        let key = match self.style {
            Style::Message | Style::MessageOnce => format!("{} {}", self.rng.choice(RECEIVERS).unwrap(), self.name),
            _ => format!("{}-{}", self.name, self.rng.u64(0..keys)),
        };
        (key, self.number)
    }

    /// Sends one write until it is acknowledged or abandoned.
    async fn one(&mut self) {
        let (key, number) = self.next();
        let kind = match (self.style, self.rng.u8(0..100)) {
            (Style::View, 0..12) => Kind::Delete,
            (Style::View, 12..25) => Kind::Expiring,
            (Style::View | Style::PushOnce, _) => Kind::Push,
            (Style::Comment, _) => Kind::Comment,
            (Style::Message | Style::MessageOnce, _) => Kind::Message,
            _ => Kind::Produce,
        };
        let body = self.body(kind, &key, number);
        let write = self.clients.ledger.begin(kind, &key, number);
        let (mut only_refused, give_up) = (true, self.rng.u8(0..100) < 30);
        loop {
            let outcome = self.attempt(write, kind, &key, &body).await;
            only_refused &= outcome == Outcome::Refused;
            match outcome {
                Outcome::Acknowledged(place) => return self.after(kind, &key, place).await,
                Outcome::Refused if give_up && only_refused => return,
                _ if !self.repeats() => return,
                _ if self.last_attempts.are_over(&self.clients.stop) => return,
                _ => sleep(Duration::from_millis(self.rng.u64(50..300))).await,
            }
        }
    }

    fn body(&mut self, kind: Kind, key: &str, number: u64) -> Value {
        let value = json!({"n": number, "pad": "x".repeat(self.rng.usize(0..200))});
        match kind {
            Kind::Push => json!({"key": key, "value": value}),
            Kind::Expiring => json!({"key": key, "value": value, "ttl_seconds": self.rng.u8(1..3)}),
            // A delete has no body; `posters.rs` sends the others.
            Kind::Delete | Kind::Post | Kind::DeletePost | Kind::Follow | Kind::Unfollow => Value::Null,
            Kind::Produce | Kind::Batch | Kind::Stream => {
                json!({"topic": self.clients.orders, "key": key, "payload": value})
            }
            Kind::Comment => json!({"post_id": key, "text": format!("comment {number}")}),
            Kind::Message => {
                let (receiver, sender) = key.split_once(' ').unwrap();
                // Some are too large for an announcement with their content.
                let pad = "x".repeat(if self.rng.u8(..) < 3 { 70_000 } else { self.rng.usize(0..200) });
                json!({"chatId": "c", "senderId": sender, "receiverId": receiver, "content": format!("{number} {pad}")})
            }
        }
    }

    async fn attempt(&mut self, write: usize, kind: Kind, key: &str, body: &Value) -> Outcome {
        let api = self.clients.fleet.api(&mut self.rng);
        let request = match kind {
            Kind::Delete => self.client.delete(format!("{api}/pull/{key}")),
            Kind::Push | Kind::Expiring => self.client.post(format!("{api}/push")).json(body),
            Kind::Comment => self.client.post(format!("{api}/api/v1/comments")).json(body),
            Kind::Message => self.client.post(format!("{api}/api/v1/message/action")).json(body),
            _ => self.client.post(format!("{api}/produce")).json(body),
        };
        let request =
            if self.repeats() { request.header("idempotency-key", format!("{key} {write}")) } else { request };
        // A short timeout causes retries, and so duplicates.
        let request = request.timeout(Duration::from_millis(self.rng.u64(1_500..8_000)));
        self.clients.ledger.attempt(write);
        let double = (kind == Kind::Push && !self.repeats()).then(|| request.try_clone()).flatten();
        let mut outcome = self.outcome(request).await;
        let stored = matches!(outcome, Outcome::Acknowledged(_));
        if let Some(double) = double.filter(|_| stored && self.clients.injection.now(Inject::Duplicate)) {
            let _ = double.send().await;
        }
        if stored && kind == Kind::Push && !self.repeats() && self.clients.injection.now(Inject::Leak) {
            outcome = Outcome::Refused;
        }
        self.clients.ledger.settle(write, outcome);
        outcome
    }

    async fn outcome(&self, request: RequestBuilder) -> Outcome {
        match answer(request).await {
            Ok(answer) if answer.status < 300 => Outcome::Acknowledged(place(&answer)),
            Ok(answer) => refusal(&self.clients.ledger, &self.name, answer.status, &code(&answer)),
            Err(error) => broken(&error),
        }
    }

    /// Sometimes reads a key right after writing it.
    async fn after(&mut self, kind: Kind, key: &str, place: Option<Place>) {
        let views = matches!(kind, Kind::Push | Kind::Delete | Kind::Expiring);
        let Some((partition, offset)) = place.filter(|_| views && self.rng.u8(0..100) < 30) else { return };
        let api = self.clients.fleet.api(&mut self.rng);
        let position = format!("{}/{partition}@{offset}", self.clients.fleet.messages);
        let request = self.client.get(format!("{api}/pull/{key}")).header("postrider-after", position);
        let reader = self.name.clone();
        see(&self.clients.ledger, request, &reader, key, Some(offset)).await;
    }

    /// Sends a batch or a stream, whose records are acknowledged one by one.
    async fn many(&mut self) {
        let kind = if self.style == Style::Batch { Kind::Batch } else { Kind::Stream };
        let (mut records, mut writes) = (Vec::new(), Vec::new());
        for _ in 0..self.rng.usize(2..12) {
            let (key, number) = self.next();
            records.push(self.body(kind, &key, number));
            let write = self.clients.ledger.begin(kind, &key, number);
            self.clients.ledger.attempt(write);
            writes.push(write);
        }
        let api = self.clients.fleet.api(&mut self.rng);
        let url = format!("{api}/produce?topic={}", self.clients.orders);
        let request = self.client.request(Method::POST, url);
        let request = match kind {
            Kind::Batch => request.json(&json!({"topic": self.clients.orders, "records": records})),
            _ => {
                let lines: Vec<String> = records.iter().map(Value::to_string).collect();
                request.header("content-type", "application/x-ndjson").body(lines.join("\n"))
            }
        };
        let outcomes = match answer(request).await {
            Ok(answer) if answer.status < 300 => results(&answer).iter().map(|result| self.result(result)).collect(),
            Ok(answer) => {
                let outcome = refusal(&self.clients.ledger, &self.name, answer.status, &code(&answer));
                vec![outcome; writes.len()]
            }
            Err(error) => vec![broken(&error); writes.len()],
        };
        // A record without a result stays unknown.
        for (write, outcome) in writes.into_iter().zip(outcomes) {
            self.clients.ledger.settle(write, outcome);
        }
    }

    fn result(&self, result: &Value) -> Outcome {
        if result["success"] == true {
            return Outcome::Acknowledged(place_in(result));
        }
        let status = result["status"].as_u64().and_then(|status| u16::try_from(status).ok());
        refusal(&self.clients.ledger, &self.name, status.unwrap_or(0), result["code"].as_str().unwrap_or("?"))
    }
}

/// Returns the outcome of a write whose response is an error.
pub fn refusal(ledger: &Ledger, sender: &str, status: u16, code: &str) -> Outcome {
    *ledger.evidence().answers.entry(format!("{status} {code}")).or_default() += 1;
    match code {
        _ if status == 503 && REFUSALS.contains(&code) => Outcome::Refused,
        "outcome_unknown" if status == 503 => Outcome::Unknown,
        _ => {
            ledger.incident(format!("{sender} got {status} {code}"));
            Outcome::Unknown
        }
    }
}

pub async fn answer(request: RequestBuilder) -> Result<Answer, reqwest::Error> {
    Answer::read(request.send().await?).await
}

/// Returns the outcome of a request without a response. A client that could not connect has sent
/// nothing.
pub fn broken(error: &reqwest::Error) -> Outcome {
    if error.is_connect() { Outcome::Refused } else { Outcome::Unknown }
}

pub fn code(answer: &Answer) -> String {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    body["code"].as_str().unwrap_or("without a code").to_owned()
}

fn place(answer: &Answer) -> Option<Place> {
    let position = answer.header("postrider-position");
    if let Some((partition, offset)) = position.rsplit('/').next().and_then(|place| place.split_once('@')) {
        return Some((partition.parse().ok()?, offset.parse().ok()?));
    }
    place_in(&serde_json::from_slice(&answer.body).ok()?)
}

fn place_in(body: &Value) -> Option<Place> {
    let (partition, offset) = body["partition"].as_i64().zip(body["offset"].as_i64())?;
    Some((partition as i32, offset))
}

fn results(answer: &Answer) -> Vec<Value> {
    match serde_json::from_slice::<Value>(&answer.body) {
        Ok(batch) if batch["results"].is_array() => batch["results"].as_array().cloned().unwrap_or_default(),
        // The last line may be incomplete.
        _ => answer.text().lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
    }
}

/// Pulls a key, and records what the response shows.
pub async fn see(ledger: &Ledger, request: RequestBuilder, reader: &str, key: &str, after: Option<i64>) {
    let Ok(answer) = answer(request).await else { return };
    let saw = match answer.status {
        200 => answer.json()["value"]["n"].as_u64(),
        404 => None,
        503 | 504 => {
            *ledger.evidence().answers.entry(format!("{} {}", answer.status, code(&answer))).or_default() += 1;
            return;
        }
        status => return ledger.incident(format!("a pull of {key} got {status}: {}", answer.text())),
    };
    let (reader, key, at_ms) = (reader.to_owned(), key.to_owned(), ledger.now_ms());
    ledger.evidence().sights.push(Sight { reader, key, after, saw, at_ms });
}
