//! Implements `postrider dlq`: lists, shows, replays and purges dead letters. Needs only Kafka.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand};
use postrider_config::Loaded;
use postrider_dlq::{
    Bounds, Detail, Filter, Letters, Listing, Outcome, Progress, Query, Queue, Report, Summary, parse_key, parse_since,
};
use postrider_health::Health;
use postrider_kafka::{Admin, Broker, Producer, reach::Unreachable};
use postrider_time::clock;
use rdkafka::error::KafkaError;

use super::{
    block_on,
    change::{Change, Unconfirmed},
    kafka_wait::KafkaWait,
    number,
    text::{self, Output, columns, note, tame},
};
use crate::roles::Settings;

const LIST_EXAMPLES: &str = "\
Examples:
  postrider dlq list                                  newest 50 letters
  postrider dlq list --since 2h --error timeout       timeouts of two hours
  postrider dlq list --topic messages --key user123   letters of one key
  postrider dlq list --key-base64 AP8=                letters of a binary key
  postrider dlq list --output json | jq '.letters[].id'";

const SHOW_EXAMPLES: &str = "\
Example:
  postrider dlq show 'messages/3@1234 postrider-kv'   an id as `list` prints it";

const REPLAY_EXAMPLES: &str = "\
Writes each record to its topic again: same partition, key, value, headers and event id, in order. Deletes the letter once Kafka has stored the record. Replaying a letter twice is harmless if consumers drop duplicates by event id. In a compacted topic, a record that is no longer the newest of its key is skipped as superseded; its letter stays until you purge it.

Examples:
  postrider dlq replay --topic messages --dry-run     what would be replayed
  postrider dlq replay --error transport --since 1h
  postrider dlq replay 'messages/3@1234 postrider-kv'
  postrider dlq replay --yes                          replay every letter";

const PURGE_EXAMPLES: &str = "\
Examples:
  postrider dlq purge --topic messages --dry-run      what would be deleted
  postrider dlq purge 'messages/3@1234 postrider-kv'
  postrider dlq purge --deliveries --yes              every failed delivery";

/// Prefix of a key in base64 in a list.
const BASE64_MARK: &str = "base64:";

#[derive(Subcommand)]
pub enum Command {
    /// List dead letters, newest first
    #[command(after_help = LIST_EXAMPLES)]
    List {
        #[command(flatten)]
        selection: Selection,
        /// Maximum number of letters
        #[arg(long, default_value_t = 50, value_parser = number::count::<usize>, help_heading = "Selection")]
        limit: usize,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        wait: KafkaWait,
    },
    /// Show one dead letter with its record's value and headers
    #[command(after_help = SHOW_EXAMPLES)]
    Show {
        /// Id of the letter, as `list` prints it
        id: String,
        #[command(flatten)]
        letters: Which,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        wait: KafkaWait,
    },
    /// Write the records of dead letters to their topics again and delete the letters
    #[command(after_help = REPLAY_EXAMPLES)]
    Replay(Choice),
    /// Delete dead letters
    #[command(after_help = PURGE_EXAMPLES)]
    Purge(Choice),
}

