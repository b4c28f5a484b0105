//! Implements `postrider outbox`: lists, releases and drops quarantined rows. Needs only Postgres.

use clap::Subcommand;
use postrider_outbox::{Filter, Listing, Outcome, Quarantine};
use postrider_postgres::{self as postgres, query};

use super::{
    block_on,
    change::{Change, Unconfirmed},
    number,
    text::{self, Output, columns},
};
use crate::roles::Settings;

const LIST_EXAMPLES: &str = "\
Kafka rejected each row that has a REASON. A row without one waits behind an earlier row of its key.

Examples:
  postrider outbox quarantine list
  postrider outbox quarantine list --key ann --output json | jq '.rows[].reason'";

const RELEASE_EXAMPLES: &str = "\
Returns all rows of a key to the outbox, in order and before later rows of the key. If Kafka rejects a row again, that row and those after it return to quarantine. So first fix the reason (raise `kafka.producer.max_message_bytes`, create the topic) or drop the row.

Examples:
  postrider outbox quarantine release --key ann --dry-run
  postrider outbox quarantine release --key ann
  postrider outbox quarantine release --yes           rows of every key";

const DROP_EXAMPLES: &str = "\
Deletes rows without sending them, so consumers of the topic never receive these events. Afterwards run `postrider feed verify --repair` if the rows concern feeds. Other rows of the key stay in quarantine until they are released.

Examples:
  postrider outbox quarantine drop 17 --dry-run       what would be deleted
  postrider outbox quarantine drop 17
  postrider outbox quarantine drop --key ann          every row of a key";

#[derive(Subcommand)]
pub enum Command {
    /// List, release and drop rows that Kafka rejected, and rows that wait behind them
    #[command(subcommand)]
    Quarantine(Action),
}

#[derive(Subcommand)]
pub enum Action {
    /// List rows, oldest first
    #[command(after_help = LIST_EXAMPLES)]
    List {
        /// List only rows of this key
        #[arg(long)]
        key: Option<String>,
        /// Maximum number of rows
        #[arg(long, default_value_t = 50, value_parser = number::natural::<u32>)]
        limit: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Return the rows of a key to the outbox
    #[command(after_help = RELEASE_EXAMPLES)]
    Release {
        /// Release only the rows of this key
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Delete rows permanently
    #[command(after_help = DROP_EXAMPLES)]
    Drop {
        /// Delete only the rows with these ids
        #[arg(value_name = "ID")]
        ids: Vec<i64>,
        /// Delete only rows of this key
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        change: Change,
    },
}

/// The reason why a command about the outbox failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error("{0}: run `postrider migrate`")]
    NotMigrated(#[source] query::Error),
    #[error(transparent)]
    Query(query::Error),
    #[error(transparent)]
    Unconfirmed(#[from] Unconfirmed),
    #[error("some of the named rows are not in quarantine; see `postrider outbox quarantine list`")]
    NotQuarantined,
    #[error(transparent)]
    Print(#[from] text::Error),
}

impl From<query::Error> for Error {
    fn from(error: query::Error) -> Self {
        if error.lacks_a_table() { Self::NotMigrated(error) } else { Self::Query(error) }
    }
}

/// Runs the command.
pub fn run(Command::Quarantine(action): Command, settings: &Settings) -> Result<(), super::Error> {
    block_on(act(action, settings))
}

async fn act(action: Action, settings: &Settings) -> Result<(), Error> {
    let quarantine = Quarantine::new(postgres::pool(&settings.postgres)?);
    match action {
        Action::List { key, limit, output } => {
            let filter = Filter { ids: Vec::new(), key };
            let listing = quarantine.list(&filter, limit.into()).await?;
            Ok(output.print(&listing, table)?)
        }
        Action::Release { key, change } => {
            change.confirm(key.is_some(), "release every row (choose rows with --key)")?;
            let outcome = quarantine.release(key.as_deref(), change.dry_run).await?;
            report(&change, &outcome, "released", key.as_deref(), &[])
        }
        Action::Drop { ids, key, change } => {
            let chosen = key.is_some() || !ids.is_empty();
            change.confirm(chosen, "drop every row (choose rows by id or --key)")?;
            let filter = Filter { ids, key };
            let outcome = quarantine.drop_rows(&filter, change.dry_run).await?;
            report(&change, &outcome, "dropped", filter.key.as_deref(), &filter.ids)
        }
    }
}

/// Prints the outcome. Fails if a named row or key is not in quarantine.
fn report(change: &Change, outcome: &Outcome, done: &str, key: Option<&str>, ids: &[i64]) -> Result<(), Error> {
    let Outcome { keys, rows, .. } = outcome;
    let would = if outcome.dry_run { "would be " } else { "" };
    change.output.print(outcome, |_| format!("{rows} rows of {keys} keys {would}{done}\n"))?;
    let is_missing = if ids.is_empty() { key.is_some() && *rows == 0 } else { *rows < ids.len() as i64 };
    if is_missing {
        return Err(Error::NotQuarantined);
    }
    Ok(())
}

fn table(listing: &Listing) -> String {
    if listing.rows.is_empty() {
        return "no rows are in quarantine\n".to_owned();
    }
    let head = ["QUARANTINED AT", "ID", "TOPIC", "KIND", "BYTES", "KEY", "REASON"].map(str::to_owned);
    let rows = listing.rows.iter().map(|row| {
        let (id, bytes) = (row.id.to_string(), row.value_bytes.to_string());
        let reason = row.reason.as_deref().unwrap_or("-");
        [&row.quarantined_at, &id, &row.topic, &row.kind, &bytes, &row.key, reason].map(str::to_owned)
    });
    let mut text = columns(std::iter::once(head).chain(rows).collect());
    let (shown, matched) = (listing.rows.len() as i64, listing.matched);
    if shown < matched {
        text.push_str(&format!("showing the oldest {shown} of {matched}; raise --limit to see more\n"));
    }
    text
}
