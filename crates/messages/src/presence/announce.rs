//! Publishes presence changes from Redis to Kafka.
//!
//! The script that changes a receiver's state also records the event as due, until Kafka has stored
//! it, because the process that made the change may die before. The event id derives from receiver
//! and version, so consumers can drop duplicates.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use metrics::counter;
use parking_lot::{Mutex, MutexGuard};
use postrider_kafka::{Outgoing, Producer, TopicsReady, event::Event};
use postrider_redis::Redis;
use postrider_telemetry::{trace_context::TraceContext, unknown::Unknown};
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::{
    is_connected,
    keys::{Bucket, Keys},
    script::{Calls, Outcome},
    scripts::Scripts,
};

/// Maximum number of unsent changes in memory. Further changes are only in Redis, until a process
/// finds them due.
const MAX_UNSENT: usize = 10_000;
/// Pause before unsent changes are sent again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Maximum number of changes passed to the producer at a time.
const CHUNK: usize = 500;
/// Namespace of event ids.
const NAMESPACE: Uuid = Uuid::from_u128(0x3e0c_64b1_97d2_5c0a_8f4e_6a1d_20c5_b7f9);

/// A receiver became connected or disconnected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub receiver: Arc<str>,
    pub connected: bool,
    pub connections: i64,
    pub at_ms: i64,
    /// Increases with every change of the receiver.
    pub version: i64,
}

#[derive(Serialize, Deserialize)]
struct Value<'a> {
    #[serde(rename = "receiverId", skip_deserializing)]
    receiver: Cow<'a, str>,
    /// Former name, which all versions write.
    receiver_id: Cow<'a, str>,
    state: Cow<'a, str>,
    connections: i64,
    at: String,
    version: i64,
}

impl Change {
    /// Parses a due event: `VERSION STATE AT CONNECTIONS RECEIVER`.
    pub fn parse(due: &str) -> Result<Self, Unknown> {
        let read = || {
            let mut words = due.splitn(5, ' ');
            let version = words.next()?.parse().ok()?;
            let connected = is_connected(words.next()?).ok()?;
            let (at_ms, connections) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some(Self { receiver: words.next()?.into(), connected, connections, at_ms, version })
        };
        read().ok_or_else(|| Unknown::new("due event of presence", due))
    }

    /// Parses the value of a published event.
    pub fn parse_event(value: &[u8]) -> Result<Self, Unknown> {
        let unknown = || Unknown::new("presence event", String::from_utf8_lossy(value));
        let Value { receiver_id, state, connections, at, version, .. } =
            serde_json::from_slice(value).map_err(|_| unknown())?;
        let at_ms = clock::parse_rfc3339(&at).ok_or_else(unknown)?;
        Ok(Self { receiver: receiver_id.into(), connected: is_connected(&state)?, connections, at_ms, version })
    }

    pub fn state(&self) -> &'static str {
        if self.connected { "connected" } else { "disconnected" }
    }

    fn value(&self) -> String {
        let Self { receiver, connections, at_ms, version, .. } = self;
        let (at, state) = (clock::rfc3339(*at_ms), self.state());
        let (receiver_id, state) = (Cow::Borrowed(&**receiver), Cow::Borrowed(state));
        let value = Value {
            receiver: receiver_id.clone(),
            receiver_id,
            state,
            connections: *connections,
            at,
            version: *version,
        };
        serde_json::to_string(&value).unwrap_or_default()
    }

    fn id(&self) -> Uuid {
        Uuid::new_v5(&NAMESPACE, format!("{} {}", self.version, self.receiver).as_bytes())
    }
}

impl Outcome {
    /// Returns the changes of a receiver to announce after its update at `now_ms`: one that was
    /// missed earlier, and the one that the update has made.
    pub fn changes(self, receiver: &Arc<str>, connections: i64, now_ms: i64) -> impl Iterator<Item = Change> + use<> {
        let made = self.change.map(|connected| {
            let (receiver, connections) = (receiver.clone(), connections.max(0));
            Change { receiver, connected, connections, at_ms: now_ms, version: self.version }
        });
        self.missed.into_iter().chain(made)
    }
}

/// Sends changes to Kafka.
pub struct Announcer {
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    /// Changes that Kafka has not stored yet, by version. Redis has them as well, but may lose
    /// them.
    unsent: Mutex<BTreeMap<(i64, Arc<str>), Change>>,
    added: Notify,
}

impl Announcer {
    pub fn new(topic: String, producer: Producer, topics_ready: TopicsReady) -> Self {
        Self { topic, producer, topics_ready, unsent: Mutex::default(), added: Notify::new() }
    }

