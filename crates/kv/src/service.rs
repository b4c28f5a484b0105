//! The key-value capability in the api role: writes pushes to the topic and reads from Redis.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use postrider_http::{Code, Config as HttpConfig, Problem, RequestContext};
use postrider_kafka::{self as kafka, Outgoing, Position, Producer, TopicsReady, event::Event, partition_of};
use postrider_process::drain::{self, PartError};
use postrider_redis::{Config as RedisConfig, Redis};
use postrider_time::clock;
use rdkafka::message::{Header, OwnedHeaders};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    AUDIT_TOPIC, Config, EXPIRES_HEADER, TOPIC,
    audit::{Audit, Carrying},
    entry::Entry,
    ids::Ids,
    keys::{Keys, MARKER_FIELD},
    lookup::{Asking, Lookups},
};
use crate::codes;

/// Interval between checks while a request waits for a write to become visible.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// The key-value capability in the api role. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub config: Config,
    pub http: HttpConfig,
    pub audit: Audit,
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    lookups: Lookups,
    ids: Arc<Ids>,
    /// Furthest marker seen, by partition: a view with an older one has lost data.
    seen: Vec<AtomicI64>,
}

/// Background tasks of the routes, owned by the role.
pub struct Background {
    asking: Asking,
    carrying: Carrying,
}

impl Background {
    /// Runs until the routes are dropped. Tasks that do not finish within `grace` after the stop
    /// are aborted.
    pub async fn run(self, stop: CancellationToken, grace: Duration) -> Result<(), PartError> {
        let mut tasks = JoinSet::new();
        tasks.spawn(self.asking.until_closed());
        tasks.spawn(self.carrying.until_closed());
        drain::until_done(tasks, stop, grace).await
    }
}

/// State of a key in the view.
pub(super) enum Lookup {
    Found(Vec<u8>),
    Absent,
    /// The view is incomplete, so the state is unknown.
    Incomplete(String),
}

impl Service {
    pub fn new(
        config: Config,
        http: HttpConfig,
        kafka: &kafka::Config,
        redis_config: &RedisConfig,
        producer: Producer,
        topics_ready: TopicsReady,
        redis: tokio::sync::watch::Receiver<Option<Redis>>,
    ) -> (Self, Background) {
        let keys = |partition| Keys::new(&redis_config.key_prefix, config.epoch, partition);
        let keys: Vec<Keys> = (0..config.partitions).map(keys).collect();
        let ids = Ids::new(config.max_idempotency_ids, keys.clone(), redis.clone());
        let (lookups, asking) = Lookups::new(keys, redis);
        let seen = (0..config.partitions).map(|_| AtomicI64::new(-1)).collect();
        let (audit, carrying) =
            Audit::new(config.audit, kafka.topic(AUDIT_TOPIC), producer.clone(), topics_ready.clone());
        let topic = kafka.topic(TOPIC);
        let inner = Inner { audit, topic, producer, topics_ready, lookups, ids, seen, config, http };
        (Self { inner: Arc::new(inner) }, Background { asking, carrying })
    }

    /// Returns the limit on idempotent writes; see [`Ids::watch`].
    pub fn ids(&self) -> Arc<Ids> {
        self.inner.ids.clone()
    }

