//! `postrider roundtrip`: through every capability of a running installation, from outside.

mod api;
mod capabilities;
mod load;

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use tokio::time::timeout;

use api::Api;

use super::block_on;

pub const EXAMPLES: &str = "\
Exit code 0 when everything came out again, else 1. What it writes has names of its own; the key-value
entry, posts and follow are deleted again, comments and messages stay.

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
    /// Only this capability; may be repeated
    #[arg(long = "room", value_enum)]
    capabilities: Vec<Capability>,
    /// Time for each capability, in seconds
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
enum Capability {
    Kv,
    Gateway,
    Comments,
    Messages,
    Presence,
    Feed,
    Dlq,
}

/// The error is a sentence for the user.
pub fn run(command: &Command) -> Result<(), String> {
    block_on(every_capability(command))
}

async fn every_capability(command: &Command) -> Result<(), String> {
    let api = Api::new(&command.url);
    if let Some(rate) = command.rate {
        let length = Duration::from_secs(command.seconds);
        return load::run(&api, rate, length, command.failures_allowed).await;
    }
    let mut failed = Vec::new();
    for capability in Capability::value_variants()
        .iter()
        .filter(|capability| command.capabilities.is_empty() || command.capabilities.contains(capability))
    {
        let name = capability.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let begun = Instant::now();
        let outcome = timeout(Duration::from_secs(command.timeout), capability.try_out(&api, command.topic.as_deref()));
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

impl Capability {
    /// Whether there was anything to try.
    async fn try_out(self, api: &Api, topic: Option<&str>) -> Result<bool, String> {
        match (self, topic) {
            (Self::Kv, _) => api.kv().await,
            (Self::Gateway, Some(topic)) => api.gateway(topic).await,
            (Self::Gateway, None) => return Ok(false),
            (Self::Comments, _) => api.comments().await,
            (Self::Messages, _) => api.messages().await,
            (Self::Presence, _) => return api.presence().await,
            (Self::Feed, _) => api.feed().await,
            (Self::Dlq, _) => return api.dead_letters().await,
        }
        .map(|()| true)
    }
}
