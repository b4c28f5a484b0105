//! Parses the command line, loads the configuration and dispatches to a command.

mod api;
mod change;
mod dlq;
mod docs;
mod duration;
mod error;
mod feed;
mod given;
mod header;
#[cfg(test)]
mod help_tests;
mod kafka_wait;
mod keys;
mod lag;
mod listen;
mod number;
mod outbox;
mod pages;
mod produce;
mod progress;
mod relay;
mod roundtrip;
mod running;
mod server;
mod single_dash;
mod text;

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::{Args, Parser, Subcommand};
use postrider_config::{self as config, Loaded, Overrides};
use postrider_postgres as postgres;

pub use error::Error;

use crate::roles::{self, Role, Settings};

/// Accepts events over HTTP, stores them in Kafka and delivers them.
///
/// postrider is one program; the configured role decides what a process does. To try it with Kafka,
/// Redis and Postgres running, run `postrider migrate` and then `postrider run`. In the repository,
/// `make run` starts the three servers and does both.
#[derive(Parser)]
#[command(version, after_long_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    sources: Sources,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Configuration sources, later ones win: defaults, postrider.yaml, POSTRIDER_* variables, flags. The key `kafka.brokers` is POSTRIDER_KAFKA__BROKERS in the environment. To read a secret from a file, append _FILE to its variable.

Examples:
  postrider config show                   every value and its source
  postrider run --role api                serve HTTP only
  postrider run --set http.listen=:8081   override one key
  postrider produce my-topic hello        write a record through the API
  postrider listen receiver bob           print messages as they arrive
  postrider dlq list --since 2h           dead letters of the last two hours
  postrider lag                           the lag of every consumer
  POSTRIDER_ROLE=processor postrider run  set the role in the environment";

