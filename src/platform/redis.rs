//! One Redis connection for standalone and Cluster, which reconnects and never blocks for long.
//!
//! A command that was cut off is not repeated, so every write made through it is idempotent.

use std::{pin::pin, time::Duration};

use futures_util::{StreamExt, future::join_all};
use redis::{
    Cmd, ConnectionInfo, ErrorKind, IntoConnectionInfo, Pipeline, RedisError, RedisFuture, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig, MultiplexedConnection},
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{config::Secret, ops::Check, pubsub::hang};

/// How Redis is reached.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://[user:password@]host:port/db`, or `rediss://` for TLS; several separated by commas
    /// for a Cluster.
    pub url: Secret,
    /// Whether the servers form a Redis Cluster.
    pub cluster: bool,
    /// Put before all of our keys.
    pub key_prefix: String,
    /// Time for one command, in milliseconds.
    pub response_timeout_ms: u64,
    /// Time to connect, in milliseconds.
    pub connect_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: Secret::new("redis://127.0.0.1:6379"),
            cluster: false,
            key_prefix: "postrider:".to_owned(),
            response_timeout_ms: 2_000,
            connect_timeout_ms: 1_000,
        }
    }
}

impl Config {
    fn urls(&self) -> impl Iterator<Item = &str> {
        self.url.expose().split(',').map(str::trim).filter(|url| !url.is_empty())
    }

    pub(super) fn first_url(&self) -> Result<ConnectionInfo, RedisError> {
        let first = self.urls().next().ok_or((ErrorKind::InvalidClientConfig, "`redis.url` is not set"))?;
        first.into_connection_info()
    }
}

/// Calls `wake` for each message on a channel, and whenever some may have been missed. Over a connection of
/// its own, made again when it breaks; in a Cluster every server has all messages.
pub async fn listen(config: Config, channel: String, wake: impl Fn() + Send) {
    loop {
        if let Err(error) = listen_once(&config, &channel, &wake).await {
            tracing::debug!(channel, error = %error, "not listening");
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

/// Cheap to clone; commands of all clones share the connection.
#[derive(Clone)]
pub enum Redis {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
    /// One that does not reconnect: see [`Tracking`](super::tracking::Tracking).
    Own(MultiplexedConnection),
}

impl Redis {
    /// Connects once; later breaks are mended in the background.
    pub async fn connect(config: &Config) -> Result<Self, RedisError> {
        let response = Duration::from_millis(config.response_timeout_ms);
        let connect = Duration::from_millis(config.connect_timeout_ms);
        if config.cluster {
            let client = ClusterClientBuilder::new(config.urls())
                .response_timeout(response)
                .connection_timeout(connect)
                .retries(3)
                .build()?;
            return Ok(Self::Cluster(client.get_async_connection().await?));
        }
        let client = redis::Client::open(config.first_url()?)?;
        let options = ConnectionManagerConfig::new()
            .set_response_timeout(Some(response))
            .set_connection_timeout(Some(connect))
            .set_max_delay(Duration::from_millis(500))
            .set_number_of_retries(1);
        Ok(Self::Single(ConnectionManager::new_with_config(client, options).await?))
    }

    /// Connects, trying again until it works.
    pub async fn connect_patiently(config: &Config, check: &Check) -> Self {
        loop {
            match Self::connect(config).await {
                Ok(redis) => return redis,
                Err(error) => check.fail(format!("Redis does not answer: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(250 + fastrand::u64(0..250))).await;
        }
    }

    /// Asks several things that have nothing to do with each other, and gives the answers in their order:
    /// in one go with one server; with a Cluster side by side, each where it belongs.
    pub async fn ask(&mut self, commands: Vec<Cmd>) -> Vec<Result<Value, RedisError>> {
        if let Self::Cluster(connection) = self {
            let ask_one = |command: Cmd| {
                let mut connection = connection.clone();
                async move { connection.req_packed_command(&command).await.and_then(Value::extract_error) }
            };
            return join_all(commands.into_iter().map(ask_one)).await;
        }
        let count = commands.len();
        let mut pipeline = Pipeline::with_capacity(count);
        for command in commands {
            pipeline.add_command(command);
        }
        match self.req_packed_commands(&pipeline, 0, count).await {
            Ok(values) => values.into_iter().map(Value::extract_error).collect(),
            Err(error) => vec![Err(error); count],
        }
    }

    /// Asks every two seconds whether it answers.
    pub async fn watch(mut self, check: Check) {
        loop {
            match redis::cmd("PING").query_async::<()>(&mut self).await {
                Ok(()) => check.pass(),
                Err(error) => check.fail(format!("Redis does not answer: {error}")),
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}

impl ConnectionLike for Redis {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(connection) => connection.req_packed_command(command),
            Self::Cluster(connection) => connection.req_packed_command(command),
            Self::Own(connection) => connection.req_packed_command(command),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(connection) => connection.req_packed_commands(commands, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(commands, offset, count),
            Self::Own(connection) => connection.req_packed_commands(commands, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Single(connection) => connection.get_db(),
            Self::Cluster(connection) => connection.get_db(),
            Self::Own(connection) => connection.get_db(),
        }
    }
}