#[derive(Args)]
#[command(next_help_heading = "Selection")]
#[group(multiple = false)]
pub struct Which {
    /// Only records that postrider failed to process
    #[arg(long)]
    events: bool,
    /// Only records that an endpoint did not accept
    #[arg(long)]
    deliveries: bool,
    /// Another dead-letter topic (full name)
    #[arg(long, value_name = "TOPIC")]
    letters: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Selection")]
pub struct Selection {
    /// Topic of the record, with or without `kafka.topic_prefix`
    #[arg(long)]
    topic: Option<String>,
    /// Key of the record
    #[arg(long)]
    key: Option<String>,
    /// Key of the record in Base64, as `list` shows it after `base64:`
    #[arg(long, value_name = "BASE64", conflicts_with = "key")]
    key_base64: Option<String>,
    /// Only letters whose last failure is at or after this time (2026-01-31T12:00:00Z) or within
    /// this age (90s, 15m, 2h, 7d)
    #[arg(long, value_name = "TIME|AGE")]
    since: Option<String>,
    /// Error class, or part of the error message
    #[arg(long)]
    error: Option<String>,
    #[command(flatten)]
    letters: Which,
}

#[derive(Args)]
pub struct Choice {
    /// Only letters with these ids
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    #[command(flatten)]
    selection: Selection,
    /// Maximum number of letters, in the order of their records
    #[arg(long, value_parser = number::count::<usize>, help_heading = "Selection")]
    limit: Option<usize>,
    #[command(flatten)]
    change: Change,
    #[command(flatten)]
    wait: KafkaWait,
}

impl Command {
    fn wait(&self) -> &KafkaWait {
        match self {
            Self::List { wait, .. } | Self::Show { wait, .. } => wait,
            Self::Replay(choice) | Self::Purge(choice) => &choice.wait,
        }
    }
}

/// The reason why a command about dead letters failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error("--since: {0}")]
    Since(#[source] postrider_dlq::SinceError),
    #[error("--key-base64 {0}")]
    Key(#[source] postrider_dlq::KeyError),
    #[error("--{0} is empty; leave it out to take every {0}")]
    Empty(&'static str),
    #[error("--letters is empty; leave it out to read the dead-letter topics of postrider")]
    EmptyLetters,
    #[error(transparent)]
    Unconfirmed(#[from] Unconfirmed),
    #[error(transparent)]
    Queue(#[from] postrider_dlq::Error),
    #[error("there is no dead letter `{0}`; see `postrider dlq list`")]
    NoLetter(String),
    #[error("{0} of these ids have no dead letter; see `postrider dlq list`")]
    NotFound(usize),
    #[error("{failed} letters failed and {remaining} were not reached; these letters are kept")]
    Failed { failed: usize, remaining: usize },
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Runs the command.
pub fn run(command: Command, loaded: &Loaded<Settings>) -> Result<(), super::Error> {
    block_on(act(command, loaded))
}

async fn act(command: Command, loaded: &Loaded<Settings>) -> Result<(), Error> {
    let kafka = &loaded.settings.kafka;
    command.wait().check(loaded).await?;
    let broker = Broker::start(kafka, Health::default().check("kafka"))?;
    let producer = Producer::start_alone(kafka, broker.clone())?;
    let admin = Arc::new(Admin::new(kafka, broker.clone())?);
    let queue = Queue::new(kafka.clone(), producer, broker, admin);
    match command {
        Command::List { selection, limit, output, .. } => {
            let query = selection.query(Vec::new(), limit)?;
            let listing = queue.list(query, bounds()).await?;
            Ok(output.print(&listing, table)?)
        }
        Command::Show { id, letters, output, .. } => {
            let found = queue.show(letters.topics()?, id.clone(), bounds()).await?;
            Ok(output.print(&found.ok_or(Error::NoLetter(id))?, page)?)
        }
        Command::Replay(choice) => {
            let query = choice.query("replay")?;
            let report = queue.replay(query, choice.change.dry_run, bounds()).await?;
            choice.report(&report, "replayed")
        }
        Command::Purge(choice) => {
            let query = choice.query("purge")?;
            let report = queue.purge(query, choice.change.dry_run, bounds()).await?;
            choice.report(&report, "purged")
        }
    }
}

impl Which {
    fn topics(&self) -> Result<Letters, Error> {
        match self {
            Self { letters: Some(topic), .. } if topic.trim().is_empty() => Err(Error::EmptyLetters),
            Self { letters: Some(topic), .. } => Ok(Letters::Topic(topic.clone())),
            Self { events: true, .. } => Ok(Letters::Events),
            Self { deliveries: true, .. } => Ok(Letters::Deliveries),
            _ => Ok(Letters::All),
        }
    }
}

impl Selection {
    fn query(&self, ids: Vec<String>, limit: usize) -> Result<Query, Error> {
        let parse = |text| parse_since(text, clock::now_ms());
        let since_ms = self.since.as_deref().map(parse).transpose().map_err(Error::Since)?;
        let text = self.key.as_ref().map(|key| key.clone().into_bytes());
        let binary = self.key_base64.as_deref().map(parse_key).transpose().map_err(Error::Key)?;
        let Self { topic, error, letters, .. } = self;
        let filter = Filter { ids, topic: topic.clone(), key: text.or(binary), since_ms, error: error.clone() };
        if let Some(name) = filter.empty_condition() {
            return Err(Error::Empty(name));
        }
        Ok(Query { letters: letters.topics()?, filter, limit })
    }
}

impl Choice {
    fn query(&self, word: &str) -> Result<Query, Error> {
        let query = self.selection.query(self.ids.clone(), self.limit.unwrap_or(usize::MAX))?;
        let would =
            format!("{word} every letter (choose letters by id, --topic, --key, --key-base64, --since or --error)");
        self.change.confirm(!query.filter.is_empty(), &would)?;
        Ok(query)
    }

    /// Prints the outcome of each letter. Fails if a letter failed, or was not found.
    fn report(&self, report: &Report, done: &str) -> Result<(), Error> {
        self.change.output.print(report, |report| outcomes(report, done))?;
        match *report {
            Report { failed: 0, not_found: 0, .. } => Ok(()),
            Report { failed: 0, not_found, .. } => Err(Error::NotFound(not_found)),
            Report { failed, remaining, .. } => Err(Error::Failed { failed, remaining }),
        }
    }
}

fn bounds() -> Bounds {
    const TIMEOUT: Duration = Duration::from_secs(24 * 3_600);
    Bounds { deadline: Instant::now() + TIMEOUT, max_letters: 1_000_000, chunk_bytes: 64 << 20, progress: progress() }
}

/// Prints the progress of long work to stderr, at most every two seconds.
fn progress() -> Progress {
    let printed_at = Cell::new(Instant::now());
    Box::new(move |what, done, total| {
        if printed_at.get().elapsed() > Duration::from_secs(2) {
            printed_at.set(Instant::now());
            note(&format!("{what}: {done} of {total}"));
        }
    })
}

fn table(listing: &Listing) -> String {
    if listing.letters.is_empty() {
        return "no dead letters match\n".to_owned();
    }
    let head = ["FAILED AT", "CLASS", "TRIES", "KEY", "ID", "ERROR"].map(str::to_owned);
    let rows = listing.letters.iter().map(|letter| {
        let (attempts, key) = (letter.attempts.to_string(), shown_key(letter));
        let cells = [&letter.failed_at, &letter.error_class, &attempts, &key, &letter.id, &letter.error];
        cells.map(String::clone)
    });
    let mut text = columns(std::iter::once(head).chain(rows).collect());
    let (shown, matched) = (listing.letters.len(), listing.matched);
    if shown < matched {
        let more = if listing.truncated { " at least" } else { "" };
        text.push_str(&format!("showing the newest {shown} of{more} {matched}; raise --limit to see more\n"));
    }
    text
}

/// Returns the key of a letter for people: `-` if it has none. Keys that are not text, or look like
/// something else, are in base64 after [`BASE64_MARK`].
fn shown_key(letter: &Summary) -> String {
    match (&letter.key, &letter.key_base64) {
        (None, None) => "-".to_owned(),
        (_, Some(base64)) => format!("{BASE64_MARK}{base64}"),
        (Some(text), None) if matches!(&**text, "" | "-") || text.starts_with(BASE64_MARK) => {
            format!("{BASE64_MARK}{}", BASE64_STANDARD.encode(text))
        }
        (Some(text), None) => text.clone(),
    }
}

fn page(detail: &Detail) -> String {
    let summary = serde_json::to_value(&detail.summary).unwrap_or_default();
    let plain = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut text = String::new();
    for (name, value) in summary.as_object().into_iter().flatten() {
        text.push_str(&format!("{name:16} {}\n", tame(&plain(value))));
    }
    for header in &detail.headers {
        let value = header.value.as_deref().or(header.value_base64.as_deref()).unwrap_or("null");
        text.push_str(&format!("{:16} {}: {}\n", "header", tame(&header.name), tame(value)));
    }
    let value = detail.value.as_ref().map(ToString::to_string);
    if let Some(value) = value.or(detail.value_text.clone()).or(detail.value_base64.clone()) {
        text.push_str(&format!("{:16} {}\n", "value", tame(&value)));
    }
    text
}

fn outcomes(report: &Report, done: &str) -> String {
    let mut text = String::new();
    for item in &report.letters {
        // The count covers successful letters; only a dry run lists them.
        if !report.dry_run && matches!(item.outcome, Outcome::Replayed | Outcome::Purged) {
            continue;
        }
        let outcome = serde_json::to_value(item.outcome).unwrap_or_default();
        let detail = item.detail.as_deref().map_or_else(String::new, |detail| format!("  ({})", tame(detail)));
        text.push_str(&format!("{:12}  {}{detail}\n", outcome.as_str().unwrap_or_default(), tame(&item.id)));
    }
    let Report { matched, skipped, failed, remaining, not_found, .. } = report;
    let would = if report.dry_run { "would be " } else { "" };
    text.push_str(&format!("{} of {matched} {would}{done}", report.done));
    for (count, word) in
        [(skipped, "skipped"), (failed, "failed"), (remaining, "not reached"), (not_found, "not found")]
    {
        if *count > 0 {
            text.push_str(&format!(", {count} {word}"));
        }
    }
    text + "\n"
}
