//! Presence: which receivers are connected to any process, readable by id and published as events
//! on the topic `presence`.
//!
//! Every process registers its connections in Redis (`register`) under a lease. When the lease
//! expires or the process leaves, another process ends its connections (`takeover`). Redis may lose
//! everything: processes detect that and register again. Until they have had time to do so, a
//! receiver that may be connected is not reported as disconnected. Afterwards one process compares
//! Redis with the events that were published (`reconcile`).

mod announce;
mod config;
mod http;
mod keys;
mod local_connections;
mod reconcile;
mod register;
mod script;
mod scripts;
mod takeover;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex as SyncMutex;
use postrider_kafka::{self as kafka, Producer, TopicSpec, TopicsReady};
use postrider_redis::Redis;
use postrider_telemetry::unknown::Unknown;
use tokio::sync::{Mutex, watch};

use self::{
    announce::Announcer,
    keys::{Bucket, Keys},
    local_connections::LocalConnections,
    register::{Register, Trouble},
    script::Calls,
    scripts::Scripts,
    takeover::Watchman,
};
pub use self::{config::Config, http::routes};

/// Topic of presence events, without the prefix.
pub const TOPIC: &str = "presence";
/// Maximum wait of a query for changes that this process has not yet written to Redis.
const WRITTEN_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum time for the last writes of a process; what remains is ended like that of a killed
/// process.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(4);

/// Returns the presence topic, if presence is enabled.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    let spec = TopicSpec {
        name: kafka.topic(TOPIC),
        partitions: config.partitions,
        settings: vec![
            setting("cleanup.policy", "delete"),
            setting("message.timestamp.type", "LogAppendTime"),
            setting("retention.ms", &config.topic_retention_ms.to_string()),
        ],
        required: Vec::new(),
        remedy: "set `messages.presence.partitions` to the partition count of the topic".to_owned(),
    };
    config.enabled.then_some(spec).into_iter().collect()
}

/// Presence in one process. Cheap to clone.
#[derive(Clone)]
pub struct Presence {
    shared: Arc<Shared>,
    kafka: Arc<kafka::Config>,
    register: Arc<Mutex<Register>>,
}

/// State shared by the parts of presence.
struct Shared {
    config: Config,
    keys: Keys,
    scripts: Scripts,
    redis: watch::Receiver<Option<Redis>>,
    local: LocalConnections,
    announcer: Announcer,
    /// Buckets to be reconciled with the topic, with their creation times.
    doubtful: SyncMutex<Vec<(Bucket, i64)>>,
}

impl Shared {
    fn calls(&self) -> Result<Calls<'_>, Trouble> {
        let redis = self.redis.borrow().clone().ok_or(Trouble::Absent)?;
        Ok(Calls { scripts: &self.scripts, keys: &self.keys, redis })
    }
}

/// Result of a presence query.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Known(PresenceState),
    /// Redis has lost data, and some processes may not have registered their connections again.
    Rebuilding,
}

/// Presence of a receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct PresenceState {
    connected: bool,
    connections: i64,
    /// Time since which it is connected, while it is.
    since_ms: Option<i64>,
    /// Time when it was last connected, while it is not.
    last_seen_ms: Option<i64>,
}

impl Presence {
    /// Returns `None` if presence is disabled.
    pub fn new(
        config: &Config,
        key_prefix: &str,
        kafka: &kafka::Config,
        producer: Producer,
        topics_ready: TopicsReady,
        redis: watch::Receiver<Option<Redis>>,
    ) -> Option<Self> {
        let shared = Shared {
            config: config.clone(),
            keys: Keys::new(key_prefix),
            scripts: Scripts::default(),
            redis,
            local: LocalConnections::new(config.linger()),
            announcer: Announcer::new(kafka.topic(TOPIC), producer, topics_ready),
            doubtful: SyncMutex::default(),
        };
        let kafka = Arc::new(kafka.clone());
        config.enabled.then(|| Self { shared: Arc::new(shared), kafka, register: Arc::default() })
    }

    /// Records that a connection of a receiver was opened. Never waits.
    pub fn join(&self, receiver: &Arc<str>) {
        self.shared.local.join(receiver);
    }

    /// Records that a connection of a receiver has ended. Never waits.
    pub fn leave(&self, receiver: &Arc<str>) {
        self.shared.local.leave(receiver);
    }

    /// Writes changes to Redis and events to Kafka; runs forever.
    pub async fn run(&self) {
        let shared = &*self.shared;
        let Shared { scripts, keys, redis, announcer, .. } = shared;
        let (mut register, mut watchman) = (self.register.lock().await, Watchman::default());
        tokio::join!(
            register.run(shared),
            watchman.watch(shared),
            reconcile::run(shared, &self.kafka),
            announcer.run(scripts, keys, redis)
        );
    }

