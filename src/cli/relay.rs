//! `postrider relay`: the arguments, in the spellings of the program that it replaces as well.

use std::{convert::Infallible, ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, CommandFactory};

use super::{Cli, Sources, duration, load_with};
use crate::{
    gateway::relay::Config,
    platform::{
        backoff::{Growth, Jitter},
        config::{Secret, SecretUrl, Secrets},
    },
    roles::{Role, Settings},
};

/// What `--group` is unless it is given.
const GROUP: &str = "http-consumer";

/// Of a flag that is given twice the last counts, as before.
#[derive(Args)]
#[command(args_override_self = true)]
pub struct Relay {
    /// Kafka's bootstrap brokers, separated by commas; without it `kafka.brokers`
    #[arg(long, env = "BROKER", value_name = "HOST:PORT,…")]
    broker: Option<Given<String>>,
    /// The topic to read
    #[arg(long, env = "TOPIC")]
    topic: Option<Given<String>>,
    /// Where its records are POSTed to
    #[arg(long, env = "TARGET_URL", value_name = "URL", hide_env_values = true)]
    target_url: Option<Given<String>>,
    /// The consumer group [default: http-consumer]
    #[arg(long, env = "CONSUMER_GROUP")]
    group: Option<Given<String>>,
    /// Requests at the same time [default: 5]
    #[arg(long, env = "WORKERS", value_name = "COUNT")]
    workers: Option<Given<usize>>,
    /// Requests per second, 0 for no limit [default: 10]
    #[arg(long, env = "RATE_LIMIT", value_name = "PER SECOND")]
    rate: Option<Given<f64>>,
    /// Time for one request [default: 30s]
    #[arg(long, env = "HTTP_TIMEOUT", value_name = "DURATION")]
    timeout: Option<Given<Span>>,
    /// Further attempts after the first; then the record goes to the dead letters [default: 3]
    #[arg(long, env = "RETRY_ATTEMPTS", value_name = "COUNT")]
    retries: Option<Given<u32>>,
    /// Wait before the first retry [default: 1s]
    #[arg(long, env = "RETRY_DELAY", value_name = "DURATION")]
    retry_delay: Option<Given<Span>>,
    /// How the wait grows from retry to retry [default: fixed]
    #[arg(long, value_enum)]
    backoff: Option<Growth>,
    /// Longest wait before a retry, `Retry-After` included [default: 5m]
    #[arg(long, value_name = "DURATION")]
    max_retry_delay: Option<Given<Span>>,
    /// How chance changes the wait [default: none]
    #[arg(long, value_enum)]
    jitter: Option<Jitter>,
    /// Take no notice of a target's `Retry-After`
    #[arg(long)]
    ignore_retry_after: bool,
    /// A header for every request; may be repeated
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(String, String)>,
    /// PEM file with authorities to trust beside the system's
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Refuse targets that are not on the public internet
    #[arg(long)]
    public_only: bool,
    /// Where probes and metrics are served [default: `management.listen`, or the next free port]
    #[arg(long, value_name = "HOST:PORT")]
    management: Option<String>,
}

/// What an argument or variable says. An empty one says nothing, as compose files have it.
#[derive(Debug, Clone)]
struct Given<T>(Option<T>);

impl<T: FromStr> FromStr for Given<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text.is_empty() { Ok(Self(None)) } else { text.parse().map(|value| Self(Some(value))) }
    }
}

/// A duration in any of the spellings that are taken.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        duration::parse(text).map(Self)
    }
}

