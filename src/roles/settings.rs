//! The configuration of the platform and every capability under one root.

use std::fmt;

use postrider_auth as auth;
use postrider_comments as comments;
use postrider_dlq as dlq;
use postrider_feed as feed;
use postrider_gateway as gateway;
use postrider_health as ops;
use postrider_http as http;
use postrider_kafka::{self as kafka, TopicSpec};
use postrider_kv as kv;
use postrider_limits::memory;
use postrider_messages as messages;
use postrider_outbox_backlog as outbox;
use postrider_postgres as postgres;
use postrider_process::drain;
use postrider_rate_limit as rate_limit;
use postrider_redis as redis;
use postrider_rotation as rotation;
use postrider_telemetry as telemetry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves HTTP.
    Api,
    /// Projects records from Kafka into Redis and Postgres.
    Processor,
    /// Drains the outbox from Postgres to Kafka, and delivers records to HTTP endpoints.
    Relay,
    /// All roles in one process.
    All,
}

impl Role {
    pub fn serves_api(self) -> bool {
        matches!(self, Self::Api | Self::All)
    }

    pub fn processes(self) -> bool {
        matches!(self, Self::Processor | Self::All)
    }

    pub fn relays(self) -> bool {
        matches!(self, Self::Relay | Self::All)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Api => "api",
            Self::Processor => "processor",
            Self::Relay => "relay",
            Self::All => "all",
        })
    }
}

/// The root of `postrider.yaml`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Role of this process.
    pub role: Role,
    /// Threads of the async runtime; 0 uses the processors available to the container, at least
    /// two.
    #[schemars(range(max = 1_024))]
    pub worker_threads: usize,
    pub http: http::Config,
    pub auth: auth::Config,
    pub limits: rate_limit::Config,
    pub management: ops::Config,
    pub drain: drain::Config,
    pub memory: memory::Config,
    pub kafka: kafka::Config,
    pub redis: redis::Config,
    pub postgres: postgres::Config,
    pub rotation: rotation::Config,
    pub telemetry: telemetry::Config,
    pub kv: kv::Config,
    pub gateway: gateway::Config,
    pub dlq: dlq::Config,
    pub comments: comments::Config,
    pub messages: messages::Config,
    pub feed: feed::Config,
    pub outbox: outbox::Config,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            role: Role::All,
            worker_threads: 0,
            http: http::Config::default(),
            auth: auth::Config::default(),
            limits: rate_limit::Config::default(),
            management: ops::Config::default(),
            drain: drain::Config::default(),
            memory: memory::Config::default(),
            kafka: kafka::Config::default(),
            redis: redis::Config::default(),
            postgres: postgres::Config::default(),
            rotation: rotation::Config::default(),
            telemetry: telemetry::Config::default(),
            kv: kv::Config::default(),
            gateway: gateway::Config::default(),
            dlq: dlq::Config::default(),
            comments: comments::Config::default(),
            messages: messages::Config::default(),
            feed: feed::Config::default(),
            outbox: outbox::Config::default(),
        }
    }
}

/// One of postrider's consumer groups.
#[derive(Debug, Clone)]
pub struct ConsumerPlan {
    pub name: &'static str,
    pub topic: String,
    pub group: String,
    /// True if processes run the consumer only if `postgres.url` is set.
    pub needs_postgres: bool,
}

impl ConsumerPlan {
    /// Returns every consumer group of this configuration, with full names.
    pub fn all(settings: &Settings) -> Vec<Self> {
        let mut all = vec![Self::kv(settings)];
        all.extend([Self::comments(settings), Self::messages(settings), Self::feed(settings)]);
        all.extend(settings.gateway.relays.iter().map(|relay| Self::relay(settings, relay)));
        all
    }

    pub fn kv(settings: &Settings) -> Self {
        Self { needs_postgres: false, ..Self::new("kv", settings, kv::TOPIC, kv::GROUP, settings.kv.epoch) }
    }

    pub fn comments(settings: &Settings) -> Self {
        Self::new("comments", settings, comments::TOPIC, comments::GROUP, settings.comments.epoch)
    }

    pub fn feed(settings: &Settings) -> Self {
        Self::new("feed", settings, feed::TOPIC, feed::GROUP, settings.feed.epoch)
    }

