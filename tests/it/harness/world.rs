//! The isolated names that a test uses on the servers.

use std::{
    collections::BTreeMap,
    process::Command,
    str::FromStr,
    sync::atomic::{AtomicUsize, Ordering},
};

use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    Stack,
    app::{Builder, command, migrate},
    kafka::Kafka,
    proxy::Proxy,
    stack::off_runtime,
};

/// Names of the servers' variables in `dev/stack env`.
const SERVERS: [&str; 3] = ["KAFKA_BROKERS", "REDIS_URL", "DATABASE_URL"];

/// Limits the tests with processes that run at the same time, independently of the number of test
/// threads.
static TURNS: Semaphore = Semaphore::const_new(6);

/// The prefixes that one test uses on the servers. Drop deletes its topics.
pub struct World {
    /// The prefix of every topic, group, key and schema name.
    pub prefix: String,
    pub kafka: Kafka,
    pub redis_url: String,
    database_url: String,
    env: BTreeMap<String, String>,
    /// A process in whose network namespace the product runs.
    network_of: Option<u32>,
    _turn: SemaphorePermit<'static>,
}

impl World {
    /// Creates a world on the shared servers.
    pub async fn new() -> Self {
        Self::build(None).await
    }

    /// Creates a world on this stack, with the shared servers for those that the stack lacks.
    pub async fn on(stack: &Stack) -> Self {
        Self::build(Some(stack)).await
    }

    async fn build(stack: Option<&Stack>) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let turn = TURNS.acquire().await.unwrap();
        let whole = |own: &Stack| SERVERS.iter().all(|name| own.find(name).is_some());
        let shared = if stack.is_some_and(whole) { None } else { Some(off_runtime(Stack::shared).await) };
        let own = |name: &str| stack.and_then(|own| own.find(name));
        let get = |name: &str| own(name).or_else(|| shared?.find(name)).unwrap_or_default().to_owned();
        // Servers may keep the data of an earlier run that had the same process id.
        let (process, run) = (std::process::id(), fastrand::u16(..));
        let prefix = format!("it{process}r{run:04x}n{}_", NUMBER.fetch_add(1, Ordering::Relaxed));
        let (brokers, redis_url) = (get(SERVERS[0]), get(SERVERS[1]));
        let mut env = BTreeMap::new();
        for (name, value) in [
            ("KAFKA__BROKERS", brokers.as_str()),
            ("KAFKA__TOPIC_PREFIX", &prefix),
            ("KAFKA__GROUP_PREFIX", &prefix),
            // The shortest timeout that brokers allow, so that a killed member is soon removed.
            ("KAFKA__CONSUMER__SESSION_TIMEOUT_MS", "6000"),
            ("REDIS__URL", &redis_url),
            ("REDIS__KEY_PREFIX", &format!("{prefix}:")),
            ("KV__PARTITIONS", "2"),
            ("KV__AUDIT_PARTITIONS", "1"),
            ("DLQ__PARTITIONS", "2"),
            ("COMMENTS__PARTITIONS", "2"),
            ("MESSAGES__PARTITIONS", "2"),
            ("MESSAGES__PRESENCE__PARTITIONS", "2"),
            ("FEED__PARTITIONS", "2"),
            ("HTTP__LISTEN", "127.0.0.1:0"),
            ("HTTP__EXPOSE_ADMIN", "true"),
            ("HTTP__EXPOSE_METRICS", "true"),
            ("MANAGEMENT__LISTEN", "127.0.0.1:0"),
            ("TELEMETRY__LOG_FORMAT", "json"),
        ] {
            env.insert(format!("POSTRIDER_{name}"), value.to_owned());
        }
        Self {
            kafka: Kafka::new(&brokers),
            database_url: get(SERVERS[2]),
            redis_url,
            prefix,
            env,
            network_of: None,
            _turn: turn,
        }
    }

    /// Builds a process of the product in this world, by default with all roles.
    pub fn app(&self) -> Builder {
        Builder::new(&self.prefix, self.env.clone()).in_network_of(self.network_of)
    }

    /// Runs all later processes in the network namespace of another process.
    pub fn enter(&mut self, pid: u32) {
        self.network_of = Some(pid);
    }

    /// Returns the binary as a command in this world, for subcommands that end by themselves.
    pub fn command(&self) -> Command {
        command(&self.env)
    }

    /// Configures Postgres, and creates the schema.
    pub async fn with_postgres(mut self) -> Self {
        self.without_migration();
        self.migrate().await;
        self
    }

    /// Configures Postgres without running the migrations.
    pub fn without_migration(&mut self) {
        self.set("POSTRIDER_POSTGRES__URL", &self.database_url.clone());
        let schema = self.schema().to_owned();
        self.set("POSTRIDER_POSTGRES__SCHEMA", &schema);
    }

    fn schema(&self) -> &str {
        self.prefix.trim_end_matches('_')
    }

    /// Runs statements on this world's tables, which must succeed.
    pub async fn sql(&self, statements: &str) {
        self.try_sql(statements).await.unwrap();
    }

    /// Runs statements that may fail.
    pub async fn try_sql(&self, statements: &str) -> Result<(), sqlx::Error> {
        let mut connection = self.connect().await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(&mut connection).await.map(|_| ())
    }

    /// Returns the integer that a query on this world's tables selects.
    pub async fn number(&self, query: &str) -> i64 {
        let mut connection = self.connect().await.unwrap();
        sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&mut connection).await.unwrap()
    }

    /// Connects to this world's tables.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.database().connect().await
    }

    /// Returns the URL of Postgres.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// Returns the options to connect to this world's tables.
    pub fn database(&self) -> PgConnectOptions {
        PgConnectOptions::from_str(&self.database_url).unwrap().options([("search_path", self.schema())])
    }

    /// Counts the rows of a table.
    pub async fn count(&self, table: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM {table}")).await
    }

    pub async fn migrate(&self) {
        let env = self.env.clone();
        off_runtime(move || migrate(&env)).await;
    }

    /// Sets a variable for all later processes.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.insert(name.to_owned(), value.to_owned());
    }

    /// Makes Redis the upstream of a proxy, and returns the URL of Redis through it.
    pub fn redis_through(&self, proxy: &Proxy) -> String {
        proxy.lead_to(self.redis_url.trim_start_matches("redis://"));
        format!("redis://{}", proxy.address)
    }

    /// Makes all later processes reach Redis and Postgres through these proxies.
    pub fn reach_through(&mut self, redis: &Proxy, postgres: &Proxy) {
        let through = self.redis_through(redis);
        self.set("POSTRIDER_REDIS__URL", &through);
        let (before, rest) = self.database_url.rsplit_once('@').unwrap();
        let (server, name) = rest.split_once('/').unwrap();
        postgres.lead_to(server);
        self.set("POSTRIDER_POSTGRES__URL", &format!("{before}@{}/{name}", postgres.address));
    }

    /// Returns the full name of a topic of this world.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Creates a topic that no capability owns, and returns its full name.
    pub async fn make_topic(&self, name: &str, partitions: i32) -> String {
        let topic = self.topic(name);
        self.kafka.create(&topic, partitions).await;
        topic
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kafka.remove_prefixed(&self.prefix);
    }
}
