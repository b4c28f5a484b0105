//! Redis, standalone or Cluster: configuration, the shared connection, and subscriptions to single
//! channels.

mod connection;
mod memory;
pub mod pubsub;
pub mod tracking;
mod trial;

use std::{pin::pin, time::Duration};

use futures_util::StreamExt;
use postrider_config::SecretUrl;
use redis::{ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::{connection::Redis, trial::try_out};
use crate::pubsub::hang;

/// Connection to Redis.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://[user:password@]host:port/db`, or `rediss://` for TLS; several URLs separated by
    /// commas for a Cluster.
    pub url: SecretUrl,
    /// `true` if the servers form a Redis Cluster.
    pub cluster: bool,
    /// Prefix of all of postrider's keys.
    pub key_prefix: String,
    /// Time limit of one command, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub response_timeout_ms: u64,
    /// Time limit of connecting, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub connect_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: SecretUrl::new("redis://127.0.0.1:6379"),
            cluster: false,
            key_prefix: "postrider:".to_owned(),
            response_timeout_ms: 2_000,
            connect_timeout_ms: 1_000,
        }
    }
}

impl Config {
    /// Returns whether every URL can be parsed.
    pub fn is_valid(&self) -> bool {
        self.urls().all(|url| url.into_connection_info().is_ok())
    }

    fn urls(&self) -> impl Iterator<Item = &str> {
        self.url.expose().split(',').map(str::trim).filter(|url| !url.is_empty())
    }

    pub(crate) fn first_url(&self) -> Result<ConnectionInfo, RedisError> {
        let first = self.urls().next().ok_or((ErrorKind::InvalidClientConfig, "`redis.url` is not set"))?;
        first.into_connection_info()
    }
}

/// Calls `wake` for each message on a channel, and whenever messages may have been missed. Uses its
/// own connection and reconnects when it breaks. In a Cluster, every server has all messages. Never
/// returns.
pub async fn listen(config: Config, channel: String, wake: impl Fn() + Send) {
    loop {
        if let Err(error) = listen_once(&config, &channel, &wake).await {
            tracing::debug!(channel, error = %error, "redis channel not subscribed, retrying");
        }
        tokio::time::sleep(Duration::from_millis(500 + fastrand::u64(0..500))).await;
    }
}

async fn listen_once(config: &Config, channel: &str, wake: &impl Fn()) -> Result<(), RedisError> {
    let client = redis::Client::open(config.first_url()?)?;
    let connect = Duration::from_millis(config.connect_timeout_ms);
    let subscribe = async {
        let mut listener = client.get_async_pubsub().await?;
        listener.subscribe(channel).await?;
        Ok::<_, RedisError>(listener)
    };
    let too_slow = (ErrorKind::Io, "no answer within `redis.connect_timeout_ms`");
    let listener = tokio::time::timeout(connect, subscribe).await.map_err(|_| RedisError::from(too_slow))??;
    wake();
    let (sink, mut messages) = listener.split();
    let mut hung = pin!(hang(sink, connect));
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(_) => wake(),
                None => return Ok(()),
            },
            error = &mut hung => return Err(error),
        }
    }
}