    /// Queues changes to be sent.
    pub fn add(&self, changes: impl IntoIterator<Item = Change>) {
        let mut unsent = self.unsent();
        for change in changes {
            if unsent.len() >= MAX_UNSENT {
                tracing::debug!("presence change queue is full, changes wait in Redis");
                break;
            }
            unsent.insert((change.version, change.receiver.clone()), change);
        }
        drop(unsent);
        self.added.notify_one();
    }

    /// Sends changes as they are added, and retries until Kafka has stored them; runs forever.
    pub async fn run(&self, scripts: &Scripts, keys: &Keys, redis: &watch::Receiver<Option<Redis>>) {
        loop {
            let first = self.after(None);
            if first.is_empty() {
                self.added.notified().await;
                continue;
            }
            let connected = redis.borrow().clone();
            let all_sent = match connected {
                Some(redis) => self.announce(&mut Calls { scripts, keys, redis }, &first).await,
                None => false,
            };
            if !all_sent {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Returns true if the topic can be written to.
    pub fn is_ready(&self) -> bool {
        self.topics_ready.get()
    }

    /// Returns the version of the oldest change that Kafka has not stored.
    pub fn oldest_unsent(&self) -> Option<i64> {
        self.unsent().first_key_value().map(|((version, _), _)| *version)
    }

    /// Sends every queued change once.
    pub async fn finish(&self, calls: &mut Calls<'_>) {
        let mut next = self.after(None);
        while let Some(last) = next.last() {
            let last = (last.version, last.receiver.clone());
            self.announce(calls, &next).await;
            next = self.after(Some(last));
        }
    }

    /// Returns the first unsent changes after a version and receiver.
    fn after(&self, last: Option<(i64, Arc<str>)>) -> Vec<Change> {
        let start = last.map_or(Bound::Unbounded, Bound::Excluded);
        self.unsent().range((start, Bound::Unbounded)).take(CHUNK).map(|(_, change)| change.clone()).collect()
    }

    /// Sends changes, waits until Kafka has stored them, and removes them from the due events.
    /// Returns true if Kafka has stored all.
    async fn announce(&self, calls: &mut Calls<'_>, changes: &[Change]) -> bool {
        if !self.topics_ready.get() {
            return false;
        }
        let outcomes = join_all(changes.iter().map(|change| self.store(change))).await;
        let mut stored: HashMap<Bucket, Vec<(&str, i64)>> = HashMap::new();
        for change in changes.iter().zip(&outcomes).filter_map(|(change, is_stored)| is_stored.then_some(change)) {
            self.unsent().remove(&(change.version, change.receiver.clone()));
            stored.entry(Bucket::of(&change.receiver)).or_default().push((&change.receiver, change.version));
        }
        for (bucket, done) in stored {
            if let Err(error) = calls.settle(bucket, &done).await {
                tracing::debug!(error = %error, "removing due presence events failed, they will be sent again");
            }
        }
        outcomes.into_iter().all(|is_stored| is_stored)
    }

    fn unsent(&self) -> MutexGuard<'_, BTreeMap<(i64, Arc<str>), Change>> {
        self.unsent.lock()
    }

    /// Sends a change. Returns true if Kafka has stored it.
    async fn store(&self, change: &Change) -> bool {
        let kind = match change.connected {
            true => "postrider.presence.connected",
            false => "postrider.presence.disconnected",
        };
        let event = Event { id: change.id(), kind, source: "/presence", trace: TraceContext::root() };
        let value = change.value();
        let record = Outgoing {
            topic: &self.topic,
            key: Some(change.receiver.as_bytes()),
            payload: Some(value.as_bytes()),
            headers: Some(event.headers(0)),
            ..Outgoing::default()
        };
        match self.producer.store(record).await {
            Ok(_) => {
                counter!("postrider_presence_events_total", "state" => change.state()).increment(1);
                true
            }
            Err(error) => {
                tracing::debug!(error = %error, "sending a presence change failed, retrying");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_parsed_from_a_due_event_and_keeps_its_id() {
        let change = Change::parse("1763731260000 connected 1763731260001 2 r \"1").unwrap();
        let value = r#"{"receiverId":"r \"1","receiver_id":"r \"1","state":"connected","connections":2,"at":"2025-11-21T13:21:00.001Z","version":1763731260000}"#;
        assert_eq!(change.value(), value);
        assert_eq!(change.id(), change.clone().id());
        assert_ne!(change.id(), Change { version: 1, ..change.clone() }.id());
        assert_ne!(change.id(), Change { receiver: "q".into(), ..change }.id());
        assert!(Change::parse("1 connected x 2 r").is_err());
        assert_eq!(Change::parse_event(value.as_bytes()).unwrap(), change);
        assert!(Change::parse_event(value.replace("connected", "away").as_bytes()).is_err());
    }
}
