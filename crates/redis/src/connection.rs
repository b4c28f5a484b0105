//! The Redis connection of a process. It reconnects, is replaced when it hangs, and never blocks
//! for long.
//!
//! The client library reconnects when a connection breaks, but not when it hangs because packets
//! are dropped, nor when its server was demoted to a replica. [`Redis::watch`] detects both and
//! replaces the connection for all clones.
//!
//! A command that was interrupted is not repeated, so every write made through the connection is
//! idempotent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use metrics::counter;
use postrider_health::Check;
use redis::{
    Cmd, ErrorKind, Pipeline, RedisError, RedisFuture, ServerErrorKind, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig, MultiplexedConnection},
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{Config, memory};

/// Pause between two checks of the connection.
const PAUSE: Duration = Duration::from_secs(1);
/// Shortest pause between two checks, however many commands fail.
const MIN_PAUSE: Duration = Duration::from_millis(250);
/// Time limit of a `PING`, after which the connection counts as silent.
const PING_PATIENCE: Duration = Duration::from_secs(1);

/// Handle to the connection, which all clones share. Cheap to clone.
#[derive(Clone)]
pub struct Redis(pub(super) Arc<Shared>);

pub(super) struct Shared {
    link: ArcSwap<Link>,
    /// Notified when `timed_out` or `read_only` is set.
    suspected: Notify,
    /// Set when a command was not answered in time.
    timed_out: AtomicBool,
    /// Set when a command was refused because the server is a replica.
    read_only: AtomicBool,
    /// Set when a command was refused because the server is out of memory; cleared by
    /// [`Redis::watch_memory`].
    pub(super) out_of_memory: AtomicBool,
}

#[derive(Clone)]
enum Link {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
    /// A connection that does not reconnect; see [`Tracking`](crate::tracking::Tracking).
    Once(MultiplexedConnection),
}

impl Link {
    async fn open(config: &Config) -> Result<Self, RedisError> {
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

    fn connection(&mut self) -> &mut (dyn ConnectionLike + Send) {
        match self {
            Self::Single(connection) => connection,
            Self::Cluster(connection) => connection,
            Self::Once(connection) => connection,
        }
    }
}

impl Shared {
    /// Sets the flags for a result that makes the connection suspect, and wakes the watch.
    fn note_faults<T>(&self, result: &Result<T, RedisError>, is: impl Fn(&T, fn(&Value) -> bool) -> bool) {
        let out_of_memory = match result {
            Ok(found) => is(found, lacks_memory),
            Err(error) => memory::is_out_of_memory(error),
        };
        if out_of_memory {
            memory::count_refusal();
            self.out_of_memory.store(true, Ordering::Relaxed);
        }
        let suspicion = match result {
            Ok(found) if is(found, is_read_only) => &self.read_only,
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) => &self.read_only,
            Err(error) if error.is_timeout() => &self.timed_out,
            _ => return,
        };
        suspicion.store(true, Ordering::Relaxed);
        self.suspected.notify_one();
    }

    /// Pings the server and updates the check. Returns the reason if the connection should be
    /// replaced.
    async fn fault(&self, mut redis: Redis, check: &Check) -> Option<&'static str> {
        let (timed_out, read_only) = (&self.timed_out, &self.read_only);
        let [timed_out, read_only] = [timed_out, read_only].map(|flag| flag.swap(false, Ordering::Relaxed));
        let ping = redis::cmd("PING");
        let silent = match timeout(PING_PATIENCE, ping.query_async::<()>(&mut redis)).await {
            // One server of a Cluster answers; others may not.
            Ok(Ok(())) => timed_out && redis.is_cluster(),
            Ok(Err(error)) => {
                check.fail(format!("Redis does not answer: {error}"));
                return error.is_timeout().then_some("silent");
            }
            Err(_) => {
                check.fail(format!("Redis does not answer within {} s", PING_PATIENCE.as_secs()));
                return Some("silent");
            }
        };
        check.pass();
        if silent { Some("silent") } else { read_only.then_some("read_only") }
    }
}

/// Returns whether a replica refused a write.
fn is_read_only(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if error.kind() == Some(ServerErrorKind::ReadOnly))
}

/// Returns whether a server that is out of memory refused a write.
fn lacks_memory(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if memory::says_out_of_memory(error))
}

impl Redis {
    /// Connects once. The client library reconnects in the background after a break;
    /// [`Self::watch`] replaces a connection that hangs.
    pub async fn connect(config: &Config) -> Result<Self, RedisError> {
        Ok(Self::over(Link::open(config).await?))
    }

    /// Wraps a connection that does not reconnect.
    pub fn once(connection: MultiplexedConnection) -> Self {
        Self::over(Link::Once(connection))
    }

    fn over(link: Link) -> Self {
        let [timed_out, read_only, out_of_memory] = std::array::from_fn(|_| AtomicBool::default());
        let (link, suspected) = (ArcSwap::from_pointee(link), Notify::new());
        Self(Arc::new(Shared { link, suspected, timed_out, read_only, out_of_memory }))
    }

    /// Connects, retrying until it succeeds; `check` shows the last error.
    pub async fn connect_patiently(config: &Config, check: &Check) -> Self {
        loop {
            match Self::connect(config).await {
                Ok(redis) => return redis,
                Err(error) => check.fail(format!("Redis does not answer: {error}")),
            }
            sleep(Duration::from_millis(250 + fastrand::u64(0..250))).await;
        }
    }

    /// Returns whether the servers form a Cluster, in which all keys of a script must be on one
    /// server.
    pub fn is_cluster(&self) -> bool {
        matches!(**self.0.link.load(), Link::Cluster(_))
    }

    /// Sends several independent commands and returns their answers in order: in one pipeline with
    /// a single server, concurrently to their servers with a Cluster.
    pub async fn ask(&mut self, commands: Vec<Cmd>) -> Vec<Result<Value, RedisError>> {
        if self.is_cluster() {
            let ask_one = |command: Cmd| {
                let mut connection = self.clone();
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

    /// Checks the connection every second, and soon after a command made it suspect. Replaces it
    /// when it hangs or leads to a replica. Never returns.
    pub async fn watch(self, config: Config, check: Check) {
        loop {
            if let Some(reason) = self.0.fault(self.clone(), &check).await {
                self.replace(&config, &check, reason).await;
            }
            sleep(MIN_PAUSE).await;
            let _ = timeout(PAUSE - MIN_PAUSE, self.0.suspected.notified()).await;
        }
    }

    async fn replace(&self, config: &Config, check: &Check, reason: &'static str) {
        match Link::open(config).await {
            Ok(link) => {
                self.0.link.store(Arc::new(link));
                check.pass();
                counter!("postrider_redis_connections_replaced_total", "reason" => reason).increment(1);
                tracing::warn!(reason, "redis connection replaced");
            }
            Err(error) => check.fail(format!("Redis does not answer: {error}")),
        }
    }
}

impl ConnectionLike for Redis {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        let mut link = Link::clone(&self.0.link.load());
        Box::pin(async move {
            let result = link.connection().req_packed_command(command).await;
            self.0.note_faults(&result, |value, is| is(value));
            result
        })
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        let mut link = Link::clone(&self.0.link.load());
        Box::pin(async move {
            let result = link.connection().req_packed_commands(commands, offset, count).await;
            self.0.note_faults(&result, |values, is| values.iter().any(is));
            result
        })
    }

    fn get_db(&self) -> i64 {
        Link::clone(&self.0.link.load()).connection().get_db()
    }
}
