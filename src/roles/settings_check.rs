//! Rules of settings that their types and ranges do not express. `postrider config check` and
//! `postrider run` apply them before anything starts.

use postrider_postgres as postgres;

use super::{
    Settings,
    relay::{self, CheckError},
};

/// A setting that breaks a rule.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub struct Invalid {
    /// Dotted path of the key.
    pub key: &'static str,
    #[source]
    pub problem: Rule,
}

/// The rule that a setting breaks. The text continues a sentence that names the key.
#[derive(Debug, thiserror::Error)]
pub enum Rule {
    #[error("empty, but needs at least one address `host:port`")]
    NoAddress,
    #[error("`{0}`, which is not an address `host:port`")]
    NotAnAddress(String),
    #[error("not a URL of Redis such as redis://127.0.0.1:6379")]
    NotARedisUrl,
    #[error("invalid: {0}")]
    Postgres(#[from] postgres::Error),
    #[error("invalid: {0}")]
    Relays(#[from] CheckError),
}

impl Settings {
    /// Returns the first setting that breaks a rule.
    pub fn check(&self) -> Result<(), Invalid> {
        let listening = [("http.listen", &self.http.listen), ("management.listen", &self.management.listen)];
        for (key, addresses) in listening {
            check_addresses(key, addresses, |address| is_address(address, true))?;
        }
        check_addresses("kafka.brokers", &self.kafka.brokers, is_broker)?;
        if !self.redis.is_valid() {
            return Err(Invalid { key: "redis.url", problem: Rule::NotARedisUrl });
        }
        if !self.postgres.url.is_empty() {
            let checked = postgres::check(&self.postgres);
            checked.map_err(|error| {
                let key = if matches!(error, postgres::Error::BadSchema) { "postgres.schema" } else { "postgres.url" };
                Invalid { key, problem: error.into() }
            })?;
        }
        let relays = relay::check_settings(&self.gateway.relays);
        relays.map_err(|error| Invalid { key: "gateway.relays", problem: error.into() })
    }
}

fn check_addresses(key: &'static str, addresses: &[String], is_valid: impl Fn(&str) -> bool) -> Result<(), Invalid> {
    let problem = match addresses.iter().find(|address| !is_valid(address)) {
        Some(wrong) => Rule::NotAnAddress(wrong.clone()),
        None if addresses.is_empty() => Rule::NoAddress,
        None => return Ok(()),
    };
    Err(Invalid { key, problem })
}

/// Returns whether a text is `host:port`, or `:port` where the host may be left out.
fn is_address(text: &str, may_omit_host: bool) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = if host.is_empty() { may_omit_host } else { !host.contains(char::is_whitespace) };
    is_host && port.parse::<u16>().is_ok()
}

/// Returns whether a text is `host:port` or `PROTOCOL://host:port`, as the Kafka library reads it.
fn is_broker(text: &str) -> bool {
    is_address(text.split_once("://").map_or(text, |(_, address)| address), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(settings: &Settings) -> String {
        settings.check().map_or_else(|invalid| format!("{} {invalid}", invalid.key), |()| "valid".to_owned())
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(checked(&Settings::default()), "valid");
    }

    #[test]
    fn addresses_are_hosts_and_ports() {
        for address in [":8080", "0.0.0.0:0", "localhost:1", "[::1]:8080"] {
            assert!(is_address(address, true), "{address}");
        }
        for address in ["abc", "", "a:b", "a:70000", "a b:1", "8080"] {
            assert!(!is_address(address, true), "{address}");
        }
        assert!(is_broker("kafka:9092") && is_broker("SASL_SSL://kafka:9092"));
        assert!(!is_broker("kafka") && !is_broker(":9092"));
    }

    #[test]
    fn each_rule_names_its_key() {
        let mut settings = Settings::default();
        settings.http.listen = vec!["abc".to_owned()];
        assert_eq!(checked(&settings), "http.listen `abc`, which is not an address `host:port`");
        let mut settings = Settings::default();
        settings.kafka.brokers.clear();
        assert_eq!(checked(&settings), "kafka.brokers empty, but needs at least one address `host:port`");
        let mut settings = Settings::default();
        settings.redis.url = postrider_config::SecretUrl::new("foo");
        assert_eq!(checked(&settings), "redis.url not a URL of Redis such as redis://127.0.0.1:6379");
        let mut settings = Settings::default();
        settings.postgres.url = postrider_config::SecretUrl::new("foo");
        assert!(checked(&settings).starts_with("postgres.url invalid: `postgres.url` is not a Postgres URL"));
        let mut settings = Settings::default();
        settings.gateway.relays = vec![postrider_gateway::relay::Config::default()];
        assert!(checked(&settings).starts_with("gateway.relays invalid: relay"), "{}", checked(&settings));
    }
}
