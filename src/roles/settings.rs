//! The whole configuration: every room's and the platform's, under one root.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    gateway, kv,
    platform::{drain, http, kafka, kafka::TopicSpec, ops, postgres, redis, telemetry},
};

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves HTTP.
    Api,
    /// Carries records from Kafka into views.
    Processor,
    /// Carries what waits in Postgres into Kafka, and records to other people's endpoints.
    Relay,
    /// All of them in one process.
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
    /// What this process does.
    pub role: Role,
    /// Threads of the runtime; 0 takes the processors that the container may use, at least two.
    pub worker_threads: usize,
    pub http: http::Config,
    pub management: ops::Config,
    pub drain: drain::Config,
    pub kafka: kafka::Config,
    pub redis: redis::Config,
    pub postgres: postgres::Config,
    pub telemetry: telemetry::Config,
    pub kv: kv::Config,
    pub gateway: gateway::Config,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            role: Role::All,
            worker_threads: 0,
            http: http::Config::default(),
            management: ops::Config::default(),
            drain: drain::Config::default(),
            kafka: kafka::Config::default(),
            redis: redis::Config::default(),
            postgres: postgres::Config::default(),
            telemetry: telemetry::Config::default(),
            kv: kv::Config::default(),
            gateway: gateway::Config::default(),
        }
    }
}

/// Our own topics.
pub struct TopicPlan;

impl TopicPlan {
    /// Every topic that the rooms need, with what it must be like.
    pub fn specs(settings: &Settings) -> Vec<TopicSpec> {
        kv::topic_specs(&settings.kv, &settings.kafka)
    }

    /// Names that the gateway refuses unless they are listed.
    pub fn internal_names(settings: &Settings) -> Vec<String> {
        const LATER: [&str; 7] =
            ["message", "post-events", "comments", "presence", "dead-letters", "dead-letter-events", "deliveries"];
        let ours = Self::specs(settings).into_iter().map(|spec| spec.name);
        ours.chain(LATER.iter().map(|name| settings.kafka.topic(name))).collect()
    }
}
