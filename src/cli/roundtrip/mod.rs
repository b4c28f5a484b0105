//! `postrider roundtrip`: through every room of a running installation, from outside.

mod api;
mod load;

use std::{
    future::Future,
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use clap::{Args, ValueEnum};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::time::{sleep, timeout};

use api::Api;

pub const EXAMPLES: &str = "\
Exit code 0 when everything came out again, else 1. What it writes has names of its own; the key-value
entry is deleted again, comments and messages stay.

Examples:
  postrider roundtrip --url http://localhost:8080
  postrider roundtrip --url http://postrider.events.svc:8080 --topic my-topic --room kv --room gateway
  postrider roundtrip --rate 1000 --seconds 60                  while something is upgraded, or fails";

/// Wait between looks at what is not there yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Args)]
pub struct Command {
    /// Where the api role answers, by http://
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// A topic that /produce may write to; without it the gateway is not tried
    #[arg(long)]
    topic: Option<String>,
    /// Only this room; may be repeated
    #[arg(long = "room", value_enum)]
    rooms: Vec<Room>,
    /// Time for each room, in seconds
    #[arg(long, default_value_t = 30)]
    timeout: u64,
    /// Instead, push so many values per second, and then pull every one of them; a failed request is a failure
    #[arg(long)]
    rate: Option<u32>,
    /// With --rate, let requests fail, as they do when a process is killed; what was accepted must come out all the same
    #[arg(long)]
    failures_allowed: bool,
    /// For how long, with --rate
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Room {
    Kv,
    Gateway,
    Comments,
    Messages,
    Dlq,
}

/// The error is a sentence for the user.
pub fn run(command: &Command) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start the runtime: {error}"))?;
    runtime.block_on(every_room(command))
}

async fn every_room(command: &Command) -> Result<(), String> {
    let api = Api::new(&command.url);
    if let Some(rate) = command.rate {
        let length = Duration::from_secs(command.seconds);
        return load::run(&api, rate, length, command.failures_allowed).await;
    }
    let mut failed = Vec::new();
    for room in Room::value_variants().iter().filter(|room| command.rooms.is_empty() || command.rooms.contains(room)) {
        let name = room.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let begun = Instant::now();
        let outcome = timeout(Duration::from_secs(command.timeout), room.try_out(&api, command.topic.as_deref()));
        match outcome.await.unwrap_or_else(|_| Err(format!("nothing came out within {} s", command.timeout))) {
            Ok(true) => println!("{name:9} ok       {} ms", begun.elapsed().as_millis()),
            Ok(false) => println!("{name:9} skipped"),
            Err(problem) => {
                println!("{name:9} FAILED   {problem}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("no round trip through {}", failed.join(", "))) }
}

impl Room {
    /// Whether there was anything to try.
    async fn try_out(self, api: &Api, topic: Option<&str>) -> Result<bool, String> {
        match (self, topic) {
            (Self::Kv, _) => api.kv().await,
            (Self::Gateway, Some(topic)) => api.gateway(topic).await,
            (Self::Gateway, None) => return Ok(false),
            (Self::Comments, _) => api.comments().await,
            (Self::Messages, _) => api.messages().await,
            (Self::Dlq, _) => return api.dead_letters().await,
        }
        .map(|()| true)
    }
}

impl Api {
    async fn kv(&self) -> Result<(), String> {
        let (key, value) = (format!("roundtrip-{}", self.mark), json!({"mark": self.mark}));
        let pushed = self.post("/push", &json!({"key": key, "value": value, "ttl_seconds": 3600})).await?;
        let position = pushed.expect(StatusCode::ACCEPTED, "push")?.position;
        let path = format!("/pull/{key}");
        until(|| async {
            // The view of a partition that is being rebuilt, or has just moved, is a matter of time.
            let answer = self.call(Method::GET, &path, &[("postrider-after", &position)], Bytes::new()).await?;
            match answer.status {
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Ok(false),
                _ if answer.json()["value"] == value => Ok(true),
                _ => answer.expect(StatusCode::OK, "pull").and(Err("pull answered another value".to_owned())),
            }
        })
        .await?;
        self.call(Method::DELETE, &path, &[], Bytes::new()).await?.expect(StatusCode::ACCEPTED, "delete").map(drop)
    }

    async fn gateway(&self, topic: &str) -> Result<(), String> {
        let record = json!({"topic": topic, "key": self.mark, "payload": {"mark": self.mark}});
        let answer = self.post("/produce", &record).await?.expect(StatusCode::OK, "produce")?.json();
        let placed = answer["success"] == true && answer["partition"].is_i64() && answer["offset"].is_i64();
        if placed { Ok(()) } else { Err(format!("produce answered without a place: {answer}")) }
    }

    async fn comments(&self) -> Result<(), String> {
        let comment = json!({"text": format!("roundtrip {}", self.mark), "post_id": self.mark});
        self.post("/api/v1/comments", &comment).await?.expect(StatusCode::OK, "posting")?;
        let path = format!("/api/v1/comments?post_id={}", self.mark);
        until(|| async {
            let answer = self.get(&path).await?.expect(StatusCode::OK, "the list")?.json();
            Ok(answer["comments"][0]["text"] == comment["text"])
        })
        .await
    }

    async fn messages(&self) -> Result<(), String> {
        let path = format!("/api/v1/messages/stream?receiverId={}", self.mark);
        let mut stream = self.send(Method::GET, &path, &[], Bytes::new()).await?.into_body();
        let content = format!("roundtrip {}", self.mark);
        let message =
            json!({"chatId": "roundtrip", "senderId": "roundtrip", "receiverId": self.mark, "content": content});
        self.post("/api/v1/message/action", &message).await?.expect(StatusCode::OK, "sending")?;
        let mut seen = String::new();
        while let Some(frame) = stream.frame().await {
            let frame = frame.map_err(|error| format!("the stream broke: {error}"))?;
            seen.push_str(&String::from_utf8_lossy(frame.data_ref().map_or(&[][..], |data| data)));
            if seen.contains(&content) {
                return Ok(());
            }
        }
        Err(format!("the stream ended without the message: {seen}"))
    }

    async fn dead_letters(&self) -> Result<bool, String> {
        let answer = self.get("/admin/dlq?limit=1&since=1m").await?;
        match answer.status {
            // Switched off, or busy with somebody else's question: it answers.
            StatusCode::NOT_FOUND | StatusCode::TOO_MANY_REQUESTS => Ok(false),
            _ => answer.expect(StatusCode::OK, "the list of dead letters").map(|_| true),
        }
    }
}

/// Asks again until it is true; the room's timeout bounds it.
async fn until<F: Future<Output = Result<bool, String>>>(mut question: impl FnMut() -> F) -> Result<(), String> {
    while !question().await? {
        sleep(LOOK_EVERY).await;
    }
    Ok(())
}
