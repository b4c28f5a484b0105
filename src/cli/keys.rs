//! Implements `postrider keys`: makes, lists and revokes API keys. Needs only Postgres.

use clap::Subcommand;
use postrider_auth::{ApiKey, Grant, GrantError, KeyRow, NewKey, NoRandomness, Store, parse_expiry};
use postrider_identity::Permission;
use postrider_postgres::{self as postgres, query};
use postrider_time::clock;
use serde::Serialize;

use super::{
    block_on,
    text::{self, Output, columns, note},
};
use crate::roles::Settings;

const CREATE_EXAMPLES: &str = "\
Prints the key to stdout, once; only a hash of it is stored. Send it as `Authorization: Bearer KEY`. docs/security.md says what each scope allows.

Examples:
  postrider keys create --scope kv:read --scope kv:write --note checkout
  postrider keys create --scope 'topic:write:orders.*' --expires 90d
  postrider keys create --scope 'topic:write:{tenant}.*' --tenant acme
  postrider keys create --scope messages:read --subject bob
  export API_KEY=$(postrider keys create --scope admin)";

const REVOKE_EXAMPLES: &str = "\
Every process refuses the key within 5 s and closes its connections. To replace a key, make the new one first: both are accepted until the old one is revoked.

Example:
  postrider keys revoke 5f2b0c9a1d3e4f60          an id as `list` prints it";

/// Number of keys read at a time.
const PAGE: u16 = 1_000;

#[derive(Subcommand)]
pub enum Command {
    /// Make an API key and print it
    #[command(after_help = CREATE_EXAMPLES)]
    Create {
        /// Scope of the key; repeatable
        #[arg(long = "scope", value_name = "SCOPE", required = true, help = scope_help())]
        scopes: Vec<String>,
        /// Subject for whom its requests act [default: the key's id]
        #[arg(long)]
        subject: Option<String>,
        /// Tenant that `{tenant}` in a scope stands for
        #[arg(long)]
        tenant: Option<String>,
        /// Time or span after which the key is refused, such as 2027-01-31T12:00:00Z, 12h or 30d
        /// [default: never]
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
        /// Text that `list` shows
        #[arg(long, default_value = "", hide_default_value = true)]
        note: String,
        #[command(flatten)]
        output: Output,
    },
    /// List API keys, without their secrets
    List {
        /// List those too that are revoked or expired
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Revoke API keys
    #[command(after_help = REVOKE_EXAMPLES)]
    Revoke {
        /// Ids of the keys, as `list` prints them
        #[arg(value_name = "ID", required = true)]
        ids: Vec<String>,
    },
}

fn scope_help() -> String {
    format!("What the key allows; repeatable: {}", Permission::forms())
}

/// The reason why a command about keys failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error("{0}: run `postrider migrate`")]
    NotMigrated(#[source] query::Error),
    #[error(transparent)]
    Query(query::Error),
    #[error(transparent)]
    Grant(#[from] GrantError),
    #[error(transparent)]
    Random(#[from] NoRandomness),
    #[error("there is no API key {0}; see `postrider keys list`")]
    Unknown(String),
    #[error(transparent)]
    Print(#[from] text::Error),
}

impl From<query::Error> for Error {
    fn from(error: query::Error) -> Self {
        if error.lacks_a_table() { Self::NotMigrated(error) } else { Self::Query(error) }
    }
}

#[derive(Serialize)]
struct Created {
    id: String,
    key: String,
}

/// Runs the command.
pub fn run(command: Command, settings: &Settings) -> Result<(), super::Error> {
    block_on(act(command, settings))
}

async fn act(command: Command, settings: &Settings) -> Result<(), Error> {
    let store = Store(postgres::pool(&settings.postgres)?);
    match command {
        Command::Create { scopes, subject, tenant, expires, note, output } => {
            let expires_at = expires.map(|text| parse_expiry(&text, clock::now_ms())).transpose()?;
            let grant = Grant { subject, tenant, scopes, note, expires_at }.check()?;
            let new = NewKey::random()?;
            store.insert(&new, &grant).await?;
            let created = Created { id: new.id, key: new.key };
            output.print(&created, |created| format!("{}\n", created.key))?;
            text::note(&format!("the key has the id {}; it is not shown again", created.id));
        }
        Command::List { all, output } => {
            let now_ms = clock::now_ms();
            let is_live = |row: &KeyRow| row.revoked_ms.is_none() && row.expires_ms.is_none_or(|at| at > now_ms);
            let mut keys = every(&store).await?;
            keys.retain(|row| all || is_live(row));
            let keys: Vec<ApiKey> = keys.into_iter().map(ApiKey::from).collect();
            output.print(&keys, |keys| table(keys))?;
        }
        Command::Revoke { ids } => {
            for id in ids {
                if id.contains('\0') || !store.revoke(&id).await? {
                    return Err(Error::Unknown(id));
                }
                note(&format!("{id} is revoked; every process refuses it within 5 s"));
            }
        }
    }
    Ok(())
}

async fn every(store: &Store) -> Result<Vec<KeyRow>, Error> {
    let (mut keys, mut after) = (Vec::new(), String::new());
    loop {
        let page = store.list(&after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(keys) };
        after.clone_from(&last.id);
        keys.extend(page);
    }
}

fn table(keys: &[ApiKey]) -> String {
    if keys.is_empty() {
        return "no API keys\n".to_owned();
    }
    let head = ["ID", "SUBJECT", "TENANT", "CREATED", "ENDS", "NOTE", "SCOPES"].map(str::to_owned);
    let rows = keys.iter().map(|key| {
        let ends = match (&key.revoked_at, &key.expires_at) {
            (Some(at), _) => format!("revoked {at}"),
            (None, Some(at)) => at.clone(),
            (None, None) => "never".to_owned(),
        };
        let tenant = key.tenant.clone().unwrap_or_else(|| "-".to_owned());
        let (note, scopes) = (key.note.clone(), key.scopes.join(" "));
        [key.id.clone(), key.subject.clone(), tenant, key.created_at.clone(), ends, note, scopes]
    });
    columns(std::iter::once(head).chain(rows).collect())
}
