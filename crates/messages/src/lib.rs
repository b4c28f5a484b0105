//! Messages: delivers every record of the topic `message`, written over HTTP or by any producer, to
//! all open WebSockets and event streams of its receiver, across any number of processes. No
//! stored message is skipped or delivered to another receiver; a record that cannot be stored is
//! dead-lettered. A message sent while its receiver has no
//! connection is delivered on the next connection. Postgres stores messages; Redis notifies the api
//! processes.

mod acks;
mod addresses;
mod append;
pub mod codes;
mod config;
mod cursor;
mod follower;
mod http;
mod hub;
mod item;
mod model;
mod position_lookup;
mod presence;
mod project;
mod publish;
mod receivers;
mod record;
mod send_queue;
mod socket;
mod store;
mod stream;
mod undelivered;
mod unread;
mod upkeep;

pub use config::Config;
pub use http::routes;
pub use presence::{Presence, TOPIC as PRESENCE_TOPIC, routes as presence_routes};
pub use project::Projector;
pub use publish::Publisher;
pub use undelivered::Undelivered;
pub use upkeep::keep as keep_partitions;

use std::{sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use postrider_http::Config as HttpConfig;
use postrider_kafka::{self as kafka, Producer, TopicSpec, TopicsReady, dead_letter};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use self::{acks::Acks, hub::Hub, receivers::Receivers, store::Store};

/// Topic of messages, without the prefix.
pub const TOPIC: &str = "message";
/// Topic of events about messages, without the prefix.
pub const EVENTS_TOPIC: &str = "message-events";

/// Returns the topics of this capability.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    let message = TopicSpec {
        name: kafka.topic(TOPIC),
        partitions: config.partitions,
        settings: vec![
            setting("cleanup.policy", "delete"),
            setting("message.timestamp.type", "LogAppendTime"),
            setting("retention.ms", &config.topic_retention_ms.to_string()),
        ],
        // All records share one key, so compaction would keep only the last of them.
        required: vec![("cleanup.policy", "delete")],
        remedy: "set `messages.partitions` to the partition count of the topic".to_owned(),
    };
    let mut specs = vec![message];
    if config.undelivered_after_ms > 0 {
        let mut events = TopicSpec { name: kafka.topic(EVENTS_TOPIC), ..specs[0].clone() };
        // An event contains its message and further fields.
        let max_bytes = kafka.producer.max_message_bytes.saturating_add(2 * dead_letter::ROOM_BYTES);
        events.settings.push(setting("max.message.bytes", &max_bytes.to_string()));
        specs.push(events);
    }
    specs.extend(presence::topic_specs(&config.presence, kafka));
    specs
}

/// Returns the Redis channel for notices of a receiver's messages.
fn channel(key_prefix: &str, receiver: &str) -> String {
    format!("{key_prefix}messages:to:{receiver}")
}

/// Returns the Redis channel that notifies api processes of messages that were stored but not
/// announced.
fn missed_channel(key_prefix: &str) -> String {
    format!("{key_prefix}messages:missed")
}

/// The messages capability in the api role. Cheap to clone.
#[derive(Clone)]
pub struct Messages {
    inner: Arc<Inner>,
}

struct Inner {
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    http: HttpConfig,
    config: Config,
    /// `None` without Postgres.
    open: Option<Open>,
}

/// Open connections of a process. Cheap to clone.
#[derive(Clone)]
pub struct Open {
    pub hub: Arc<Hub>,
    pub receivers: Arc<Receivers>,
    acks: Arc<Acks>,
}

/// Creates the state that serves open connections, or `None` without a pool.
pub fn connections(
    config: &Config,
    key_prefix: &str,
    pool: Option<PgPool>,
    presence: Option<Presence>,
    stop: CancellationToken,
) -> Option<Open> {
    let store = Store::new(pool?);
    let receivers = Receivers::new(config.max_receivers, store.clone());
    let hub = Hub::new(config.clone(), store, key_prefix.to_owned(), presence, stop);
    Some(Open { hub, receivers, acks: Arc::default() })
}

impl Open {
    /// Stores acknowledgements and presence until the stop, then closes all connections.
    pub async fn run(self, grace: Duration) {
        let store = self.hub.store.clone();
        let presence = self.hub.presence.clone();
        tokio::select! {
            () = self.acks.write_forever(&store) => {}
            () = async { OptionFuture::from(presence.as_ref().map(Presence::run)).await; std::future::pending().await } => {}
            () = self.hub.clone().close_at_stop(grace) => {}
        }
        if let Some(presence) = presence {
            presence.retire().await;
        }
        if let Err(error) = self.acks.write(&store).await {
            tracing::warn!(error = %error, "storing the last acknowledgements failed, messages will be repeated");
        }
    }
}

impl Messages {
    /// Without `open`, messages are accepted but not delivered.
    pub fn new(
        config: Config,
        http: HttpConfig,
        kafka: &kafka::Config,
        producer: Producer,
        topics_ready: TopicsReady,
        open: Option<Open>,
    ) -> Self {
        let topic = kafka.topic(TOPIC);
        Self { inner: Arc::new(Inner { topic, producer, topics_ready, http, config, open }) }
    }

    /// Returns the connection state, whose tasks the caller must run.
    pub fn open(&self) -> Option<&Open> {
        self.inner.open.as_ref()
    }
}
