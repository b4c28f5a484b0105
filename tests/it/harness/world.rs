//! A test's own corner of the servers.

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

/// What `dev/stack env` calls the servers.
const SERVERS: [&str; 3] = ["KAFKA_BROKERS", "REDIS_URL", "DATABASE_URL"];

/// Tests with processes that may run at the same time, whatever the number of test threads.
static TURNS: Semaphore = Semaphore::const_new(6);

/// Prefixes of its own on the servers. Its topics are removed when it is dropped.
pub struct World {
    /// Begins every topic, group, key and schema name.
    pub prefix: String,
    pub kafka: Kafka,
    pub redis_url: String,
    database_url: String,
    env: BTreeMap<String, String>,
    /// A process in whose network the product runs.
    network_of: Option<u32>,
    _turn: SemaphorePermit<'static>,
}

impl World {
    /// On the shared servers.
    pub async fn new() -> Self {
        Self::build(None).await
    }

    /// On this stack, with the shared servers for what it lacks.
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
        // Servers may keep the data of earlier runs, of which one may have had this process id.
        let (process, run) = (std::process::id(), fastrand::u16(..));
        let prefix = format!("it{process}r{run:04x}n{}_", NUMBER.fetch_add(1, Ordering::Relaxed));
        let (brokers, redis_url) = (get(SERVERS[0]), get(SERVERS[1]));
        let mut env = BTreeMap::new();
        for (name, value) in [
            ("KAFKA__BROKERS", brokers.as_str()),
            ("KAFKA__TOPIC_PREFIX", &prefix),
            ("KAFKA__GROUP_PREFIX", &prefix),
            // The shortest that brokers allow, so that a killed member is soon forgotten.
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

    /// A process of the product in this world; all roles, unless told otherwise.
    pub fn app(&self) -> Builder {
        Builder::new(&self.prefix, self.env.clone()).in_network_of(self.network_of)
    }

    /// Has processes to come run in the network of another process.
    pub fn enter(&mut self, pid: u32) {
        self.network_of = Some(pid);
    }

    /// The binary in this world, for a command that ends by itself.
    pub fn command(&self) -> Command {
        command(&self.env)
    }

    /// From now on with Postgres, whose schema is made first.
    pub async fn with_postgres(mut self) -> Self {
        self.without_migration();
        self.migrate().await;
        self
    }

    /// From now on with Postgres, where nothing was made yet.
    pub fn without_migration(&mut self) {
        self.set("POSTRIDER_POSTGRES__URL", &self.database_url.clone());
        let schema = self.schema().to_owned();
        self.set("POSTRIDER_POSTGRES__SCHEMA", &schema);
    }

    fn schema(&self) -> &str {
        self.prefix.trim_end_matches('_')
    }

    /// Runs statements on this world's tables.
    pub async fn sql(&self, statements: &str) {
        self.try_sql(statements).await.unwrap();
    }

    /// The same, where they may fail.
    pub async fn try_sql(&self, statements: &str) -> Result<(), sqlx::Error> {
        let mut connection = self.connect().await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(&mut connection).await.map(|_| ())
    }

    /// A whole number from this world's tables.
    pub async fn number(&self, query: &str) -> i64 {
        let mut connection = self.connect().await.unwrap();
        sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&mut connection).await.unwrap()
    }

    /// A connection to this world's tables.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.database().connect().await
    }

    /// The URL of Postgres.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// How to connect to this world's tables.
    pub fn database(&self) -> PgConnectOptions {
        PgConnectOptions::from_str(&self.database_url).unwrap().options([("search_path", self.schema())])
    }

    /// How many rows a table has.
    pub async fn count(&self, table: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM {table}")).await
    }

    pub async fn migrate(&self) {
        let env = self.env.clone();
        off_runtime(move || migrate(&env)).await;
    }

    /// Sets a variable for all processes to come.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.insert(name.to_owned(), value.to_owned());
    }

    /// Leads a proxy to Redis, and returns the URL of Redis through it.
    pub fn redis_through(&self, proxy: &Proxy) -> String {
        proxy.lead_to(self.redis_url.trim_start_matches("redis://"));
        format!("redis://{}", proxy.address)
    }

    /// Has processes to come reach Redis and Postgres through proxies, which lead there from now on.
    pub fn reach_through(&mut self, redis: &Proxy, postgres: &Proxy) {
        let through = self.redis_through(redis);
        self.set("POSTRIDER_REDIS__URL", &through);
        let (before, rest) = self.database_url.rsplit_once('@').unwrap();
        let (server, name) = rest.split_once('/').unwrap();
        postgres.lead_to(server);
        self.set("POSTRIDER_POSTGRES__URL", &format!("{before}@{}/{name}", postgres.address));
    }

    /// The full name of a topic of this world.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Makes a topic that belongs to nobody, and returns its full name.
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
