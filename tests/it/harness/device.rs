//! A receiver's device for tests of replay: it connects to any process, drops connections, reads
//! slowly, acknowledges late, and records what it gets.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use futures_util::{SinkExt, StreamExt};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use super::{
    sessions::{Name, Notebook, Style},
    socket::{Inner, connect},
    sse::Stream,
    wait::seconds,
};

/// Timeout of a handshake, and of a connection without any frame, not even a ping. Then the device
/// reconnects.
const PATIENCE: Duration = seconds(3);
/// The same timeout while no faults are injected, for a slow and busy machine.
const CALM_PATIENCE: Duration = seconds(30);

/// State that all devices share.
#[derive(Clone)]
pub struct Surroundings {
    /// Returns the address of a process to connect to, which may be down.
    pub api: Arc<dyn Fn(&mut Rng) -> String + Send + Sync>,
    pub notebook: Notebook,
    /// Once cancelled, devices no longer drop connections on purpose.
    pub calm: CancellationToken,
}

/// A device of a receiver.
pub struct Device {
    name: String,
    receiver: String,
    style: Style,
    around: Surroundings,
    rng: Rng,
    client: Client,
    /// The cursor to resume after, for styles with their own position.
    after: String,
    /// Cursors of messages that the device has not acknowledged.
    unacknowledged: Vec<String>,
}

impl Device {
    pub fn new(number: usize, receiver: &str, style: Style, around: &Surroundings, seed: u64) -> Self {
        Self {
            name: format!("{receiver}-{number}-{}", format!("{style:?}").to_lowercase()),
            receiver: receiver.to_owned(),
            style,
            around: around.clone(),
            rng: Rng::with_seed(seed),
            client: Client::new(),
            after: "0".to_owned(),
            unacknowledged: Vec::new(),
        }
    }

    /// Reconnects in an endless loop.
    pub async fn run(mut self) {
        loop {
            let ended = match self.style {
                Style::Events => self.stream().await,
                _ => self.socket().await,
            };
            let refused = ended.is_none();
            sleep(Duration::from_millis(self.rng.u64(if refused { 50..300 } else { 1..100 }))).await;
        }
    }

    fn patience(&self) -> Duration {
        if self.around.calm.is_cancelled() { CALM_PATIENCE } else { PATIENCE }
    }

    /// Returns the time at which the device drops a connection, unless the calm has begun.
    fn leaves(&mut self) -> Instant {
        let most_ms = if self.rng.bool() { 300 } else { 5_000 };
        Instant::now() + Duration::from_millis(self.rng.u64(0..most_ms))
    }

    /// Runs one WebSocket connection. Returns `None` if it failed.
    async fn socket(&mut self) -> Option<()> {
        let (api, asked_ms) = ((self.around.api)(&mut self.rng), self.around.notebook.now_ms());
        let after = if self.style == Style::Cursors { format!("&after={}", self.after) } else { String::new() };
        let query = format!("?receiverId={}{after}", self.receiver);
        let plain = self.style == Style::Plain;
        let headers = if plain { &[][..] } else { &[("Sec-WebSocket-Protocol", "postrider.v1")] };
        let (mut socket, _) = timeout(self.patience(), connect(&api, &query, headers)).await.ok()?.ok()?;
        let session = self.around.notebook.open(&self.name, &self.receiver, self.style, asked_ms);
        self.unacknowledged.clear();
        let leaves = self.leaves();
        loop {
            let stays = self.around.calm.is_cancelled();
            let frame = tokio::select! {
                frame = timeout(self.patience(), socket.next()) => frame,
                () = sleep_until(leaves), if !stays => break,
            };
            let Ok(Some(Ok(frame))) = frame else { break };
            if let Message::Text(text) = frame {
                self.frame(session, &text);
                self.acknowledge(&mut socket, stays).await?;
            }
            if !stays && self.rng.u8(..) < 3 {
                sleep(Duration::from_millis(self.rng.u64(0..500))).await;
            }
        }
        if self.rng.bool() {
            let _ = timeout(Duration::from_millis(200), socket.close(None)).await;
        }
        Some(())
    }

    fn frame(&mut self, session: usize, text: &str) {
        let mut frame: Value = serde_json::from_str(text).unwrap();
        if self.style != Style::Plain && frame["type"] == "message" {
            frame["id"].as_str().unwrap().clone_into(&mut self.after);
            self.unacknowledged.push(self.after.clone());
            frame = frame["data"].take();
        }
        self.around.notebook.take(session, named(&frame));
    }

    /// Acknowledges messages at random times, mostly some time after they came.
    async fn acknowledge(&mut self, socket: &mut Inner, stays: bool) -> Option<()> {
        if self.style != Style::Acks || self.unacknowledged.is_empty() || !(stays || self.rng.u8(..) < 40) {
            return Some(());
        }
        let upto = if stays { self.unacknowledged.len() } else { self.rng.usize(1..=self.unacknowledged.len()) };
        let ack = self.unacknowledged.drain(..upto).next_back();
        let said = Message::text(json!({"ack": ack}).to_string());
        timeout(self.patience(), socket.send(said)).await.ok()?.ok()
    }

    async fn stream(&mut self) -> Option<()> {
        let (api, asked_ms) = ((self.around.api)(&mut self.rng), self.around.notebook.now_ms());
        let path = format!("/api/v1/messages/stream?receiverId={}", self.receiver);
        let open = Stream::try_open(&self.client, &api, &path, &self.after);
        let stream = timeout(self.patience(), open).await.ok()?.ok()?;
        let session = self.around.notebook.open(&self.name, &self.receiver, self.style, asked_ms);
        let (leaves, mut taken, mut heard) = (self.leaves(), 0, (Instant::now(), 0));
        loop {
            let seen = stream.since(taken);
            taken += seen.events.len();
            if taken + seen.heartbeats > heard.1 {
                heard = (Instant::now(), taken + seen.heartbeats);
            }
            seen.events.iter().for_each(|(_, data)| self.around.notebook.take(session, named(data)));
            self.after = seen.last_id;
            let left = Instant::now() > leaves && !self.around.calm.is_cancelled();
            if seen.ended || left || heard.0.elapsed() > self.patience() {
                return Some(());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Returns the name of a message, or `None` for a gap. Other data gets a name that belongs to no
/// receiver.
fn named(data: &Value) -> Option<Name> {
    let strange = || Name { receiver: data.to_string(), sender: String::new(), number: 0 };
    if data["type"] == "gap" { None } else { Some(Name::of(data).unwrap_or_else(strange)) }
}