fn header(text: &str) -> Result<(String, String), Infallible> {
    let (name, value) = text.split_once(':').unwrap_or((text, ""));
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn said<T: Clone>(given: &Option<Given<T>>) -> Option<T> {
    given.as_ref().and_then(|given| given.0.clone())
}

/// What the command line asks for.
pub struct Order {
    pub settings: Settings,
    pub route: Config,
    pub public_only: bool,
    /// Whether another port will do when the management port is taken.
    pub any_management_port: bool,
}

impl Relay {
    pub fn order(&self, sources: &Sources) -> Result<Order, String> {
        let mut flags = vec![("role".to_owned(), Role::Relay.to_string(), "relay")];
        if let Some(brokers) = said(&self.broker) {
            flags.push(("kafka.brokers".to_owned(), brokers, "--broker"));
        }
        if let Some(address) = &self.management {
            flags.push(("management.listen".to_owned(), address.clone(), "--management"));
        }
        let loaded = load_with(sources, flags)?;
        let any_management_port = !loaded.sources.contains_key("management.listen");
        let route = self.route()?;
        Ok(Order { settings: loaded.settings, route, public_only: self.public_only, any_management_port })
    }

    fn route(&self) -> Result<Config, String> {
        let need = |given, flag, variable| {
            said(given).ok_or_else(|| format!("{flag} is missing (or the variable {variable})"))
        };
        let topic: String = need(&self.topic, "--topic", "TOPIC")?;
        let target_url: String = need(&self.target_url, "--target-url", "TARGET_URL")?;
        let defaults = Config::default();
        let ms = |given: &Option<Given<Span>>, default| {
            said(given).map_or(default, |span| u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX))
        };
        let headers: Secrets =
            self.header.iter().map(|(name, value)| (name.clone(), Secret::new(value.clone()))).collect();
        Ok(Config {
            name: topic.chars().take(100).collect(),
            topic,
            target_url: SecretUrl::new(target_url),
            group: said(&self.group).unwrap_or_else(|| GROUP.to_owned()),
            workers: said(&self.workers).unwrap_or(defaults.workers),
            rate: said(&self.rate).unwrap_or(defaults.rate),
            timeout_ms: ms(&self.timeout, defaults.timeout_ms),
            retries: said(&self.retries).unwrap_or(defaults.retries),
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

/// Gives the flags of `relay` their second dash where they have one only, as Go's programs take
/// them: `-broker x`, `-target-url=x`. Arguments of other commands stay as they are.
pub fn with_two_dashes(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.collect();
    let Some(command) = arguments.iter().position(|argument| argument == "relay") else { return arguments };
    let known: Vec<String> = Cli::command()
        .find_subcommand("relay")
        .map(|relay| relay.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).collect())
        .unwrap_or_default();
    for argument in arguments.iter_mut().skip(command + 1) {
        let Some(text) = argument.to_str() else { continue };
        let name = text.strip_prefix('-').map(|rest| rest.split('=').next().unwrap_or(rest));
        if name.is_some_and(|name| known.iter().any(|flag| flag == name)) {
            *argument = format!("-{text}").into();
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Command;

    fn parse(arguments: &[&str]) -> Relay {
        let arguments = ["postrider"].iter().chain(arguments).map(|argument| OsString::from(*argument));
        match Cli::try_parse_from(with_two_dashes(arguments)).unwrap().command {
            Command::Relay(relay) => *relay,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
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
    fn other_commands_and_unknown_flags_keep_their_dashes() {
        let same = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(|argument| OsString::from(*argument)).collect();
            assert_eq!(with_two_dashes(arguments.clone().into_iter()), arguments);
        };
        same(&["postrider", "run", "-topic", "x"]);
        same(&["postrider", "relay", "-h", "-x", "-topics", "---topic", "-"]);
    }

    #[test]
    fn without_flags_the_route_is_as_documented() {
        let route = parse(&["relay", "--topic", "t", "--target-url", "http://a"]).route().unwrap();
        assert_eq!((route.group.as_str(), route.workers, route.rate), ("http-consumer", 5, 10.0));
        assert_eq!((route.timeout_ms, route.retries, route.retry_delay_ms), (30_000, 3, 1_000));
        assert_eq!((route.backoff, route.jitter, route.honour_retry_after), (Growth::Fixed, Jitter::None, true));
    }

    #[test]
    fn headers_are_split_at_their_first_colon() {
        let relay =
            parse(&["relay", "--topic", "t", "--target-url", "http://a", "--header", "X-A: b:c", "--header", "Y:"]);
        let headers = relay.route().unwrap().headers;
        assert_eq!((headers["X-A"].expose(), headers["Y"].expose()), ("b:c", ""));
    }

    #[test]
    fn what_is_missing_is_named_with_its_variable() {
        let error = parse(&["relay", "--topic", "", "--target-url", "http://a"]).route().unwrap_err();
        assert!(error.contains("--topic") && error.contains("TOPIC"), "{error}");
    }
}