    /// Leaves the registry at the end of the process, after `run` was dropped. Other processes end
    /// its connections after the linger time, unless the receivers have reconnected. Without other
    /// processes it ends them at once.
    pub async fn retire(&self) {
        let shared = &*self.shared;
        let mut register = self.register.lock().await;
        let left = async {
            let last = register.leave(shared).await?;
            let mut calls = shared.calls()?;
            if last {
                takeover::end_all(shared, &mut calls).await?;
            }
            shared.announcer.finish(&mut calls).await;
            Ok::<_, Trouble>(())
        };
        let left = tokio::time::timeout(RETIRE_TIMEOUT, left).await;
        if let Err(error) = left.unwrap_or(Err(Trouble::Absent)) {
            tracing::warn!(
                error = %error,
                process = register.process(),
                "leaving the presence registry failed, the lease will expire"
            );
        }
    }

    /// Returns the presence of a receiver.
    async fn ask(&self, receiver: &str) -> Result<Answer, Trouble> {
        let local = &self.shared.local;
        let written = local.await_told(receiver, WRITTEN_TIMEOUT).await;
        let (now_ms, born_ms, fields) = self.shared.calls()?.ask(Bucket::of(receiver), receiver).await?;
        let state = PresenceState::of(&fields)?;
        let lease_ms = i64::try_from(self.shared.config.whole_lease_ms()).unwrap_or(i64::MAX);
        let settled = written && born_ms > 0 && now_ms - born_ms >= lease_ms;
        let doubtful = !state.connected && (!settled || local.is_connected(receiver));
        Ok(if doubtful { Answer::Rebuilding } else { Answer::Known(state) })
    }
}

/// Parses a receiver's state.
fn is_connected(state: &str) -> Result<bool, Unknown> {
    match state {
        "connected" => Ok(true),
        "disconnected" => Ok(false),
        other => Err(Unknown::new("state of a receiver", other)),
    }
}

impl PresenceState {
    /// Parses a receiver's hash.
    fn of(fields: &[(String, String)]) -> Result<Self, Unknown> {
        let number = |text: &String| text.parse::<i64>().map_err(|_| Unknown::new("number of a receiver", text));
        let mut state = Self::default();
        let (mut since, mut seen) = (None, None);
        for (name, value) in fields {
            match name.as_str() {
                "state" => state.connected = is_connected(value)?,
                "since" => since = Some(number(value)?),
                "seen" => seen = Some(number(value)?).filter(|&ms| ms > 0),
                name if name.starts_with("p:") => state.connections += number(value)?,
                // Ignores fields that a newer version may have added.
                _ => {}
            }
        }
        let (since_ms, last_seen_ms) = if state.connected { (since, None) } else { (None, seen) };
        Ok(Self { since_ms, last_seen_ms, ..state })
    }
}

#[cfg(test)]
mod tests {
    use super::{announce::Change, *};

    #[test]
    fn presence_counts_the_connections_of_all_processes() {
        let read = |fields: &[(&str, &str)]| {
            let fields: Vec<_> = fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            PresenceState::of(&fields)
        };
        let connected =
            [("state", "connected"), ("version", "9"), ("since", "5"), ("seen", "3"), ("p:a", "2"), ("p:b", "1")];
        let state = PresenceState { connected: true, connections: 3, since_ms: Some(5), last_seen_ms: None };
        assert_eq!(read(&connected), Ok(state));
        let disconnected = [("state", "disconnected"), ("version", "9"), ("since", "5"), ("seen", "3")];
        assert_eq!(read(&disconnected), Ok(PresenceState { last_seen_ms: Some(3), ..PresenceState::default() }));
        assert_eq!(read(&[]), Ok(PresenceState::default()));
        let more = [("state", "disconnected"), ("mood", "x")];
        assert_eq!(read(&more), Ok(PresenceState::default()));
    }

    #[test]
    fn an_unknown_state_is_an_error_rather_than_disconnected() {
        for (name, value) in [("state", "away"), ("state", ""), ("p:a", "x"), ("since", ""), ("seen", "y")] {
            assert!(PresenceState::of(&[(name.to_owned(), value.to_owned())]).is_err(), "{name} {value}");
        }
        assert!(
            Change::parse("9 connected 5 1 a b").is_ok_and(|change| change.connected && &*change.receiver == "a b")
        );
        assert!(Change::parse("9 disconnected 5 0 a").is_ok_and(|change| !change.connected));
        for due in ["9 away 5 1 a", "9", "", "x connected 5 1 a", "9 connected 5 1"] {
            assert!(Change::parse(due).is_err(), "{due}");
        }
    }
}
