//! Decides which topics may be written to, and caches whether they exist and their limits.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use postrider_http::{Code, Problem};
use postrider_kafka::{Admin, Broker, TopicError, TopicLimits};
use tokio::sync::{OnceCell, Semaphore};

use super::Config;
use crate::codes;

/// Time for which the existence and settings of a topic are cached.
const CACHE_TTL: Duration = Duration::from_secs(60);
/// Maximum number of cached topics.
const MAX_KNOWN: usize = 10_000;
/// Maximum number of concurrent lookups at the brokers.
const MAX_LOOKUPS: usize = 8;

pub struct Topics {
    allow: Vec<String>,
    internal: HashSet<String>,
    auto_create: bool,
    known: RwLock<HashMap<String, Known>>,
    broker: Broker,
    admin: Arc<Admin>,
    brokers_create: OnceCell<bool>,
    lookups: Semaphore,
}

/// A topic that existed when it was looked up.
struct Known {
    since: Instant,
    limits: TopicLimits,
}

impl Topics {
    pub fn new(config: &Config, broker: Broker, admin: Arc<Admin>, internal: Vec<String>) -> Self {
        Self {
            allow: config.topics.allow.clone(),
            internal: internal.into_iter().collect(),
            auto_create: config.auto_create_topics,
            known: RwLock::default(),
            broker,
            admin,
            brokers_create: OnceCell::new(),
            lookups: Semaphore::new(MAX_LOOKUPS),
        }
    }

    /// Returns 403 unless this topic may be written to.
    pub fn permit(&self, topic: &str) -> Result<(), Problem> {
        if permitted(&self.allow, self.internal.contains(topic), topic) {
            return Ok(());
        }
        Err(Problem::new(
            codes::TOPIC_FORBIDDEN,
            format!("writing to topic `{topic}` is not allowed; see `gateway.topics.allow`"),
        ))
    }

    /// Returns the cached limits of a topic, without a lookup.
    fn known(&self, topic: &str) -> Option<TopicLimits> {
        let known = self.known.read();
        known.get(topic).filter(|known| known.since.elapsed() < CACHE_TTL).map(|known| known.limits)
    }

    /// Returns the limits of a topic. Creates a missing topic if that is allowed, otherwise returns
    /// 404.
    pub async fn limits(&self, topic: &str) -> Result<TopicLimits, Problem> {
        match self.known(topic) {
            Some(limits) => Ok(limits),
            None => self.look_up(topic).await,
        }
    }

    async fn look_up(&self, topic: &str) -> Result<TopicLimits, Problem> {
        if !self.broker.is_up() {
            return Err(Problem::new(Code::KAFKA_UNAVAILABLE, "no broker answers"));
        }
        let lookup_failed = |error: String| {
            self.broker.suspect();
            Problem::new(Code::KAFKA_UNAVAILABLE, format!("looking up the topic failed: {error}"))
        };
        // The semaphore is never closed.
        let Ok(_turn) = self.lookups.acquire().await else { return Ok(TopicLimits::default()) };
        if let Some(limits) = self.known(topic) {
            return Ok(limits);
        }
        if self.broker.partitions(topic).await.map_err(|error| lookup_failed(error.to_string()))?.is_none() {
            self.create(topic).await?;
        }
        let limits = self.admin.limits(topic).await.map_err(|error| lookup_failed(error.to_string()))?;
        let mut known = self.known.write();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(topic.to_owned(), Known { since: Instant::now(), limits });
        Ok(limits)
    }

    /// Drops a topic from the cache, because it turned out not to exist or to have other settings.
    pub fn forget(&self, topic: &str) {
        self.known.write().remove(topic);
    }

    async fn create(&self, topic: &str) -> Result<(), Problem> {
        let unknown = || Problem::new(Code::UNKNOWN_TOPIC, format!("topic `{topic}` does not exist"));
        if !self.auto_create {
            return Err(unknown());
        }
        let allowed =
            self.brokers_create.get_or_try_init(|| async { self.admin.broker_creates_topics().await.ok_or(()) });
        if let Ok(false) = allowed.await {
            return Err(unknown());
        }
        self.admin.create_with_defaults(topic).await.map_err(|error| match error {
            TopicError::Refused(_, code) => unknown().with("reason", code.to_string()),
            other => Problem::new(Code::KAFKA_UNAVAILABLE, other.to_string()),
        })
    }
}

/// Kafka's own topics are never permitted. postrider's own are permitted only by full name. Others
/// are permitted if the list matches or is empty.
fn permitted(allow: &[String], internal: bool, topic: &str) -> bool {
    if topic.starts_with("__") {
        return false;
    }
    let named = allow.iter().any(|rule| rule == topic);
    let matched = allow.iter().any(|rule| rule.strip_suffix('*').is_some_and(|prefix| topic.starts_with(prefix)));
    named || (!internal && (matched || allow.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_topics_need_their_full_name_and_kafka_topics_are_refused() {
        let rules = |list: &[&str]| list.iter().map(|rule| rule.to_string()).collect::<Vec<_>>();
        assert!(permitted(&rules(&[]), false, "orders"));
        assert!(!permitted(&rules(&[]), true, "messages"));
        assert!(!permitted(&rules(&["*"]), true, "messages"), "a wildcard does not match internal topics");
        assert!(permitted(&rules(&["messages"]), true, "messages"));
        assert!(!permitted(&rules(&["__consumer_offsets"]), false, "__consumer_offsets"));
        assert!(permitted(&rules(&["team-*"]), false, "team-a"));
        assert!(!permitted(&rules(&["team-*"]), false, "orders"));
    }
}
