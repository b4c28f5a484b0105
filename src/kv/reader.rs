//! The api's side of the view: pushes into the topic, reads out of Redis.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::message::{Header, OwnedHeaders};

use super::{
    AUDIT_TOPIC, Config, EXPIRES_HEADER, TOPIC,
    audit::Audit,
    entry::{Entry, Marker},
    keys::{Keys, MARKER_FIELD},
};
use crate::platform::{
    clock,
    http::{Code, Config as HttpConfig, Problem, RequestContext, context::ANONYMOUS},
    kafka::{self, Outgoing, Position, Producer, SendError, TopicsReady, event::Event, partition_of},
    redis::{Config as RedisConfig, Redis},
};

/// How often a wait for a write looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The kv room's part of the api role. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub config: Config,
    pub http: HttpConfig,
    pub audit: Audit,
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    redis: tokio::sync::watch::Receiver<Option<Redis>>,
    partitions: Vec<Place>,
}

/// One partition of the view.
struct Place {
    keys: Keys,
    /// The furthest marker seen: a view that shows an older one went back.
    seen: AtomicI64,
}

/// What the view says of a key.
pub(super) enum Lookup {
    Found(Vec<u8>),
    Absent,
    /// The view is not complete, so nothing can be said.
    Incomplete(String),
}

impl Reader {
    pub fn new(
        config: Config,
        http: HttpConfig,
        kafka: &kafka::Config,
        redis_config: &RedisConfig,
        producer: Producer,
        topics_ready: TopicsReady,
        redis: tokio::sync::watch::Receiver<Option<Redis>>,
    ) -> Self {
        let place = |partition| Place {
            keys: Keys::new(&redis_config.key_prefix, config.epoch, partition),
            seen: AtomicI64::new(-1),
        };
        let partitions = (0..config.partitions).map(place).collect();
        let audit = Audit::new(config.audit, kafka.topic(AUDIT_TOPIC), producer.clone(), topics_ready.clone());
        let topic = kafka.topic(TOPIC);
        let inner = Inner { audit, topic, producer, topics_ready, redis, partitions, config, http };
        Self { inner: Arc::new(inner) }
    }

    /// Writes a push, or with `None` a tombstone, and returns where it is.
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
            return Err(Problem::new(Code::KafkaUnavailable, detail));
        }
        let kind = if value.is_some() { "postrider.kv.pushed" } else { "postrider.kv.deleted" };
        let id = context.event_id(ANONYMOUS, route, None)?;
        let event = Event { id, kind, source: "/kv", trace: context.trace };
        let mut headers: OwnedHeaders = event.headers(1);
        if let Some(seconds) = ttl_seconds {
            let expires_ms = clock::now_ms().saturating_add_unsigned(seconds.saturating_mul(1_000));
            headers = headers.insert(Header { key: EXPIRES_HEADER, value: Some(&expires_ms.to_string()) });
        }
        let partition = partition_of(key.as_bytes(), inner.config.partitions);
        let record = Outgoing {
            topic: &inner.topic,
            partition: Some(partition),
            key: Some(key.as_bytes()),
            payload: value,
            headers: Some(headers),
            timestamp_ms: None,
        };
        let stored = inner.producer.store(record).await.map_err(|error| explain(&error))?;
        Ok(Position {
            topic: inner.topic.clone(),
            partition: stored.partition,
            offset: stored.offset,
            epoch: inner.config.epoch,
        })
    }

    /// Waits until the view has the write at this position.
    pub(super) async fn await_visible(&self, after: &Position) -> Result<(), Problem> {
        let inner = &*self.inner;
        let place = usize::try_from(after.partition).ok().and_then(|number| inner.partitions.get(number));
        let known = after.topic == inner.topic && after.epoch == inner.config.epoch;
        let Some(place) = place.filter(|_| known) else {
            return Err(Problem::new(
                Code::InvalidRequest,
                format!("Postrider-After: `{after}` is not a position of this view"),
            ));
        };
        let deadline = Instant::now() + Duration::from_millis(inner.config.visibility_timeout_ms);
        loop {
            if let Ok((Some(marker), _)) = self.fetch(place, MARKER_FIELD).await
                && marker.next > after.offset
            {
                return Ok(());
            }
            if Instant::now() + LOOK_AGAIN > deadline {
                let waited = inner.config.visibility_timeout_ms;
                return Err(Problem::new(Code::NotYetVisible, format!("`{after}` was not visible within {waited} ms")));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Reads a key and the marker of its partition in one go.
    pub(super) async fn look_up(&self, key: &str) -> Result<Lookup, Problem> {
        let partition = partition_of(key.as_bytes(), self.inner.config.partitions);
        let Some(place) = usize::try_from(partition).ok().and_then(|number| self.inner.partitions.get(number)) else {
            return Err(Problem::new(Code::Internal, "the view has no partitions"));
        };
        let (marker, entry) = self.fetch(place, key).await?;
        let Some(marker) = marker else {
            return Ok(Lookup::Incomplete(format!("partition {partition} of the view is missing")));
        };
        let seen = place.seen.fetch_max(marker.next, Ordering::Relaxed);
        if let Some(target) = marker.target {
            return Ok(Lookup::Incomplete(format!("partition {partition} is at offset {} of {target}", marker.next)));
        }
        if marker.next < seen {
            return Ok(Lookup::Incomplete(format!("partition {partition} of the view went back and is being mended")));
        }
        let value = entry
            .as_deref()
            .and_then(Entry::decode)
            .and_then(|entry| entry.live_value(clock::now_ms()).map(<[u8]>::to_vec));
        Ok(value.map_or(Lookup::Absent, Lookup::Found))
    }

    async fn fetch(&self, place: &Place, key: &str) -> Result<(Option<Marker>, Option<Vec<u8>>), Problem> {
        let unavailable = |detail: String| Problem::new(Code::RedisUnavailable, detail);
        let redis = self.inner.redis.borrow().clone();
        let Some(mut redis) = redis else { return Err(unavailable("Redis is not connected yet".to_owned())) };
        let mut command = redis::cmd("HMGET");
        command.arg(&place.keys.view).arg(MARKER_FIELD).arg(key);
        let (marker, entry): (Option<Vec<u8>>, Option<Vec<u8>>) =
            command.query_async(&mut redis).await.map_err(|error| unavailable(error.to_string()))?;
        Ok((marker.as_deref().and_then(Marker::decode), entry))
    }
}

fn explain(error: &SendError) -> Problem {
    let code = match error {
        SendError::Full => Code::Overloaded,
        SendError::Unavailable | SendError::UnknownTopic(_) | SendError::UnknownPartition => Code::KafkaUnavailable,
        SendError::TooLarge => Code::BodyTooLarge,
        SendError::Unknown => Code::OutcomeUnknown,
        SendError::Rejected(_) => Code::KafkaRejected,
    };
    Problem::new(code, error.to_string())
}
