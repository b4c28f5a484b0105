//! Rules of settings that their types and ranges do not express. `postrider config check` and
//! `postrider run` apply them before anything starts.

use std::net::IpAddr;

use postrider_auth::ConfigError;
use postrider_http::{
    client_address::{NoNetwork, Proxies},
    origin::{NotAnOrigin, Origins},
    tls::{Tls, TlsError},
};
use postrider_postgres as postgres;
use postrider_telemetry::{Otlp, OtlpProtocol};
use rdkafka::error::KafkaError;

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
    #[error("`{0}`, which is neither a network such as `10.0.0.0/8` nor an address")]
    NotANetwork(String),
    #[error("`{0}`; names of Kafka have letters, digits, `.`, `_` and `-` only")]
    NotAName(String),
    #[error("not a URL such as http://collector:4317")]
    NotACollector,
    #[error("a URL with https, which needs `telemetry.otlp.protocol=http`")]
    CollectorWithTls,
    #[error("refused by the Kafka library: {0}")]
    KafkaProperty(String),
    #[error("{0}, which is above `gateway.simulator.max_delay_ms` ({1})")]
    AboveMaximum(u64, u64),
    #[error(
        "not set, but the process listens on `{0}`, which others can reach: set `auth.mode=required`, or `off` to let everybody do everything"
    )]
    NoAuthMode(String),
    #[error(
        "not set, but `auth.bootstrap_key` or `auth.token.issuer` is: set `auth.mode=required` to ask for credentials, or `off`"
    )]
    UnusedCredentials,
    #[error(transparent)]
    Auth(#[from] ConfigError),
    #[error(transparent)]
    Origins(#[from] NotAnOrigin),
    #[error("unusable: {0}")]
    Tls(#[from] TlsError),
    #[error("invalid: {0}")]
    Postgres(#[from] postgres::Error),
    #[error("invalid: {0}")]
    Relays(#[from] CheckError),
}

impl Settings {
    /// Returns the first setting that breaks a rule.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.role.serves_api() && self.http.listen.is_empty() {
            return Err(Invalid { key: "http.listen", problem: Rule::NoAddress });
        }
        let is_listener = |address: &str| is_address(address, true);
        check_addresses("http.listen", &self.http.listen, is_listener)?;
        check_addresses("management.listen", &self.management.listen, is_listener)?;
        self.check_auth()?;
        if self.role.serves_api() {
            let origins = Origins::new(&self.http.cors);
            origins.map_err(|error| Invalid { key: "http.cors.origins", problem: error.into() })?;
            Tls::open(&self.http.tls).map_err(|error| Invalid { key: "http.tls", problem: error.into() })?;
        }
        let brokers = &self.kafka.brokers;
        let overridden = ["bootstrap.servers", "metadata.broker.list"];
        if brokers.is_empty() && !overridden.iter().any(|name| self.kafka.properties.contains_key(*name)) {
            return Err(Invalid { key: "kafka.brokers", problem: Rule::NoAddress });
        }
        check_addresses("kafka.brokers", brokers, is_broker)?;
        self.check_kafka()?;
        if self.role.serves_api()
            && let Err(NoNetwork(network)) = Proxies::new(&self.http)
        {
            return Err(Invalid { key: "http.trusted_proxies", problem: Rule::NotANetwork(network) });
        }
        check_collector(&self.telemetry.otlp).map_err(|problem| Invalid { key: "telemetry.otlp.endpoint", problem })?;
        let (least, most) = (self.gateway.simulator.min_delay_ms, self.gateway.simulator.max_delay_ms);
        if self.role.serves_api() && self.gateway.simulator.enabled && least > most {
            return Err(Invalid { key: "gateway.simulator.min_delay_ms", problem: Rule::AboveMaximum(least, most) });
        }
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
        if self.role.relays() {
            let relays = relay::check(&self.gateway.relays);
            relays.map_err(|error| Invalid { key: "gateway.relays", problem: error.into() })?;
        }
        Ok(())
    }

    /// Checks that nobody serves the network without having decided who may use it.
    fn check_auth(&self) -> Result<(), Invalid> {
        if !self.role.serves_api() {
            return Ok(());
        }
        let is_set = !self.auth.bootstrap_key.is_empty() || !self.auth.token.issuer.is_empty();
        if self.auth.mode.is_none() && is_set {
            return Err(Invalid { key: "auth.mode", problem: Rule::UnusedCredentials });
        }
        let mut listeners = self.http.listen.iter().chain(&self.management.listen);
        if self.auth.mode.is_none()
            && let Some(open) = listeners.find(|address| !is_loopback(address))
        {
            return Err(Invalid { key: "auth.mode", problem: Rule::NoAuthMode(open.clone()) });
        }
        let checked = self.auth.check(!self.postgres.url.is_empty());
        checked.map_err(|(key, problem)| Invalid { key, problem: problem.into() })
    }

    /// Checks names, and the properties of clients as the Kafka library does.
    fn check_kafka(&self) -> Result<(), Invalid> {
        let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !self.kafka.topic_prefix.bytes().all(is_legal) {
            let problem = Rule::NotAName(self.kafka.topic_prefix.clone());
            return Err(Invalid { key: "kafka.topic_prefix", problem });
        }
        match self.kafka.check_properties() {
            Ok(()) => Ok(()),
            Err(KafkaError::ClientConfig(_, problem, name, _)) => {
                let key = match name.as_str() {
                    name if self.kafka.properties.contains_key(name) => "kafka.properties",
                    "compression.type" => "kafka.producer.compression",
                    "sasl.mechanism" => "kafka.sasl.mechanism",
                    "message.max.bytes" => "kafka.producer.max_message_bytes",
                    "queue.buffering.max.messages" => "kafka.producer.max_in_flight_records",
                    "queue.buffering.max.kbytes" => "kafka.producer.max_in_flight_bytes",
                    _ => "kafka.properties",
                };
                Err(Invalid { key, problem: Rule::KafkaProperty(problem) })
            }
            Err(error) => Err(Invalid { key: "kafka.properties", problem: Rule::KafkaProperty(error.to_string()) }),
        }
    }
}

/// Checks the address that traces are sent to; an empty one turns them off.
fn check_collector(otlp: &Otlp) -> Result<(), Rule> {
    if otlp.endpoint.is_empty() {
        return Ok(());
    }
    let url = url::Url::parse(otlp.endpoint.expose()).map_err(|_| Rule::NotACollector)?;
    match (url.scheme(), otlp.protocol) {
        ("http", _) | ("https", OtlpProtocol::Http) | ("unix", OtlpProtocol::Grpc) => Ok(()),
        ("https", OtlpProtocol::Grpc) => Err(Rule::CollectorWithTls),
        _ => Err(Rule::NotACollector),
    }
}

fn check_addresses(key: &'static str, addresses: &[String], is_valid: impl Fn(&str) -> bool) -> Result<(), Invalid> {
    match addresses.iter().find(|address| !is_valid(address)) {
        Some(wrong) => Err(Invalid { key, problem: Rule::NotAnAddress(wrong.clone()) }),
        None => Ok(()),
    }
}

/// Returns whether a text is `host:port`, or `:port` where the host may be left out.
fn is_address(text: &str, may_omit_host: bool) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = if host.is_empty() { may_omit_host } else { !host.contains(char::is_whitespace) };
    is_host && port.parse::<u16>().is_ok()
}

/// Returns whether only this machine reaches an address `host:port`.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Returns whether a text can name a broker: `host:port`, as documented, or what the Kafka library
/// also reads: without a port, after `PROTOCOL://`, or several brokers between commas.
fn is_broker(text: &str) -> bool {
    text.split(',').all(|one| {
        let one = one.split_once("://").map_or(one, |(_, address)| address).trim();
        let is_host = !one.is_empty() && !one.starts_with(':') && !one.contains(char::is_whitespace);
        let port = if one.ends_with(']') { None } else { one.rsplit_once(':').map(|(_, port)| port) };
        is_host && port.is_none_or(|port| port.parse::<u16>().is_ok())
    })
}

#[cfg(test)]
mod tests {
    use postrider_auth::Mode;

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
        for broker in ["kafka:9092", "SASL_SSL://kafka:9092", "kafka", "[::1]", "[::1]:9092", "a:1,b"] {
            assert!(is_broker(broker), "{broker}");
        }
        for broker in [":9092", "", "a b", "kafka:x", "a:1,,b:2"] {
            assert!(!is_broker(broker), "{broker}");
        }
    }

    #[test]
    fn an_address_that_others_reach_needs_a_decision_about_authentication() {
        let with = |http: &str, management: &str, mode| {
            let mut settings = Settings::default();
            settings.http.listen = vec!["127.0.0.1:0".to_owned(), http.to_owned()];
            settings.management.listen = vec![management.to_owned()];
            settings.auth.mode = mode;
            settings.postgres.url = postrider_config::SecretUrl::new("postgres://localhost/x");
            checked(&settings)
        };
        for address in ["127.0.0.1:1", "127.1.2.3:1", "localhost:1", "[::1]:1"] {
            assert_eq!(with(address, address, None), "valid", "{address}");
        }
        for address in ["0.0.0.0:1", ":1", "[::]:1", "10.0.0.7:1", "[::ffff:10.0.0.7]:1", "myhost:1"] {
            for found in [with(address, "127.0.0.1:1", None), with("127.0.0.1:1", address, None)] {
                assert!(found.starts_with("auth.mode not set, but the process listens on"), "{found}");
            }
            for mode in [Mode::Off, Mode::Required] {
                assert_eq!(with(address, address, Some(mode)), "valid", "{address}");
            }
        }
    }

    #[test]
    fn credentials_that_nobody_asks_for_are_refused() {
        let mut settings = Settings::default();
        settings.auth.bootstrap_key = postrider_config::Secret::new("b".repeat(40));
        assert!(
            checked(&settings).starts_with("auth.mode not set, but `auth.bootstrap_key`"),
            "{}",
            checked(&settings)
        );
        settings.auth.mode = Some(Mode::Off);
        assert_eq!(checked(&settings), "valid");
    }

    #[test]
    fn settings_that_a_role_does_not_use_are_not_refused() {
        let mut settings = Settings { role: crate::roles::Role::Processor, ..Settings::default() };
        settings.http.listen.clear();
        settings.management.listen.clear();
        settings.gateway.relays = vec![postrider_gateway::relay::Config::default()];
        settings.kafka.brokers.clear();
        settings.kafka.properties = [("bootstrap.servers".to_owned(), "kafka".to_owned())].into_iter().collect();
        assert_eq!(checked(&settings), "valid");
    }

    #[test]
    fn each_rule_names_its_key() {
        let mut settings = Settings::default();
        settings.http.listen = vec!["abc".to_owned()];
        assert_eq!(checked(&settings), "http.listen `abc`, which is not an address `host:port`");
        let mut settings = Settings::default();
        settings.kafka.brokers.clear();
        assert_eq!(checked(&settings), "kafka.brokers empty, but needs at least one address `host:port`");
        for (key, value) in [("foo", "1"), ("socket.keepalive.enable", "maybe"), ("statistics.interval.ms", "-7")] {
            let mut settings = Settings::default();
            settings.kafka.properties = [(key.to_owned(), value.to_owned())].into_iter().collect();
            let found = checked(&settings);
            assert!(
                found.starts_with("kafka.properties refused by the Kafka library: ") && found.contains(key),
                "{found}"
            );
        }
        let changed = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            checked(&settings)
        };
        let found = changed(&|settings| settings.kafka.producer.compression = "brotli".to_owned());
        assert!(found.starts_with("kafka.producer.compression refused by") && found.contains("brotli"), "{found}");
        let found = changed(&|settings| settings.kafka.topic_prefix = "bad prefix/".to_owned());
        assert!(found.starts_with("kafka.topic_prefix `bad prefix/`; names of Kafka"), "{found}");
        let found = changed(&|settings| settings.http.trusted_proxies = vec!["10.0.0.0/99".to_owned()]);
        assert!(found.starts_with("http.trusted_proxies `10.0.0.0/99`, which is neither"), "{found}");
        let found = changed(&|settings| settings.telemetry.otlp.endpoint = postrider_config::SecretUrl::new("foo"));
        assert!(found.starts_with("telemetry.otlp.endpoint not a URL such as"), "{found}");
        let collector = postrider_config::SecretUrl::new("https://collector:4317");
        let found = changed(&|settings| settings.telemetry.otlp.endpoint = collector.clone());
        assert!(found.starts_with("telemetry.otlp.endpoint a URL with https"), "{found}");
        let found = changed(&|settings| {
            settings.telemetry.otlp.endpoint = collector.clone();
            settings.telemetry.otlp.protocol = OtlpProtocol::Http;
        });
        assert_eq!(found, "valid");
        let found = changed(&|settings| settings.postgres.url = postrider_config::SecretUrl::new("mysql://x"));
        assert!(found.starts_with("postgres.url invalid: `postgres.url` is not a Postgres URL"), "{found}");
        let found = changed(&|settings| {
            (settings.gateway.simulator.enabled, settings.gateway.simulator.min_delay_ms) = (true, 5_000);
        });
        assert!(found.starts_with("gateway.simulator.min_delay_ms 5000, which is above"), "{found}");
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
