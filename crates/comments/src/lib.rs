//! Comments: a write goes to the topic `comments`, and the projection stores each comment once in
//! Postgres and logs it. Clients read comments as a list or as a live stream.
//!
//! Every comment that Kafka acknowledged is stored, whatever fails in between. A stream resumes
//! from its last position without gaps or duplicates.

mod config;
mod cursor;
mod http;
mod model;
mod project;
mod record;
mod store;
mod stream;
mod tail;

pub use config::Config;
pub use http::routes;
pub use project::Projector;

use std::sync::Arc;

use postrider_http::Config as HttpConfig;
use postrider_kafka::{self as kafka, Producer, TopicSpec, TopicsReady};
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::{store::Store, tail::Tail};

/// The topic of comments, before the prefix.
pub const TOPIC: &str = "comments";
/// The consumer group of the projection, before the prefix.
pub const GROUP: &str = "postrider-comments";

/// Returns the topic of the capability. By default nothing is ever deleted from it, so that the
/// table can be rebuilt.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    vec![TopicSpec {
        name: kafka.topic(TOPIC),
        partitions: config.partitions,
        settings: vec![
            setting("cleanup.policy", "delete"),
            setting("message.timestamp.type", "LogAppendTime"),
            setting("retention.ms", "-1"),
            setting("retention.bytes", "-1"),
        ],
        // Comments on one post share a key, so compaction would keep only the last of them.
        required: vec![("cleanup.policy", "delete")],
        remedy: "set `comments.partitions` to the number of partitions of the topic".to_owned(),
    }]
}

/// Returns the Redis channel on which the projection notifies readers of new comments. The
/// notification carries no data.
pub fn hint_channel(key_prefix: &str) -> String {
    format!("{key_prefix}comments:stored")
}

/// The part of the capability that the api role runs. Cheap to clone.
#[derive(Clone)]
pub struct Comments {
    inner: Arc<Inner>,
}

struct Inner {
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    http: HttpConfig,
    /// Readers of Postgres; `None` without Postgres.
    shelf: Option<Shelf>,
    /// A permit for each live stream.
    streams: Arc<Semaphore>,
    stop: CancellationToken,
    config: Config,
}

struct Shelf {
    store: Store,
    tail: Arc<Tail>,
}

impl Comments {
    /// Without a pool, comments are accepted but neither listed nor streamed.
    pub fn new(
        config: Config,
        http: HttpConfig,
        kafka: &kafka::Config,
        producer: Producer,
        topics_ready: TopicsReady,
        pool: Option<PgPool>,
        stop: CancellationToken,
    ) -> Self {
        let shelf = pool.map(|pool| {
            let store = Store::new(pool);
            Shelf { tail: Tail::new(store.clone(), &config), store }
        });
        let streams = Arc::new(Semaphore::new(config.max_streams.min(Semaphore::MAX_PERMITS)));
        let topic = kafka.topic(TOPIC);
        Self { inner: Arc::new(Inner { topic, producer, topics_ready, http, shelf, streams, stop, config }) }
    }

    /// Returns the reader that polls the table for all streams of this process. The caller runs it,
    /// and wakes it on each notification.
    pub fn tail(&self) -> Option<Arc<Tail>> {
        self.inner.shelf.as_ref().map(|shelf| shelf.tail.clone())
    }
}