    pub fn messages(settings: &Settings) -> Self {
        let config = &settings.messages;
        Self::new("messages", settings, messages::TOPIC, &config.group, config.epoch)
    }

    pub fn relay(settings: &Settings, relay: &gateway::relay::Config) -> Self {
        Self::of_relay(relay, settings.kafka.group(&relay.group()))
    }

    /// Plans the consumer of a route with a full group name. Leaks the consumer's name, which lives
    /// as long as the process, as routes do.
    pub fn of_relay(relay: &gateway::relay::Config, group: String) -> Self {
        let name = format!("relay-{}", relay.name).leak();
        Self { name, topic: relay.topic.clone(), group, needs_postgres: false }
    }

    /// Appends the epoch to the group name, because the positions of another epoch belong to
    /// another topic.
    fn new(name: &'static str, settings: &Settings, topic: &str, group: &str, epoch: u32) -> Self {
        let group = if epoch == 0 { group.to_owned() } else { format!("{group}-e{epoch}") };
        let (topic, group) = (settings.kafka.topic(topic), settings.kafka.group(&group));
        Self { name, topic, group, needs_postgres: true }
    }
}

/// Plans postrider's own topics.
pub struct TopicPlan;

impl TopicPlan {
    /// Returns every topic that the capabilities need, with its required settings.
    pub fn specs(settings: &Settings) -> Vec<TopicSpec> {
        let mut specs = kv::topic_specs(&settings.kv, &settings.kafka);
        specs.extend(dlq::topic_specs(&settings.dlq, &settings.kafka));
        specs.extend(comments::topic_specs(&settings.comments, &settings.kafka));
        specs.extend(messages::topic_specs(&settings.messages, &settings.kafka));
        specs.extend(feed::topic_specs(&settings.feed, &settings.kafka));
        specs
    }

    /// Returns only the topics that delivery to endpoints needs.
    pub fn deliveries(settings: &Settings) -> Vec<TopicSpec> {
        let deliveries = settings.kafka.topic(dlq::DELIVERIES_TOPIC);
        let specs = dlq::topic_specs(&settings.dlq, &settings.kafka).into_iter();
        specs.filter(|spec| spec.name == deliveries).collect()
    }

    /// Returns the topic names that the gateway refuses unless they are listed.
    pub fn internal_names(settings: &Settings) -> Vec<String> {
        // Reserved names: future topics, and topics that may be switched off.
        const OTHERS: [&str; 3] = [messages::PRESENCE_TOPIC, "deliveries", messages::EVENTS_TOPIC];
        let ours = Self::specs(settings).into_iter().map(|spec| spec.name);
        ours.chain(OTHERS.iter().map(|name| settings.kafka.topic(name))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use figment::{
        Figment,
        providers::{Format, Yaml},
    };
    use serde_json::Value;

    use super::*;

    /// Parses the topics that the chart declares for Strimzi, with the chart's defaults.
    fn declared() -> BTreeMap<String, (i64, BTreeMap<String, String>)> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/postrider/files/topics.yaml");
        let text = std::fs::read_to_string(file).unwrap();
        let topics: Value = Figment::from(Yaml::string(&format!("topics:\n{text}"))).extract().unwrap();
        let one = |topic: &Value| {
            let given = topic["config"].as_object().unwrap().iter();
            let mut settings: BTreeMap<_, _> =
                given.map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect();
            for (name, from) in topic["from"].as_object().into_iter().flatten() {
                let value = from["default"].as_i64().unwrap() + from["plus"].as_i64().unwrap_or(0);
                settings.insert(name.clone(), value.to_string());
            }
            (topic["name"].as_str().unwrap().to_owned(), (topic["partitions"]["default"].as_i64().unwrap(), settings))
        };
        topics["topics"].as_array().unwrap().iter().map(one).collect()
    }

    #[test]
    fn the_chart_declares_topics_as_postrider_creates_them() {
        let created = TopicPlan::specs(&Settings::default()).into_iter().map(|spec| {
            let settings = spec.settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            (spec.name, (i64::from(spec.partitions), settings))
        });
        assert_eq!(declared(), created.collect());
    }
}
