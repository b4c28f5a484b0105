//! Implements `postrider listen`: prints records, messages, comments and posts as they arrive.

mod comments;
mod events;
mod feed;
mod receiver;
mod record;
mod topic;

use std::{ops::ControlFlow, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use postrider_config::Loaded;
use postrider_kafka::{reach::Unreachable, tail::TailError};
use postrider_time::backoff::Backoff;
use serde_json::Value;

use super::{
    api, block_on,
    duration::Span,
    number,
    text::{self, Stdout},
};
use crate::roles::Settings;

pub const EXAMPLES: &str = "\
Prints one JSON value per line to stdout, and notes for people to stderr. Ctrl-C ends it with exit code 130. After a disconnect it resumes where it was.

Examples:
  postrider listen topic my-topic --from beginning --exit-at-end
  postrider listen receiver bob
  postrider listen comments --count 10 | jq .data.text
  postrider listen feed bea --for 1m";

/// Wait before the next attempt to connect.
const RECONNECT: Backoff = Backoff::doubling(Duration::from_millis(250), Duration::from_secs(5));

/// Time within which a stream must be open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time without a byte after which a connection counts as broken: a server sends pings and
/// heartbeats more often.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub enum Command {
    /// Print the records of a topic, read from Kafka without a consumer group
    #[command(after_help = topic::EXAMPLES)]
    Topic(topic::Topic),
    /// Print the messages to a receiver, received by WebSocket
    #[command(after_help = receiver::EXAMPLES)]
    Receiver(receiver::Receiver),
    /// Print comments as they are stored
    #[command(after_help = comments::EXAMPLES)]
    Comments(comments::Comments),
    /// Print new posts in the feed of a user
    #[command(after_help = feed::EXAMPLES)]
    Feed(feed::Feed),
}

/// Where to start.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum From {
    /// Print what is there, then what is new
    Beginning,
    /// Print only what is new
    End,
}

/// When to end.
#[derive(Args)]
#[command(next_help_heading = "End")]
pub struct End {
    /// End after this many lines
    #[arg(long, value_parser = number::count::<u64>, allow_negative_numbers = true)]
    count: Option<u64>,
    /// End after this time, with exit code 0
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<Span>,
}

/// The reason why listening ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("interrupted")]
    Interrupted,
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error(transparent)]
    Tail(#[from] TailError),
    #[error("--from: {0}")]
    Start(#[from] topic::FromError),
    #[error("{url} answered {status}: {detail}")]
    Refused { url: String, status: u16, detail: String },
    #[error("{url}: {detail}")]
    Connect { url: String, detail: String },
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Runs the command. `load` returns the configuration, which only `topic` needs.
pub fn run(
    command: Command,
    load: impl FnOnce() -> Result<Loaded<Settings>, super::Error>,
) -> Result<(), super::Error> {
    match command {
        Command::Topic(topic) => {
            let loaded = load()?;
            let lines = topic.end.lines();
            block_on(until_end(topic.end.length, topic.follow(loaded, lines)))
        }
        Command::Receiver(receiver) => {
            let lines = receiver.end.lines();
            block_on(until_end(receiver.end.length, receiver.follow(lines)))
        }
        Command::Comments(comments) => {
            let lines = comments.end.lines();
            block_on(until_end(comments.end.length, comments.follow(lines)))
        }
        Command::Feed(feed) => {
            let lines = feed.end.lines();
            block_on(until_end(feed.end.length, feed.follow(lines)))
        }
    }
}

/// Runs the work until it ends, its time is over, or Ctrl-C is pressed.
async fn until_end(length: Option<Span>, work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let time_over = async {
        match length {
            Some(Span(length)) => tokio::time::sleep(length).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        outcome = work => outcome,
        () = time_over => Ok(()),
        _ = tokio::signal::ctrl_c() => Err(Error::Interrupted),
    }
}

/// Lines that may still be printed.
pub struct Lines(Option<u64>);

impl End {
    fn lines(&self) -> Lines {
        Lines(self.count)
    }
}

impl Lines {
    /// Prints JSON in one line. Breaks after the last one, and if nobody reads them.
    fn print(&mut self, json: &str) -> Result<ControlFlow<()>, text::Error> {
        // Within strings, JSON has no line breaks.
        let line = json.replace(['\n', '\r'], " ") + "\n";
        if self.0 == Some(0) || text::print(&line)? == Stdout::Closed {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(left) = &mut self.0 {
            *left -= 1;
        }
        Ok(if self.0 == Some(0) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn print_json(&mut self, value: &Value) -> Result<ControlFlow<()>, text::Error> {
        self.print(&value.to_string())
    }
}
