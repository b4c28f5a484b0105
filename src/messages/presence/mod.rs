//! Presence: who is connected to any process, asked by id and told by events on the topic `presence`.
//!
//! Every process says in Redis who is connected to it (`register`), under a lease; when the lease ends, or the
//! process leaves, others end what it had (`takeover`). Redis may lose everything: processes notice and say it again,
//! and until they have had the time, nobody is said to be away who may not be.

mod announce;
mod config;
mod http;
mod keys;
mod local_connections;
mod register;
mod script;
mod takeover;

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, watch};

use self::{
    announce::Announcer,
    keys::{Bucket, Keys},
    local_connections::LocalConnections,
    register::{Register, Trouble},
    script::{Calls, Scripts},
    takeover::Watchman,
};
pub use self::{config::Config, http::routes};
use crate::platform::{
    kafka::{self, Producer, TopicSpec, TopicsReady},
    redis::Redis,
    unknown::Unknown,
};

/// The topic of events, before the prefix.
pub const TOPIC: &str = "presence";
/// How long an answer waits for what this process has not told yet.
const TOLD_PATIENCE: Duration = Duration::from_millis(500);
/// For the last words of a process; what is left then is ended like that of one that was killed.
const RETIRE_PATIENCE: Duration = Duration::from_secs(4);

/// The topic, where presence is kept.
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
        remedy: "set `messages.presence.partitions` to what the topic has".to_owned(),
    };
    config.enabled.then_some(spec).into_iter().collect()
}

/// Presence in one process. Cheap to clone.
#[derive(Clone)]
pub struct Presence {
    shared: Arc<Shared>,
    register: Arc<Mutex<Register>>,
}

/// What its parts have in common.
struct Shared {
    config: Config,
    keys: Keys,
    scripts: Scripts,
    redis: watch::Receiver<Option<Redis>>,
    local: LocalConnections,
    announcer: Announcer,
}

impl Shared {
    fn calls(&self) -> Result<Calls<'_>, Trouble> {
        let redis = self.redis.borrow().clone().ok_or(Trouble::Absent)?;
        Ok(Calls { scripts: &self.scripts, keys: &self.keys, redis })
    }
}

/// What is said of a receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Known(PresenceState),
    /// Redis has lost data, and not everybody has had the time to say again who is connected.
    Rebuilding,
}

/// Where a receiver stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct PresenceState {
    connected: bool,
    connections: i64,
    /// While it is connected, since when.
    since_ms: Option<i64>,
    /// While it is not, when it was seen last.
    last_seen_ms: Option<i64>,
}

impl Presence {
    /// `None` where it is not kept.
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
        };
        config.enabled.then(|| Self { shared: Arc::new(shared), register: Arc::default() })
    }

    /// A connection of a receiver was opened. Never waits.
    pub fn join(&self, receiver: &Arc<str>) {
        self.shared.local.join(receiver);
    }

    /// A connection of a receiver has ended. Never waits.
    pub fn leave(&self, receiver: &Arc<str>) {
        self.shared.local.leave(receiver);
    }

    /// Keeps Redis and Kafka told; never ends by itself.
    pub async fn run(&self) {
        let Shared { scripts, keys, redis, announcer, .. } = &*self.shared;
        let (mut register, mut watchman) = (self.register.lock().await, Watchman::default());
        tokio::join!(register.run(&self.shared), watchman.watch(&self.shared), announcer.run(scripts, keys, redis));
    }

    /// Leaves at the end of the process, after `run` was dropped. What it has is ended by others after the linger,
    /// unless it has come back by then; where there are no others, at once.
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
        let left = tokio::time::timeout(RETIRE_PATIENCE, left).await;
        if let Err(error) = left.unwrap_or(Err(Trouble::Absent)) {
            tracing::warn!(error = %error, process = register.process(), "presence could not be told the end; its lease ends by itself");
        }
    }

    /// Where a receiver stands.
    async fn ask(&self, receiver: &str) -> Result<Answer, Trouble> {
        let local = &self.shared.local;
        let told = local.await_told(receiver, TOLD_PATIENCE).await;
        let (now_ms, born_ms, fields) = self.shared.calls()?.ask(Bucket::of(receiver), receiver).await?;
        let state = PresenceState::of(&fields)?;
        let lease_ms = i64::try_from(self.shared.config.whole_lease_ms()).unwrap_or(i64::MAX);
        let settled = told && born_ms > 0 && now_ms - born_ms >= lease_ms;
        let doubtful = !state.connected && (!settled || local.is_connected(receiver));
        Ok(if doubtful { Answer::Rebuilding } else { Answer::Known(state) })
    }
}

/// Reads a receiver's state.
fn is_connected(state: &str) -> Result<bool, Unknown> {
    match state {
        "connected" => Ok(true),
        "disconnected" => Ok(false),
        other => Err(Unknown::new("state of a receiver", other)),
    }
}

impl PresenceState {
    /// Reads a receiver's hash.
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
                // A field that a newer version has added says nothing about these.
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
    fn a_standing_counts_the_connections_of_all_processes() {
        let read = |fields: &[(&str, &str)]| {
            let fields: Vec<_> = fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            PresenceState::of(&fields)
        };
        let connected =
            [("state", "connected"), ("version", "9"), ("since", "5"), ("seen", "3"), ("p:a", "2"), ("p:b", "1")];
        let state = PresenceState { connected: true, connections: 3, since_ms: Some(5), last_seen_ms: None };
        assert_eq!(read(&connected), Ok(state));
        let gone = [("state", "disconnected"), ("version", "9"), ("since", "5"), ("seen", "3")];
        assert_eq!(read(&gone), Ok(PresenceState { last_seen_ms: Some(3), ..PresenceState::default() }));
        assert_eq!(read(&[]), Ok(PresenceState::default()));
        let more = [("state", "disconnected"), ("mood", "x")];
        assert_eq!(read(&more), Ok(PresenceState::default()));
    }

    #[test]
    fn a_state_that_is_unknown_is_an_error_and_not_disconnected() {
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
