//! `postrider outbox`: what the outbox put aside, on the command line. Needs Postgres alone.

use clap::Subcommand;

use super::{
    block_on,
    change::Change,
    text::{Output, columns},
};
use crate::{
    outbox::{Filter, Listing, Outcome, Quarantine},
    platform::{postgres, query::Error},
    roles::Settings,
};

const LIST_EXAMPLES: &str = "\
A row without a reason only came later than one of its key that has one.

Examples:
  postrider outbox quarantine list
  postrider outbox quarantine list --key ann --output json | jq '.rows[].reason'";

const RELEASE_EXAMPLES: &str = "\
All rows of a key go back into the outbox, in their order and before whatever came later. Kafka is
asked again: a row that it still does not take is put aside again, with those after it. So first
remove the reason (a larger `kafka.producer.max_message_bytes`, a topic that is there), or drop
the row.

Examples:
  postrider outbox quarantine release --key ann --dry-run     what would happen
  postrider outbox quarantine release --key ann
  postrider outbox quarantine release --yes                   the rows of every key";

const DROP_EXAMPLES: &str = "\
What the row told is lost to all who read the topic; `postrider feed verify --repair` mends feeds.
Other rows of its key stay aside until they are released.

Examples:
  postrider outbox quarantine drop 17 --dry-run               what would be deleted
  postrider outbox quarantine drop 17
  postrider outbox quarantine drop --key ann                  every row of a key";

#[derive(Subcommand)]
pub enum Command {
    /// List, put back and drop rows that were put aside because Kafka never takes them, or one before them
    #[command(subcommand)]
    Quarantine(Action),
}

#[derive(Subcommand)]
pub enum Action {
    /// List rows, the oldest first
    #[command(after_help = LIST_EXAMPLES)]
    List {
        /// Only rows of this key
        #[arg(long)]
        key: Option<String>,
        /// How many at most
        #[arg(long, default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Put the rows of a key back into the outbox
    #[command(after_help = RELEASE_EXAMPLES)]
    Release {
        /// Only the rows of this key
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Delete rows for good
    #[command(after_help = DROP_EXAMPLES)]
    Drop {
        /// Only these rows
        #[arg(value_name = "ID")]
        ids: Vec<i64>,
        /// Only rows of this key
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        change: Change,
    },
}

/// Does what was asked. The error is a sentence for the user.
pub fn run(Command::Quarantine(action): Command, settings: &Settings) -> Result<(), String> {
    block_on(act(action, settings))
}

async fn act(action: Action, settings: &Settings) -> Result<(), String> {
    let pool = postgres::pool(&settings.postgres).map_err(|error| error.to_string())?;
    let quarantine = Quarantine::new(pool);
    let told = |error: Error| match error {
        error if error.lacks_a_table() => format!("{error}: run `postrider migrate`"),
        error => error.to_string(),
    };
    match action {
        Action::List { key, limit, output } => {
            let filter = Filter { ids: Vec::new(), key };
            let listing = quarantine.list(&filter, limit.into()).await.map_err(told)?;
            output.print(&listing, table)
        }
        Action::Release { key, change } => {
            change.confirm(key.is_some(), "put every row back: choose some by --key")?;
            let outcome = quarantine.release(key.as_deref(), change.dry_run).await.map_err(told)?;
            report(&change, &outcome, "put back", key.as_deref(), &[])
        }
        Action::Drop { ids, key, change } => {
            let chosen = key.is_some() || !ids.is_empty();
            change.confirm(chosen, "drop every row: choose some by id or --key")?;
            let filter = Filter { ids, key };
            let outcome = quarantine.drop_rows(&filter, change.dry_run).await.map_err(told)?;
            report(&change, &outcome, "dropped", filter.key.as_deref(), &filter.ids)
        }
    }
}

/// Prints what was done; an error when what was named is not there.
fn report(change: &Change, outcome: &Outcome, done: &str, key: Option<&str>, ids: &[i64]) -> Result<(), String> {
    let Outcome { keys, rows, .. } = outcome;
    let would = if outcome.dry_run { "would be " } else { "" };
    change.output.print(outcome, |_| format!("{rows} rows of {keys} keys {would}{done}\n"))?;
    let is_missing = if ids.is_empty() { key.is_some() && *rows == 0 } else { *rows < ids.len() as i64 };
    if is_missing {
        return Err(
            "not all that was named is in quarantine; `postrider outbox quarantine list` has what is".to_owned()
        );
    }
    Ok(())
}

fn table(listing: &Listing) -> String {
    if listing.rows.is_empty() {
        return "no rows are in quarantine\n".to_owned();
    }
    let head = ["PUT ASIDE AT", "ID", "TOPIC", "KIND", "BYTES", "KEY", "REASON"].map(str::to_owned);
    let rows = listing.rows.iter().map(|row| {
        let (id, bytes) = (row.id.to_string(), row.value_bytes.to_string());
        let reason = row.reason.as_deref().unwrap_or("-");
        [&row.quarantined_at, &id, &row.topic, &row.kind, &bytes, &row.key, reason].map(str::to_owned)
    });
    let mut text = columns(std::iter::once(head).chain(rows).collect());
    let (shown, matched) = (listing.rows.len() as i64, listing.matched);
    if shown < matched {
        text.push_str(&format!("the oldest {shown} of {matched}; --limit shows more\n"));
    }
    text
}
