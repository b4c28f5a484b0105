//! Implements `postrider produce`: writes records to a topic through the API.

mod input;
mod send;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    api, block_on,
    duration::Span,
    header,
    server::Server,
    text::{self, Stdout, note},
};
use input::{Batch, Input, Number};
use send::{Outcome, Sender};

pub const EXAMPLES: &str = "\
Records go to the API, as those of every other client do: that needs no access to Kafka, and the API checks topics, sizes and timestamps. Each record is printed as TOPIC/PARTITION@OFFSET once all in-sync replicas have it. Answers 429 and 503 are repeated after the wait that the API asks for, within --timeout. The exit code is 1 if a record is not stored; the error names it.

Examples:
  postrider produce my-topic hello
  postrider produce my-topic --key a --header source:cli '{\"n\":1}'
  postrider produce my-topic --key a < values.txt
  postrider produce my-topic --format ndjson < records.ndjson
  postrider produce my-topic --output json hello | jq .offset";

#[derive(Args)]
pub struct Command {
    /// Topic to write to
    topic: String,
    /// Values of the records; without them, values are read from stdin
    #[arg(value_name = "VALUE")]
    values: Vec<String>,
    #[command(flatten)]
    record: Record,
    #[command(flatten)]
    server: Server,
    /// Time within which a record must be stored, repeated requests included
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = "Server")]
    timeout: Span,
    /// Output format
    #[arg(long, value_enum, default_value_t = Output::Text, help_heading = "Output")]
    output: Output,
}

/// What all records of the command have in common.
#[derive(Args)]
#[command(next_help_heading = "Records")]
pub struct Record {
    /// Form of the values
    #[arg(long, value_enum, default_value_t = Format::Lines)]
    pub format: Format,
    /// Key of each record
    #[arg(long)]
    pub key: Option<String>,
    /// Header of each record; repeatable
    #[arg(long, value_name = "NAME: VALUE", value_parser = header::parse)]
    pub header: Vec<(String, String)>,
    /// Partition of each record; without it the key decides
    #[arg(long)]
    pub partition: Option<i32>,
    /// Timestamp of each record: milliseconds, or a time such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    pub timestamp: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Each argument, or each line of stdin that is not empty, is a value, written as it is
    Lines,
    /// Each argument, or each JSON value on stdin, is a value; spaces between tokens are removed
    Json,
    /// Each argument, or each JSON object on stdin, is a record as in POST /produce: `payload`,
    /// `key`, `headers`, …; the options fill in what it lacks
    Ndjson,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// The reason why a record was not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("record {number} cannot be read: {source}")]
    Unreadable { number: Number, source: input::Error },
    #[error("{failed} of {tried} records are not stored{}", if *.stopped { "; the records after them were not sent" } else { "" })]
    NotStored { failed: usize, tried: usize, stopped: bool },
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Runs the command.
pub fn run(command: Command) -> Result<(), super::Error> {
    block_on(send_all(command))
}

async fn send_all(command: Command) -> Result<(), Error> {
    let Command { topic, values, record, server, timeout, output } = command;
    let mut sender = Sender::new(&server.api, &topic, timeout.0)?;
    let mut input = Input::new(values, record);
    let (mut tried, mut failed, mut stopped) = (0, 0, false);
    while let Some(batch) = input.batch().await {
        let Batch { records, problem } = batch;
        tried += records.len();
        let outcomes = sender.send(&records).await?;
        failed += outcomes.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::Stored { .. })).count();
        stopped = outcomes.iter().any(|(_, outcome)| outcome.concerns_all());
        if print(&outcomes, output)? == Stdout::Closed {
            return Ok(());
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        if stopped {
            break;
        }
    }
    if failed > 0 { Err(Error::NotStored { failed, tried, stopped }) } else { Ok(()) }
}

/// Prints the position of each stored record, and names each other one.
fn print(outcomes: &[(Number, Outcome)], output: Output) -> Result<Stdout, text::Error> {
    let mut lines = String::new();
    for (number, outcome) in outcomes {
        if let Some(reason) = outcome.reason() {
            note(&format!("record {number} {reason}"));
        }
        match (output, outcome) {
            (Output::Json, outcome) => lines.push_str(&format!("{}\n", as_json(*number, outcome))),
            (Output::Text, Outcome::Stored { topic, partition, offset }) => {
                lines.push_str(&format!("{topic}/{partition}@{offset}\n"));
            }
            (Output::Text, _) => {}
        }
    }
    text::print(&lines)
}

fn as_json(number: Number, outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Stored { topic, partition, offset } => {
            json!({"record": number, "success": true, "topic": topic, "partition": partition, "offset": offset})
        }
        Outcome::Failed { code, detail, .. } => {
            json!({"record": number, "success": false, "code": code, "error": detail})
        }
    }
}