#[derive(Args)]
#[command(next_help_heading = "Configuration")]
struct Sources {
    /// Read this file instead of ./postrider.yaml
    #[arg(long, global = true, env = "POSTRIDER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one configuration key; repeatable
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a role until SIGTERM or Ctrl-C
    Run {
        /// Role of this process; overrides the key `role`
        #[arg(long, value_enum)]
        role: Option<Role>,
    },
    /// POST the records of a topic to a URL; needs only Kafka
    ///
    /// A flag overrides the environment variable shown beside it. Flags may be written with one
    /// dash or two. Kafka's security settings come from the configuration (POSTRIDER_KAFKA__…). See
    /// docs/relay.md.
    #[command(after_help = relay::EXAMPLES)]
    Relay(Box<relay::Relay>),
    /// Write records to a topic, from arguments or stdin
    #[command(after_help = produce::EXAMPLES)]
    Produce(produce::Command),
    /// Print records, messages, comments or posts as they arrive
    #[command(subcommand, after_help = listen::EXAMPLES)]
    Listen(listen::Command),
    /// Create or update the tables in Postgres; safe to repeat and while postrider is running
    Migrate,
    /// List, show, replay and purge dead letters: records that could not be processed or delivered
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// Make, list and revoke API keys
    #[command(subcommand)]
    Keys(keys::Command),
    /// List, release and drop quarantined outbox rows
    #[command(subcommand)]
    Outbox(outbox::Command),
    /// Verify and repair feeds, and generate test data
    #[command(subcommand)]
    Feed(feed::Command),
    /// Show the lag of every consumer and what blocks it
    #[command(after_help = lag::EXAMPLES)]
    Lag(lag::Command),
    /// Test every capability of a running installation from end to end
    #[command(after_help = roundtrip::EXAMPLES)]
    Roundtrip(roundtrip::Command),
    /// Show, check or describe the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completions of a shell
    #[command(after_help = pages::COMPLETIONS_EXAMPLES)]
    Completions(pages::Completions),
    /// Print the manual page, or write the pages of all commands
    #[command(after_help = pages::MAN_EXAMPLES)]
    Man(pages::Man),
    /// Write the generated tables of the docs, or check that they are current
    #[command(hide = true)]
    Docs {
        /// Fail when a table is stale instead of writing it
        #[arg(long)]
        check: bool,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the effective configuration with the source of every value; secrets are masked
    #[command(after_help = SHOW_EXAMPLES)]
    Show {
        /// Ask a running process instead of loading the configuration here
        #[arg(long)]
        running: bool,
        /// Management address of the process, with --running [default: the configured
        /// address, on this machine]
        #[arg(long, env = "MANAGEMENT_URL", value_name = "URL")]
        management: Option<String>,
    },
    /// Exit with an error when the configuration is invalid
    Check,
    /// Print the JSON schema of postrider.yaml
    Schema,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  postrider config show | grep -v default             what is set, and where
  postrider config show --running                     what the process here uses
  postrider config show --running --management http://10.0.0.7:9090";

/// Parses the process's arguments and runs the command.
pub fn main() -> Result<(), Error> {
    let cli = Cli::parse_from(single_dash::with_two_dashes(std::env::args_os()));
    let sources = cli.sources;
    let settings = || Ok::<_, Error>(load(&sources, None)?.settings);
    match cli.command {
        Command::Run { role } => roles::run(Arc::new(move || Ok(load_checked(&sources, role)?))).map_err(Error::Role),
        Command::Relay(relay) => relay::run(*relay, sources),
        Command::Produce(command) => produce::run(command),
        Command::Listen(command) => listen::run(command, || load(&sources, None)),
        Command::Migrate => migrate(&settings()?),
        Command::Config(command) => configure(command, &sources),
        Command::Dlq(command) => dlq::run(command, &load(&sources, None)?),
        Command::Keys(command) => keys::run(command, &settings()?),
        Command::Outbox(command) => outbox::run(command, &settings()?),
        Command::Feed(command) => feed::run(command, &settings()?),
        Command::Lag(command) => lag::run(&command, &load(&sources, None)?),
        Command::Roundtrip(command) => roundtrip::run(&command),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
        Command::Docs { check } => Ok(docs::write_or_check(check)?),
    }
}

fn configure(command: ConfigCommand, sources: &Sources) -> Result<(), Error> {
    let text = match command {
        ConfigCommand::Show { running: true, management } => {
            let local = || Ok::<_, Error>(running::local_addresses(&load(sources, None)?.settings));
            // Compose files set a variable that is not given to the empty text.
            let given = management.filter(|address| !address.is_empty());
            let addresses = given.map_or_else(local, |address| Ok(vec![address]))?;
            return running::show(addresses.first().map_or("", String::as_str));
        }
        ConfigCommand::Show { .. } => config::show(&load(sources, None)?),
        ConfigCommand::Check => {
            let loaded = load_checked(sources, None)?;
            format!("valid: {} keys set, role {}\n", loaded.sources.len(), loaded.settings.role)
        }
        ConfigCommand::Schema => config::schema::<Settings>(),
    };
    text::print(&text)?;
    Ok(())
}

fn load(sources: &Sources, role: Option<Role>) -> Result<Loaded<Settings>, Error> {
    load_with(sources, role.map(|role| ("role".to_owned(), role.to_string(), "--role")).into_iter().collect())
}

/// Loads the configuration and checks its rules.
fn load_checked(sources: &Sources, role: Option<Role>) -> Result<Loaded<Settings>, Error> {
    let loaded = load(sources, role)?;
    loaded.settings.check().map_err(|invalid| {
        // A rule may concern a section; then the first of its keys that is set names the source.
        let set = loaded.sources.iter().find(|(key, _)| key.starts_with(invalid.key));
        let origin = set.map_or_else(|| "the defaults".to_owned(), |(_, origin)| origin.clone());
        Error::Invalid { origin, invalid }
    })?;
    Ok(loaded)
}

/// Loads the configuration. `own` holds a command's own flags as key, value and flag name; they
/// override `--set`.
fn load_with(sources: &Sources, own: Vec<(String, String, &'static str)>) -> Result<Loaded<Settings>, Error> {
    let mut flags = Vec::new();
    for pair in &sources.set {
        let (key, value) = pair.split_once('=').ok_or_else(|| Error::NotAPair(pair.clone()))?;
        flags.push((key.to_owned(), value.to_owned(), "--set"));
    }
    flags.extend(own);
    let overrides = Overrides { file: sources.config.clone(), flags };
    Ok(config::load(&overrides, std::env::vars())?)
}

/// Runs the work of a command. Tasks that it leaves running have one second to end.
fn block_on<T, E: Into<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, Error> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome.map_err(Into::into)
}

fn migrate(settings: &Settings) -> Result<(), Error> {
    let count = block_on(postgres::migrate(&settings.postgres))?;
    text::print(&format!("{count} migrations are applied in schema `{}`\n", settings.postgres.schema))?;
    Ok(())
}
