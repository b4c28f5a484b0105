//! Implements `postrider roundtrip`: tests every capability of a running installation from outside.

mod capabilities;
mod load;
mod visitor;

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use tokio::time::timeout;

use visitor::Visitor;

use super::{
    api, block_on,
    duration::Span,
    number,
    progress::Progress,
    text::{self, print},
};

pub const EXAMPLES: &str = "\
Writes to every capability and checks that the result can be read. The exit code is 0 if every check passes, otherwise 1. All names it writes are unique to the run. It deletes its key-value entry, posts and follow; its comment and message stay.

Examples:
  postrider roundtrip --url http://localhost:8080
  postrider roundtrip --topic my-topic --room kv --room gateway
  postrider roundtrip --rate 1000 --seconds 60   load during an upgrade";

/// Interval between checks for a result that is not visible yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Args)]
pub struct Command {
    /// URL of the API
    #[arg(long, env = "API_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Topic that /produce may write to; without it the gateway is skipped
    #[arg(long)]
    topic: Option<String>,
    /// Test only this capability; repeatable
    #[arg(long = "room", value_enum)]
    capabilities: Vec<Capability>,
    /// Timeout of each capability
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    timeout: Span,
    /// Push this many values per second instead, then pull each of them; a failed request fails the
    /// command
    #[arg(long, value_parser = number::natural::<u32>, help_heading = "Load")]
    rate: Option<u32>,
    /// With --rate, tolerate failed requests, as when a process is killed; every accepted value
    /// must still be readable
    #[arg(long, help_heading = "Load")]
    failures_allowed: bool,
    /// Duration of the load in seconds, with --rate
    #[arg(long, default_value_t = 30, value_parser = number::natural::<u64>, help_heading = "Load")]
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

/// The reason why the round trip failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("these capabilities failed: {}", .0.join(", "))]
    Capabilities(Vec<String>),
    #[error("--room gateway needs --topic, a topic that /produce may write to")]
    NoTopic,
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Runs the command.
pub fn run(command: &Command) -> Result<(), super::Error> {
    block_on(every_capability(command))
}

async fn every_capability(command: &Command) -> Result<(), Error> {
    let visitor = Visitor::new(&command.url)?;
    if let Some(rate) = command.rate {
        let length = Duration::from_secs(command.seconds);
        return Ok(load::run(&visitor, rate, length, command.failures_allowed).await?);
    }
    if command.topic.is_none() && command.capabilities.contains(&Capability::Gateway) {
        return Err(Error::NoTopic);
    }
    let chosen =
        |capability: &&Capability| command.capabilities.is_empty() || command.capabilities.contains(capability);
    let chosen: Vec<&Capability> = Capability::value_variants().iter().filter(chosen).collect();
    let (progress, mut failed) = (Progress::new(), Vec::new());
    for (number, capability) in chosen.iter().enumerate() {
        let name = capability.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        progress.show(&format!("testing {name} ({} of {})", number + 1, chosen.len()));
        let begun = Instant::now();
        let limit = command.timeout.0;
        let outcome = timeout(limit, capability.try_out(&visitor, command.topic.as_deref())).await;
        progress.hide();
        print(&match outcome.unwrap_or(Err(capabilities::Error::TimedOut(limit))) {
            Ok(true) => format!("{name:9} ok       {} ms\n", begun.elapsed().as_millis()),
            Ok(false) => format!("{name:9} skipped\n"),
            Err(error) => {
                failed.push(name.clone());
                format!("{name:9} FAILED   {error}\n")
            }
        })?;
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::Capabilities(failed)) }
}

impl Capability {
    /// Tests one capability. Returns false if it is skipped.
    async fn try_out(self, api: &Visitor, topic: Option<&str>) -> Result<bool, capabilities::Error> {
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
