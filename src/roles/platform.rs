//! The clients and state that every role shares, and the mission of a process.

use std::sync::{Arc, OnceLock};

use metrics_exporter_prometheus::PrometheusHandle;
use postrider_gateway::relay::{Config, Route};
use postrider_health::Health;
use postrider_kafka::{Admin, Broker, CallersProducer, Producer, TopicsReady, consumer::Consumers, scan::Span};
use postrider_outbox_backlog::Backlog;
use postrider_process::drain::Ending;
use postrider_redis::Redis;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::settings::Settings;

/// Clients and state shared by every role.
pub(super) struct Platform {
    pub settings: Arc<Settings>,
    /// The settings with their sources, as JSON for operators. Secrets are masked.
    pub shown_settings: Arc<str>,
    pub health: Health,
    pub metrics: PrometheusHandle,
    pub broker: Broker,
    pub producer: Producer,
    /// Producer for callers' records; `None` if the role accepts none.
    pub callers_producer: Option<CallersProducer>,
    pub admin: Arc<Admin>,
    pub topics_ready: TopicsReady,
    /// `None` if `postgres.url` is not set; features that need Postgres are disabled.
    pub postgres: Option<PgPool>,
    /// Size of the outbox and its limits.
    pub backlog: Arc<Backlog>,
    /// Stops accepting work and ends loops.
    pub stop: CancellationToken,
    /// Cancelled when there is nothing more to do, which ends the process.
    pub finished: CancellationToken,
}

impl Platform {
    /// Returns the factory of consumers.
    pub fn consumers(&self) -> Consumers {
        let (config, broker) = (self.settings.kafka.clone(), self.broker.clone());
        Consumers { config, broker, health: self.health.clone(), stop: self.stop.clone() }
    }

    /// Returns the shutdown parameters of a server.
    pub fn ending(&self) -> Ending {
        let (died, stop, grace) = (CancellationToken::new(), self.stop.clone(), self.settings.drain.grace());
        Ending { draining: self.health.draining(), died, stop, grace }
    }
}

/// Purpose of a process.
pub(super) enum Mission {
    /// Run the configured role.
    Role,
    /// Deliver one topic to a URL, using only Kafka.
    Relay(Box<RelayCommand>),
}

/// Options of the command `relay`.
#[derive(Clone)]
pub struct RelayCommand {
    pub route: Config,
    /// Refuse targets that are not on the public internet.
    pub public_only: bool,
    /// True if another port may be used when the management port is taken.
    pub any_management_port: bool,
    /// Source of the setting `kafka.brokers`, for an error.
    pub brokers_origin: String,
    /// Offset ranges of the topic: the command ends once its group has committed all of them.
    /// Without them it runs until a signal.
    pub until: Option<Vec<Span>>,
    /// The route, once it has started; its counters are the summary of the command.
    pub started: Arc<OnceLock<Arc<Route>>>,
}

/// Redis connection shared by all capabilities; `None` until the background task has connected.
pub(super) type SharedRedis = tokio::sync::watch::Receiver<Option<Redis>>;
