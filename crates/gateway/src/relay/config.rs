//! Settings of one delivery route.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use postrider_config::{SecretUrl, Secrets};
use postrider_time::backoff::{Backoff, Growth, Jitter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::check_topic;

/// Delivers one topic to one URL.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the route in logs and metrics; must be unique.
    pub name: String,
    /// Full name of the topic; `kafka.topic_prefix` is not added.
    pub topic: String,
    /// URL that receives the records by POST, `http://` or `https://`. `target_url_file` names a
    /// file that contains it.
    pub target_url: SecretUrl,
    /// Consumer group, after `kafka.group_prefix`; default: `http-consumer-` and the name.
    pub group: String,
    /// Maximum number of concurrent requests.
    #[schemars(range(min = 1, max = 10_000))]
    pub workers: usize,
    /// Maximum requests per second and instance, including retries; 0 means no limit.
    #[schemars(range(min = 0.0))]
    pub rate: f64,
    /// Timeout of one request, from name resolution to response, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub timeout_ms: u64,
    /// Retries after the first attempt, before the record is dead-lettered.
    pub retries: u32,
    /// Delay before the first retry, in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub retry_delay_ms: u64,
    /// Growth of the delay; `exponential` doubles it with every retry.
    pub backoff: Growth,
    /// Longest delay before a retry, including `Retry-After`, in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub max_retry_delay_ms: u64,
    /// Randomization of the delay; `full` draws from the whole delay, `equal` from its upper half.
    pub jitter: Jitter,
    /// Let a target's `Retry-After` lengthen the delay.
    pub honour_retry_after: bool,
    /// Private networks that may be connected to, such as `10.0.0.0/8`.
    pub allow: Vec<String>,
    /// PEM file with certificate authorities to trust in addition to the system's.
    pub ca_file: String,
    /// Headers of every request, such as `authorization`; each as text or as `{file: /path}`.
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

/// Error of an invalid route.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("relay `{route}`: {problem}")]
pub struct Problem {
    pub route: String,
    pub problem: String,
}

impl Config {
    /// Checks the name, which is used in metric labels, client ids and group names.
    fn is_name(&self) -> bool {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        !self.name.is_empty() && self.name.len() <= 100 && self.name.bytes().all(legal)
    }

    /// Checks every setting.
    pub fn check(&self) -> Result<(), Problem> {
        check_topic(&self.topic).map_err(|problem| self.problem(problem.detail))?;
        let wrong = |problem: &str| Err(self.problem(problem));
        let out_of_range = |problem: &str, found: f64| Err(self.problem(format!("{problem} (got {found})")));
        match () {
            () if !self.is_name() => wrong("`name` must have 1 to 100 letters, digits, `.`, `_` or `-`"),
            () if self.target_url.is_empty() => wrong("`target_url` is missing"),
            () if self.workers == 0 => wrong("`workers` must be at least 1 (got 0)"),
            () if !self.rate.is_finite() || self.rate < 0.0 => out_of_range("`rate` must be 0 or more", self.rate),
            () if self.timeout_ms == 0 => wrong("`timeout_ms` must be at least 1 (got 0)"),
            () => self.allowed().map(drop),
        }
    }

    pub(super) fn problem(&self, problem: impl ToString) -> Problem {
        Problem { route: self.name.clone(), problem: problem.to_string() }
    }

    /// Parses the networks of `allow`; a single address is a network of one.
    pub(super) fn allowed(&self) -> Result<Vec<IpNet>, Problem> {
        let parse = |text: &String| {
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.map_err(|_| self.problem(format!("`{text}` in `allow` is not a network such as 10.0.0.0/8")))
        };
        self.allow.iter().map(parse).collect()
    }

    /// Returns the name of the consumer group, without `kafka.group_prefix`.
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
    fn the_error_names_the_invalid_field() {
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
    fn a_single_address_is_a_network_of_one() {
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
