//! Client-side caching in Redis: a separate connection, on which the server reports which of the
//! keys that were read over it have changed.
//!
//! The server reports a change before it answers any request sent after the change. So
//! [`Tracking::changes`], called after an answer has arrived, includes all changes made before the
//! request.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, ErrorKind, ProtocolVersion, PushInfo, PushKind, RedisError, Value,
};

use super::{Config, Redis};

/// Maximum number of changed keys that are kept; beyond it, all keys count as changed.
const MAX_WAITING: usize = 100_000;

/// Keys that changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Changes {
    Of(Vec<Vec<u8>>),
    /// Any key may have changed.
    All,
}

/// A connection with client-side caching. The server tracks only keys whose read was preceded by
/// [`next`], until they change.
pub struct Tracking {
    pub redis: Redis,
    changes: Arc<Mutex<Changes>>,
}

/// Returns the command that makes the server track the key of the command after it.
pub fn next() -> redis::Cmd {
    redis::cmd("CLIENT").arg("CACHING").arg("YES").to_owned()
}

impl Tracking {
    /// Connects once; after a break, every request is an error. Fails with a Cluster, and if the
    /// server lacks `CLIENT TRACKING` or does not allow it.
    pub async fn connect(config: &Config) -> Result<Self, RedisError> {
        if config.cluster {
            return Err((ErrorKind::InvalidClientConfig, "client-side caching does not work with a Cluster").into());
        }
        let info: ConnectionInfo = config.first_url()?;
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let changes = Arc::new(Mutex::new(Changes::Of(Vec::new())));
        let noted = changes.clone();
        let options = AsyncConnectionConfig::new()
            .set_response_timeout(Some(Duration::from_millis(config.response_timeout_ms)))
            .set_connection_timeout(Some(Duration::from_millis(config.connect_timeout_ms)))
            .set_push_sender(move |push: PushInfo| {
                noted.lock().note(push);
                Ok::<_, std::convert::Infallible>(())
            });
        let client = Client::open(info.set_redis_settings(settings))?;
        let mut redis = Redis::once(client.get_multiplexed_async_connection_with_config(&options).await?);
        redis::cmd("CLIENT").arg("TRACKING").arg("ON").arg("OPTIN").query_async::<()>(&mut redis).await?;
        Ok(Self { redis, changes })
    }

    /// Returns the keys that have changed since the last call.
    pub fn changes(&self) -> Changes {
        let mut changes = self.changes.lock();
        std::mem::replace(&mut *changes, Changes::Of(Vec::new()))
    }
}

impl Changes {
    fn note(&mut self, push: PushInfo) {
        if push.kind != PushKind::Invalidate {
            return;
        }
        let keys = push.data.into_iter().flat_map(|value| match value {
            Value::Array(keys) => keys.into_iter().map(bytes).collect(),
            // All keys, as after FLUSHALL.
            _ => vec![None],
        });
        for key in keys {
            match (&mut *self, key) {
                (Self::Of(changed), Some(key)) if changed.len() < MAX_WAITING => changed.push(key),
                _ => *self = Self::All,
            }
        }
    }
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(data: Value) -> PushInfo {
        PushInfo { kind: PushKind::Invalidate, data: vec![data] }
    }

    fn keys(names: &[&str]) -> Value {
        Value::Array(names.iter().map(|name| Value::BulkString(name.as_bytes().to_vec())).collect())
    }

    #[test]
    fn keys_add_up_until_all_may_have_changed() {
        let mut changes = Changes::Of(Vec::new());
        changes.note(push(keys(&["a", "b"])));
        changes.note(PushInfo { kind: PushKind::Message, data: vec![keys(&["x"])] });
        changes.note(push(keys(&["c"])));
        assert_eq!(changes, Changes::Of(["a", "b", "c"].map(|key| key.as_bytes().to_vec()).to_vec()));
        changes.note(push(Value::Nil));
        changes.note(push(keys(&["d"])));
        assert_eq!(changes, Changes::All);
    }

    #[test]
    fn changes_that_are_not_taken_use_bounded_memory() {
        let mut changes = Changes::Of(Vec::new());
        for _ in 0..=MAX_WAITING {
            changes.note(push(keys(&["a"])));
        }
        assert_eq!(changes, Changes::All);
    }
}