    /// Writes a push, or a tombstone if `value` is `None`, and returns its position.
    pub(super) async fn write(
        &self,
        context: &RequestContext,
        route: &str,
        key: &str,
        value: Option<&[u8]>,
        ttl_seconds: Option<u64>,
    ) -> Result<Position, Problem> {
        let inner = &*self.inner;
        if !inner.topics_ready.get() {
            let detail =
                "the topics are not ready: they were not checked yet, or are not as they must be (see readiness)";
            return Err(Problem::new(Code::KAFKA_UNAVAILABLE, detail));
        }
        let kind = if value.is_some() { "postrider.kv.pushed" } else { "postrider.kv.deleted" };
        let ttl = ttl_seconds.unwrap_or(0).to_be_bytes();
        let id = context.event_id(route, None, &[key.as_bytes(), value.unwrap_or_default(), &ttl])?;
        let event = Event { id, kind, source: "/kv", trace: context.trace };
        let mut headers: OwnedHeaders = event.headers(1);
        if let Some(seconds) = ttl_seconds {
            let expires_ms = clock::now_ms().saturating_add_unsigned(seconds.saturating_mul(1_000));
            headers = headers.insert(Header { key: EXPIRES_HEADER, value: Some(&expires_ms.to_string()) });
        }
        let partition = partition_of(key.as_bytes(), inner.config.partitions);
        let _admitted = match context.has_idempotency_key() {
            true => Some(inner.ids.admit(partition, key.as_bytes(), id).await?),
            false => None,
        };
        let record = Outgoing {
            topic: &inner.topic,
            partition: Some(partition),
            key: Some(key.as_bytes()),
            payload: value,
            headers: Some(headers),
            ..Outgoing::default()
        };
        let stored = inner.producer.store(record).await?;
        inner.ids.note_written(stored.partition, stored.offset);
        Ok(Position {
            topic: inner.topic.clone(),
            partition: stored.partition,
            offset: stored.offset,
            epoch: inner.config.epoch,
        })
    }

    /// Waits until the write at this position is visible in the view.
    pub(super) async fn await_visible(&self, after: &Position) -> Result<(), Problem> {
        let inner = &*self.inner;
        let partition = usize::try_from(after.partition).ok().filter(|&number| number < inner.seen.len());
        let known = after.topic == inner.topic && after.epoch == inner.config.epoch;
        let Some(partition) = partition.filter(|_| known) else {
            return Err(Problem::new(
                Code::INVALID_REQUEST,
                format!("`Postrider-After`: `{after}` is not a position of this view"),
            )
            .at_header("Postrider-After"));
        };
        let deadline = Instant::now() + Duration::from_millis(inner.config.visibility_timeout_ms);
        loop {
            if let Ok((Some(marker), _)) = inner.lookups.read(partition, MARKER_FIELD).await
                && marker.next > after.offset
            {
                return Ok(());
            }
            if Instant::now() + CHECK_INTERVAL > deadline {
                let waited = inner.config.visibility_timeout_ms;
                return Err(Problem::new(
                    codes::NOT_YET_VISIBLE,
                    format!("`{after}` was not visible within {waited} ms"),
                ));
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    /// Reads a key and the marker of its partition together.
    pub(super) async fn look_up(&self, key: &str) -> Result<Lookup, Problem> {
        let inner = &*self.inner;
        let partition = partition_of(key.as_bytes(), inner.config.partitions);
        let Some((number, seen)) =
            usize::try_from(partition).ok().and_then(|number| Some((number, inner.seen.get(number)?)))
        else {
            return Err(Problem::new(Code::INTERNAL, "the view has no partitions"));
        };
        let found = inner.lookups.read(number, key).await;
        let (marker, entry) = found.map_err(|detail| Problem::new(Code::REDIS_UNAVAILABLE, detail))?;
        let Some(marker) = marker else {
            return Ok(Lookup::Incomplete(format!("partition {partition} of the view is missing")));
        };
        let seen = seen.fetch_max(marker.next, Ordering::Relaxed);
        if let Some(target) = marker.target {
            return Ok(Lookup::Incomplete(format!("partition {partition} is at offset {} of {target}", marker.next)));
        }
        if marker.next < seen {
            return Ok(Lookup::Incomplete(format!(
                "partition {partition} of the view has lost writes and is being repaired"
            )));
        }
        let entry = match entry.as_deref().map(Entry::decode).transpose() {
            Ok(entry) => entry,
            Err(unknown) => return Ok(Lookup::Incomplete(unknown.to_string())),
        };
        let value = entry.and_then(|entry| entry.live_value(clock::now_ms()).map(<[u8]>::to_vec));
        Ok(value.map_or(Lookup::Absent, Lookup::Found))
    }
}
