//! Defines the arguments of `postrider relay`, including the spellings of the Go program it
//! replaces.

use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use postrider_config::{Loaded, Secret, SecretUrl, Secrets};
use postrider_gateway::relay::{Access, Config, Failed, Preview, Problem, Route, Snapshot};
use postrider_kafka::{
    self as kafka,
    batch::Batch,
    committed::Commits,
    reach::Unreachable,
    scan::{self, ScanError, Scanner},
};
use postrider_outbound::ConnectError;
use postrider_time::backoff::{Growth, Jitter};
use rdkafka::{Message, error::KafkaError, message::BorrowedMessage};

use super::{
    Error, Sources, block_on,
    duration::Span,
    given::{Given, given_value, or_empty},
    header,
    kafka_wait::{self, KafkaWait},
    load_with, number,
    text::{self, Stdout, note, tame},
};
use crate::roles::{self, RelayCommand, Role, Settings};

pub const EXAMPLES: &str = "\
Examples:
  postrider relay --topic my-topic --target-url https://example.com/hook
  postrider relay --topic my-topic --target-url https://example.com/hook \\
    --header 'authorization: Bearer abc' --rate 0
  postrider relay --broker kafka:9092 --topic my-topic \\
    --target-url http://localhost:3000 --once
  TOPIC=my-topic TARGET_URL=https://example.com/hook postrider relay --dry-run";

/// Maximum duration of a dry run.
const PREVIEW_TIMEOUT: Duration = Duration::from_secs(24 * 3_600);
/// Time within which Kafka must say what a topic has.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Default of `--group`.
const GROUP: &str = "http-consumer";

/// If a flag is given twice, the last one counts, as in the replaced program.
#[derive(Args)]
#[command(args_override_self = true)]
pub struct Relay {
    /// Kafka bootstrap brokers, separated by commas [default: `kafka.brokers`]
    #[arg(long, env = "BROKER", value_name = "HOST:PORT,…", help_heading = "Source")]
    broker: Option<Given<String>>,
    /// Topic to read
    #[arg(long, env = "TOPIC", help_heading = "Source")]
    topic: Option<Given<String>>,
    /// URL that receives the records by POST
    #[arg(long, env = "TARGET_URL", value_name = "URL", hide_env_values = true, help_heading = "Target")]
    target_url: Option<Given<String>>,
    /// Consumer group [default: http-consumer]
    #[arg(long, env = "CONSUMER_GROUP", help_heading = "Source")]
    group: Option<Given<String>>,
    /// Concurrent requests [default: 5]
    #[arg(long, env = "WORKERS", value_name = "COUNT", value_parser = or_empty(number::count::<usize>))]
    #[arg(allow_negative_numbers = true, help_heading = "Target")]
    workers: Option<Given<usize>>,
    /// Requests per second, 0 for no limit [default: 10]
    #[arg(long, env = "RATE_LIMIT", value_name = "PER SECOND", value_parser = or_empty(number::rate))]
    #[arg(allow_negative_numbers = true, help_heading = "Target")]
    rate: Option<Given<f64>>,
    /// Timeout of one request [default: 30s]
    #[arg(long, env = "HTTP_TIMEOUT", value_name = "DURATION", help_heading = "Target")]
    timeout: Option<Given<Span>>,
    /// Retries after the first attempt, before the record is dead-lettered [default: 3]
    #[arg(long, env = "RETRY_ATTEMPTS", value_name = "COUNT", value_parser = or_empty(number::natural::<u32>))]
    #[arg(allow_negative_numbers = true, help_heading = "Retries")]
    retries: Option<Given<u32>>,
    /// Delay before the first retry [default: 1s]
    #[arg(long, env = "RETRY_DELAY", value_name = "DURATION", help_heading = "Retries")]
    retry_delay: Option<Given<Span>>,
    /// Growth of the delay from retry to retry [default: fixed]
    #[arg(long, value_enum, help_heading = "Retries")]
    backoff: Option<Growth>,
    /// Longest delay before a retry, including `Retry-After` [default: 5m]
    #[arg(long, value_name = "DURATION", help_heading = "Retries")]
    max_retry_delay: Option<Given<Span>>,
    /// Randomization of the delay [default: none]
    #[arg(long, value_enum, help_heading = "Retries")]
    jitter: Option<Jitter>,
    /// Ignore `Retry-After` headers of the target
    #[arg(long, help_heading = "Retries")]
    ignore_retry_after: bool,
    /// Header to add to every request; repeatable
    #[arg(long, value_name = "NAME: VALUE", value_parser = header::Parser, help_heading = "Target")]
    header: Vec<(String, String)>,
    /// PEM file with certificate authorities to trust in addition to the system's
    #[arg(long, value_name = "FILE", help_heading = "Target")]
    ca_file: Option<PathBuf>,
    /// Refuse a target that is not on the public internet
    #[arg(long, help_heading = "Target")]
    public_only: bool,
    /// Address of probes and metrics [default: `management.listen`, or the next free port]
    #[arg(long, value_name = "HOST:PORT")]
    management: Option<String>,
    /// End at the records that the topic has now; the exit code is 1 if one of them failed
    #[arg(long, conflicts_with = "dry_run", help_heading = "End")]
    once: bool,
    /// Print the requests for the records that the topic has now, and send and commit nothing
    #[arg(long, help_heading = "End")]
    dry_run: bool,
    /// With --once or --dry-run: time that Kafka has to answer [default: 3s]
    #[arg(long, value_name = "DURATION", help_heading = "End")]
    wait: Option<Given<Span>>,
}

