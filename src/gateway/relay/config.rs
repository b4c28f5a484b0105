//! Settings of one route from a topic to a URL.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    gateway::model::check_topic,
    platform::{
        backoff::{Backoff, Growth, Jitter},
        config::{SecretUrl, Secrets},
    },
};

/// One topic, carried to one URL.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Names the route in logs and metrics; different for each.
    pub name: String,
    /// The full name of the topic; no prefix is put before it.
    pub topic: String,
    /// Where records are POSTed to, `http://` or `https://`; `target_url_file` names a file that has it.
    pub target_url: SecretUrl,
    /// The consumer group, after `kafka.group_prefix`; without it `http-consumer-` and the name.
    pub group: String,
    /// Requests at the same time.
    pub workers: usize,
    /// Requests per second and instance, retries included; 0 is no limit.
    pub rate: f64,
    /// Time for one request from name to answer, in milliseconds.
    pub timeout_ms: u64,
    /// Further attempts after the first; then the record goes to the dead letters.
    pub retries: u32,
    /// Wait before the first retry, in milliseconds.
    pub retry_delay_ms: u64,
    /// How the wait grows; `exponential` doubles it.
    pub backoff: Growth,
    /// Longest wait before a retry, in milliseconds, `Retry-After` included.
    pub max_retry_delay_ms: u64,
    /// How chance changes the wait; `full` draws from all of it, `equal` from its upper half.
    pub jitter: Jitter,
    /// Whether a target's `Retry-After` can lengthen the wait.
    pub honour_retry_after: bool,
    /// Networks that may be dialled although they are not public, such as `10.0.0.0/8`.
    pub allow: Vec<String>,
    /// PEM file with authorities to trust beside the system's.
    pub ca_file: String,
    /// Sent with every request, such as `authorization`; each as text, or as `{file: /path}`.
    pub headers: Secrets,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            topic: String::new(),
            target_url: SecretUrl::default(),
            group: String::new(),
            workers: 5,
            rate: 10.0,
            timeout_ms: 30_000,
            retries: 3,
            retry_delay_ms: 1_000,
            backoff: Growth::Fixed,
            max_retry_delay_ms: 300_000,
            jitter: Jitter::None,
            honour_retry_after: true,
            allow: Vec::new(),
            ca_file: String::new(),
            headers: Secrets::default(),
        }
    }
}

/// A route that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("relay `{route}`: {problem}")]
pub struct Problem {
    pub route: String,
    pub problem: String,
}

impl Config {
    /// Names end up in labels, client ids and group names.
    fn is_name(&self) -> bool {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        !self.name.is_empty() && self.name.len() <= 100 && self.name.bytes().all(legal)
    }

    /// What is wrong with it, if anything is.
    pub fn check(&self) -> Result<(), Problem> {
        check_topic(&self.topic).map_err(|problem| self.problem(problem.detail))?;
        let wrong = |problem: &str| Err(self.problem(problem));
        match () {
            () if !self.is_name() => wrong("`name` must have 1 to 100 letters, digits, `.`, `_` and `-`"),
            () if self.target_url.is_empty() => wrong("`target_url` is missing"),
            () if self.workers == 0 => wrong("`workers` must be 1 at least"),
            () if !self.rate.is_finite() || self.rate < 0.0 => wrong("`rate` must be 0 or more"),
            () if self.timeout_ms == 0 => wrong("`timeout_ms` must be 1 at least"),
            () => self.allowed().map(drop),
        }
    }

    pub(super) fn problem(&self, problem: impl ToString) -> Problem {
        Problem { route: self.name.clone(), problem: problem.to_string() }
    }

    /// The networks of `allow`; an address alone is a network of one.
    pub(super) fn allowed(&self) -> Result<Vec<IpNet>, Problem> {
        let parse = |text: &String| {
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.map_err(|_| self.problem(format!("`{text}` in `allow` is not a network such as 10.0.0.0/8")))
        };
        self.allow.iter().map(parse).collect()
    }

    /// The consumer group's name, before any prefix.
    pub fn group(&self) -> String {
        if self.group.is_empty() { format!("http-consumer-{}", self.name) } else { self.group.clone() }
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    pub fn max_retry_delay(&self) -> Duration {
        Duration::from_millis(self.max_retry_delay_ms.max(self.retry_delay_ms))
    }

    pub(super) fn backoff(&self) -> Backoff {
        Backoff {
            base: Duration::from_millis(self.retry_delay_ms),
            cap: self.max_retry_delay(),
            growth: self.backoff,
            jitter: self.jitter,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = |text: &str| text.to_owned();
        Config {
            name: text("a"),
            topic: text("t"),
            target_url: SecretUrl::new("http://example.com"),
            ..Config::default()
        }
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        assert_eq!(config().check(), Ok(()));
        type Change = fn(&mut Config);
        let changes: [(&str, Change); 8] = [
            ("name", |config| config.name.clear()),
            ("name", |config| config.name = "a b".to_owned()),
            ("topic", |config| config.topic.clear()),
            ("target_url", |config| config.target_url = SecretUrl::default()),
            ("workers", |config| config.workers = 0),
            ("rate", |config| config.rate = -1.0),
            ("timeout_ms", |config| config.timeout_ms = 0),
            ("allow", |config| config.allow = vec!["10.0.0.0/33".to_owned()]),
        ];
        for (word, change) in changes {
            let mut config = config();
            change(&mut config);
            let problem = config.check().unwrap_err().to_string();
            assert!(problem.contains(word), "{word}: {problem}");
        }
    }

    #[test]
    fn an_address_alone_is_a_network_of_one() {
        let config = Config { allow: vec!["127.0.0.1".to_owned(), "fd00::/8".to_owned()], ..config() };
        let nets: Vec<String> = config.allowed().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["127.0.0.1/32", "fd00::/8"]);
    }

    #[test]
    fn a_delay_above_the_cap_raises_the_cap() {
        let config = Config { retry_delay_ms: 600_000, ..config() };
        assert_eq!(config.backoff().delay(1, 0.0), Duration::from_secs(600));
    }
}
