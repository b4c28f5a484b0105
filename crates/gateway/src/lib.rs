//! HTTP to Kafka: produces one record, a batch or a stream, and answers each record with its
//! partition and offset or its error. A success answer means that Kafka has stored the record on
//! all in-sync replicas. Kafka to HTTP is in [`relay`].

mod answer;
pub mod codes;
mod config;
mod described;
mod http;
mod model;
pub mod relay;
mod simulator;
mod stream;
mod topics;

pub use config::{Config, Simulator, TopicRules};
pub use http::{routes, short_cuts};

use std::sync::Arc;

use postrider_http::Config as HttpConfig;
use postrider_kafka::{Admin, Broker, CallersProducer};

/// The gateway capability, built by the api role. Cheap to clone.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    producer: CallersProducer,
    topics: topics::Topics,
    config: Config,
    http: HttpConfig,
}

impl Gateway {
    /// `internal` are the full names of postrider's own topics; the gateway refuses them unless
    /// `topics.allow` lists them.
    pub fn new(
        config: Config,
        http: HttpConfig,
        producer: CallersProducer,
        broker: Broker,
        admin: Arc<Admin>,
        internal: Vec<String>,
    ) -> Self {
        let topics = topics::Topics::new(&config, broker, admin, internal);
        Self { inner: Arc::new(Inner { producer, topics, config, http }) }
    }
}