/// The error of a flag that has no default and is not given.
#[derive(Debug, thiserror::Error)]
#[error("{flag} is missing; pass it or set the variable {variable}")]
pub struct MissingFlag {
    flag: &'static str,
    variable: &'static str,
}

/// The reason why the command failed, besides that of its process.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error(transparent)]
    Missing(#[from] MissingFlag),
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error(transparent)]
    Route(#[from] Problem),
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error("kafka: {0}")]
    Scan(#[from] ScanError),
    /// The target may not be called, or cannot be checked.
    #[error("--public-only: {0}")]
    NotPublic(#[from] ConnectError),
    #[error("topic `{0}` does not exist")]
    NoTopic(String),
    #[error("{0} records failed; they are dead letters")]
    Failed(u64),
    /// A signal ended `--once`; it has this name.
    #[error("stopped before the end")]
    Stopped(&'static str),
    #[error("the lookup ended early")]
    Ended,
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Settings and route that the command line describes.
pub struct Order {
    pub loaded: Loaded<Settings>,
    pub route: Config,
    pub public_only: bool,
    /// True if another port may be used when the management port is taken.
    pub any_management_port: bool,
}

/// Runs the command.
pub fn run(relay: Relay, sources: Sources) -> Result<(), Error> {
    let Order { loaded, route, public_only, any_management_port } = relay.order(&sources)?;
    let access = if public_only { Access::Public } else { Access::Any };
    let until = match relay.once || relay.dry_run {
        true => Some(block_on(relay.spans(&loaded, &route, access))?),
        false => None,
    };
    if let (true, Some(spans)) = (relay.dry_run, until.clone()) {
        return block_on(preview(loaded.settings.kafka, route, access, spans));
    }
    let (topic, once, brokers_origin) = (route.topic.clone(), relay.once, kafka_wait::origin(&loaded));
    let hint = list_command(&topic, &loaded, &sources);
    let started = Arc::default();
    let command =
        RelayCommand { route, public_only, any_management_port, brokers_origin, until, started: Arc::clone(&started) };
    let load = Arc::new(move || Ok(relay.order(&sources)?.loaded));
    let outcome = roles::run_relay(command, load).map_err(Error::Role);
    let summarized = started.get().map_or(Ok(0), |route| summarize(route, &topic, &hint));
    // The error of the process comes first, also if the summary cannot be printed.
    let (signal, failed) = (outcome?, summarized?);
    match signal {
        Some(signal) if once => Err(RelayError::Stopped(signal).into()),
        _ if once && failed > 0 => Err(RelayError::Failed(failed).into()),
        _ => Ok(()),
    }
}

/// Returns the command that lists the dead letters of a topic, with the arguments that lead to the
/// same brokers.
fn list_command(topic: &str, loaded: &Loaded<Settings>, sources: &Sources) -> String {
    let mut command = format!("postrider dlq list --deliveries --topic {topic}");
    if let Some(file) = &sources.config {
        command.push_str(&format!(" --config {}", file.display()));
    }
    if kafka_wait::origin(loaded).starts_with("--") {
        command.push_str(&format!(" --set kafka.brokers={}", loaded.settings.kafka.brokers.join(",")));
    }
    command
}

/// Prints what was delivered, and why the rest was not. Returns the number of dead letters.
fn summarize(route: &Route, topic: &str, list_command: &str) -> Result<u64, RelayError> {
    let Snapshot { delivered, failed, dead_letters, .. } = route.snapshot();
    let mut text = format!(
        "delivered {delivered} records of {topic}; {failed} attempts failed, {dead_letters} records are dead letters\n"
    );
    for (class, failed) in route.dead_letters() {
        let Failed { records, message, last } = failed;
        text.push_str(&format!("  {records} {class}, the last one {last}: {}\n", tame(&message)));
    }
    if dead_letters > 0 {
        text.push_str(&format!("  list them: {list_command}\n"));
    }
    text::print(&text)?;
    Ok(dead_letters)
}

/// Prints the requests for the records of these spans.
async fn preview(
    kafka: kafka::Config,
    route: Config,
    access: Access,
    spans: Vec<scan::Span>,
) -> Result<(), RelayError> {
    let preview = Preview::new(&route, access)?;
    preview.check_target().await?;
    let printed = tokio::task::spawn_blocking(move || {
        let left = Commits::connect(&kafka, &route.topic, &route.group())?.uncommitted(&spans)?;
        let (mut failed, mut count, mut stdout) = (None, 0, Stdout::Open);
        let print = |message: &BorrowedMessage<'_>| {
            let mut batch = Batch::default();
            batch.push(message);
            let line = preview.request(message.partition(), &batch.record(0))?;
            Ok::<_, RelayError>(text::print(&(line + "\n"))?)
        };
        let deadline = Instant::now() + PREVIEW_TIMEOUT;
        Scanner::connect(&kafka)?.read(&route.topic, &left, deadline, |message| match print(message) {
            Ok(Stdout::Open) => {
                count += 1;
                ControlFlow::Continue(())
            }
            Ok(Stdout::Closed) => {
                stdout = Stdout::Closed;
                ControlFlow::Break(())
            }
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        let what = match stdout {
            Stdout::Open => format!("{count} records would be sent"),
            Stdout::Closed => format!("stdout was closed after {count} of the records that would be sent"),
        };
        note(&format!("{what}; nothing was sent and nothing committed"));
        failed.map_or(Ok(()), Err)
    });
    printed.await.unwrap_or(Err(RelayError::Ended))
}

impl Relay {
    pub fn order(&self, sources: &Sources) -> Result<Order, Error> {
        let mut flags = vec![("role".to_owned(), Role::Relay.to_string(), "relay")];
        if let Some(brokers) = given_value(&self.broker) {
            flags.push(("kafka.brokers".to_owned(), brokers, "--broker"));
        }
        if let Some(address) = &self.management {
            flags.push(("management.listen".to_owned(), address.clone(), "--management"));
        }
        let loaded = load_with(sources, flags)?;
        let any_management_port = !loaded.sources.contains_key("management.listen");
        let route = self.route()?;
        Ok(Order { loaded, route, public_only: self.public_only, any_management_port })
    }

    /// Returns the records that the topic has now. Fails if Kafka does not answer, the route is
    /// invalid, or the topic does not exist.
    async fn spans(
        &self,
        loaded: &Loaded<Settings>,
        route: &Config,
        access: Access,
    ) -> Result<Vec<scan::Span>, RelayError> {
        Route::check(route, access)?;
        let wait = given_value(&self.wait).map_or(KafkaWait::default(), |span| KafkaWait::new(span.0));
        wait.check(loaded).await?;
        let (kafka, topic) = (loaded.settings.kafka.clone(), route.topic.clone());
        let found = tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + LOOKUP_TIMEOUT;
            Scanner::connect(&kafka)?.spans(&topic, deadline)?.ok_or(RelayError::NoTopic(topic))
        });
        found.await.unwrap_or(Err(RelayError::Ended))
    }

    fn route(&self) -> Result<Config, MissingFlag> {
        let need = |given, flag, variable| given_value(given).ok_or(MissingFlag { flag, variable });
        let topic: String = need(&self.topic, "--topic", "TOPIC")?;
        let target_url: String = need(&self.target_url, "--target-url", "TARGET_URL")?;
        let defaults = Config::default();
        let ms = |given: &Option<Given<Span>>, default| {
            given_value(given).map_or(default, |span| u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX))
        };
        let headers: Secrets =
            self.header.iter().map(|(name, value)| (name.clone(), Secret::new(value.clone()))).collect();
        Ok(Config {
            name: topic.chars().take(100).collect(),
            topic,
            target_url: SecretUrl::new(target_url),
            group: given_value(&self.group).unwrap_or_else(|| GROUP.to_owned()),
            workers: given_value(&self.workers).unwrap_or(defaults.workers),
            rate: given_value(&self.rate).unwrap_or(defaults.rate),
            timeout_ms: ms(&self.timeout, defaults.timeout_ms),
            retries: given_value(&self.retries).unwrap_or(defaults.retries),
            retry_delay_ms: ms(&self.retry_delay, defaults.retry_delay_ms),
            backoff: self.backoff.unwrap_or(defaults.backoff),
            max_retry_delay_ms: ms(&self.max_retry_delay, defaults.max_retry_delay_ms),
            jitter: self.jitter.unwrap_or(defaults.jitter),
            honour_retry_after: !self.ignore_retry_after,
            allow: Vec::new(),
            ca_file: self.ca_file.as_ref().map(|file| file.display().to_string()).unwrap_or_default(),
            headers,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, single_dash::with_two_dashes};

    fn parse(arguments: &[&str]) -> Relay {
        let arguments = ["postrider"].iter().chain(arguments).map(|argument| OsString::from(*argument));
        match Cli::try_parse_from(with_two_dashes(arguments)).unwrap().command {
            Command::Relay(relay) => *relay,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn flags_may_have_one_dash_or_two() {
        for arguments in [
            ["relay", "--topic", "t", "--target-url=http://a/-topic", "--retry-delay", "500ms"],
            ["relay", "-topic", "t", "-target-url=http://a/-topic", "-retry-delay", "500ms"],
        ] {
            let route = parse(&arguments).route().unwrap();
            assert_eq!((route.topic.as_str(), route.target_url.expose()), ("t", "http://a/-topic"));
            assert_eq!(route.retry_delay_ms, 500);
        }
    }

    #[test]
    fn flags_default_to_the_documented_values() {
        let route = parse(&["relay", "--topic", "t", "--target-url", "http://a"]).route().unwrap();
        assert_eq!((route.group.as_str(), route.workers, route.rate), ("http-consumer", 5, 10.0));
        assert_eq!((route.timeout_ms, route.retries, route.retry_delay_ms), (30_000, 3, 1_000));
        assert_eq!((route.backoff, route.jitter, route.honour_retry_after), (Growth::Fixed, Jitter::None, true));
    }

    #[test]
    fn a_missing_flag_is_named_with_its_variable() {
        let error = parse(&["relay", "--topic", "", "--target-url", "http://a"]).route().unwrap_err().to_string();
        assert!(error.contains("--topic") && error.contains("TOPIC"), "{error}");
    }
}
