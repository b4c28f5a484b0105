//! Implements `postrider produce`: writes records to a topic through the API.

mod input;
mod send;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    api, block_on,
    duration::Span,
    header, number,
    server::Server,
    text::{self, Stdout, note},
};
use input::{Batch, Input, Number};
use send::{Failure, Outcome, Sender};

pub const EXAMPLES: &str = "\
Records go to the API, as those of every other client do: that needs no access to Kafka, and the API checks topics, sizes and timestamps. Each record is printed as TOPIC/PARTITION@OFFSET once all in-sync replicas have it. Answers 429 and 503 are repeated after the wait that the API asks for, within --timeout. A record that is refused alone is sent again after the others of its request, so it may follow later records of its key; a note says so. The exit code is 1 if a record is not stored or may not be; the error names it. Without a reader of stdout, as after `| head`, all records are sent all the same.

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

/// Properties of all records of the command.
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
    #[arg(long, value_name = "NAME: VALUE", value_parser = header::Parser)]
    pub header: Vec<(String, String)>,
    /// Partition of each record; without it the key decides
    #[arg(long, value_parser = number::partition, allow_negative_numbers = true)]
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
    #[error("{}", failures(*.failed, *.unknown, *.tried, *.unsent))]
    NotStored {
        failed: usize,
        /// Records that may be stored.
        unknown: usize,
        tried: usize,
        /// True if records after these were not sent.
        unsent: bool,
    },
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Returns the sentence about records that failed.
fn failures(failed: usize, unknown: usize, tried: usize, unsent: bool) -> String {
    let parts = [(failed, "are not stored"), (unknown, "may be stored")];
    let parts = parts.iter().filter(|(count, _)| *count > 0);
    let what: Vec<String> = parts.map(|(count, what)| format!("{count} of {tried} records {what}")).collect();
    what.join(", ") + if unsent { "; the records after them were not sent" } else { "" }
}

/// Runs the command.
pub fn run(command: Command) -> Result<(), super::Error> {
    block_on(send_all(command))
}

async fn send_all(command: Command) -> Result<(), Error> {
    let Command { topic, values, record, server, timeout, output } = command;
    let mut sender = Sender::new(server.client()?, &topic, timeout.0);
    let mut input = Input::new(values, record);
    let (mut tried, mut failed, mut unknown, mut stdout) = (0, 0, 0, Stdout::Open);
    while let Some(batch) = input.batch().await {
        let Batch { records, problem } = batch;
        tried += records.len();
        let outcomes = sender.send(&records).await?;
        let failures: Vec<&Failure> = outcomes.iter().filter_map(|(_, outcome)| outcome.failure()).collect();
        let maybe_stored = failures.iter().filter(|failure| failure.maybe_stored).count();
        unknown += maybe_stored;
        failed += failures.len() - maybe_stored;
        let lines = report(&outcomes, output);
        // Records are sent also if nobody reads their positions any more.
        if stdout == Stdout::Open {
            stdout = text::print(&lines)?;
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        if failures.iter().any(|failure| failure.concerns_all()) {
            let unsent = input.has_more().await;
            return Err(Error::NotStored { failed, unknown, tried, unsent });
        }
    }
    if failed + unknown > 0 { Err(Error::NotStored { failed, unknown, tried, unsent: false }) } else { Ok(()) }
}

/// Names each record that is not stored on stderr. Returns the lines for stdout.
fn report(outcomes: &[(Number, Outcome)], output: Output) -> String {
    let mut lines = String::new();
    for (number, outcome) in outcomes {
        if let Some(reason) = outcome.reason() {
            note(&format!("record {number} {reason}"));
        }
        if let Outcome::Stored { warnings, .. } = outcome {
            warnings.iter().for_each(|warning| note(&format!("record {number} is stored, but: {warning}")));
        }
        match (output, outcome) {
            (Output::Json, outcome) => lines.push_str(&format!("{}\n", as_json(*number, outcome))),
            (Output::Text, Outcome::Stored { topic, partition, offset, .. }) => {
                lines.push_str(&format!("{topic}/{partition}@{offset}\n"));
            }
            (Output::Text, Outcome::Failed(_)) => {}
        }
    }
    lines
}

fn as_json(number: Number, outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Stored { topic, partition, offset, warnings } => {
            let mut line =
                json!({"record": number, "success": true, "topic": topic, "partition": partition, "offset": offset});
            if !warnings.is_empty() {
                line["warnings"] = json!(warnings);
            }
            line
        }
        Outcome::Failed(Failure { code, detail, maybe_stored, .. }) => {
            json!({"record": number, "success": false, "maybe_stored": maybe_stored, "code": code, "error": detail})
        }
    }
}
