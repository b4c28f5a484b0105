//! The loop of the outbox drain: its shards, its rounds, and its readiness and metrics.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::gauge;
use postrider_health::Check;
use postrider_kafka::{Config as KafkaConfig, Producer, TopicsReady};
use postrider_outbox_backlog::CHANNEL;
use postrider_postgres::query::{Error, within};
use sqlx::{
    ConnectOptions, Executor, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    owner::Owner,
    round::{Sender, Topic},
    store,
};

/// Interval between two rebalancings of shards. Together with the time that Postgres takes to
/// notice a dead process, it bounds a takeover.
const BALANCE: Duration = Duration::from_millis(500);
/// Interval between two runs of [`Drain::maintain`].
const MAINTENANCE: Duration = Duration::from_secs(1);
/// Shortest and longest pause between rounds that find nothing.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// Time without a notification after which the listener's connection is tested.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Maximum time of a query for rows that is not followed by a pause.
const PATIENT: Duration = Duration::from_millis(20);
/// Minimum time between the starts of rounds that find rows, unless the last one found many: each
/// round costs several round trips to Postgres and one to Kafka, however few rows it sends.
const PACE: Duration = Duration::from_millis(10);
/// Pause after a failure of Postgres or Kafka.
const AFTER_FAILURE: Duration = Duration::from_millis(200);
/// Maximum number of rows of one shard per round.
const ROWS: i64 = 500;
/// Number of rows from which a round is assumed to have more behind it.
const MUCH: usize = 500;

/// The outbox drain, run by the relay role.
pub struct Drain {
    pool: PgPool,
    sender: Sender,
    topics_ready: TopicsReady,
    check: Check,
    hint: Notify,
    stop: CancellationToken,
}

/// State of a connection to Postgres.
struct Session {
    connection: PgConnection,
    owner: Owner,
    /// Keys that have rows in quarantine.
    held: HashSet<String>,
    balanced: Option<Instant>,
    maintained: Option<Instant>,
}

impl Drain {
    pub fn new(
        pool: PgPool,
        producer: Producer,
        kafka: &KafkaConfig,
        topics: Vec<Topic>,
        topics_ready: TopicsReady,
        check: Check,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let sender = Sender::new(producer, kafka.topic_prefix.clone(), topics);
        Arc::new(Self { pool, sender, topics_ready, check, hint: Notify::new(), stop })
    }

    /// Drains the outbox until the stop.
    pub async fn run(self: Arc<Self>) {
        while !self.stop.is_cancelled() {
            if let Err(error) = self.session().await {
                self.check.fail(error.to_string());
                tracing::warn!(error = %error, "outbox drain lost postgres, reconnecting");
                self.pause(AFTER_FAILURE.mul_f64(1.0 + fastrand::f64())).await;
            }
        }
    }

    /// Starts a round when a writer notifies Postgres. Polling finds the rows of lost
    /// notifications.
    pub async fn listen_forever(self: Arc<Self>) {
        loop {
            if let Err(error) = self.listen().await {
                tracing::debug!(error = %error, "outbox listener failed, reconnecting");
            }
            tokio::time::sleep(Duration::from_millis(500 + fastrand::u64(0..500))).await;
        }
    }

    async fn listen(&self) -> Result<(), Error> {
        let name = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT {CHANNEL}")));
        let name: String = within(name.fetch_one(&self.pool)).await?;
        // The listener has its own pool: a connection that hangs would otherwise occupy one of the
        // shared pool forever.
        let options = PgConnectOptions::clone(&self.pool.connect_options());
        let own = PgPoolOptions::new().max_connections(1).connect_lazy_with(options);
        let mut listener = within(PgListener::connect_with(&own)).await?;
        within(listener.listen(&name)).await?;
        loop {
            match tokio::time::timeout(HEARTBEAT, listener.recv()).await {
                Ok(received) => received.map(|_| self.hint.notify_one())?,
                Err(_) => within(listener.execute("/* heartbeat */")).await.map(|_| ())?,
            }
        }
    }

    /// Runs rounds on one connection until it fails or the stop.
    async fn session(&self) -> Result<(), Error> {
        let mut session = self.open().await?;
        let mut pause = PAUSES.0;
        while !self.stop.is_cancelled() {
            let begun = Instant::now();
            let found = self.step(&mut session).await?;
            pause = if found > 0 { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
            if found > 0 && found < MUCH {
                self.pause(PACE.saturating_sub(begun.elapsed())).await;
            }
            if found == 0 {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.hint.notified() => pause = PAUSES.0,
                    () = self.stop.cancelled() => {}
                }
            }
        }
        Ok(())
    }

    async fn open(&self) -> Result<Session, Error> {
        let options = self.pool.connect_options();
        let mut connection = within(options.connect()).await?;
        store::prepare(&mut connection).await?;
        let owner = Owner::join(&mut connection).await?;
        Ok(Session { connection, owner, held: HashSet::new(), balanced: None, maintained: None })
    }

    /// Runs one round. Returns the number of rows that there were to send.
    async fn step(&self, session: &mut Session) -> Result<usize, Error> {
        let due = |last: Option<Instant>, every| last.is_none_or(|last| last.elapsed() >= every);
        if due(session.balanced, BALANCE) {
            session.owner.balance(&mut session.connection).await?;
            session.balanced = Some(Instant::now());
            gauge!("postrider_outbox_owned_shards").set(session.owner.shards().len() as f64);
        }
        if due(session.maintained, MAINTENANCE) {
            self.maintain(session).await?;
            session.maintained = Some(Instant::now());
        }
        let shards = session.owner.shards();
        if shards.is_empty() || !self.topics_ready.get() {
            return Ok(0);
        }
        let asked = Instant::now();
        let rows = store::page(&mut session.connection, &shards, ROWS).await?;
        // While an old transaction is open, a query must skip the dead rows of a partition until it
        // is truncated. The pause keeps the drain from doing that all the time.
        if asked.elapsed() > PATIENT {
            self.pause(asked.elapsed()).await;
        }
        if rows.is_empty() {
            return Ok(0);
        }
        let round = self.sender.round(&mut session.connection, &rows, &mut session.held).await?;
        if let Some(problem) = round.problem {
            tracing::debug!(problem, left = round.left, "outbox rows not sent, retrying");
            self.pause(AFTER_FAILURE).await;
        }
        Ok(rows.len())
    }

    /// Updates the quarantined keys and the metrics, and truncates a partition if possible.
    async fn maintain(&self, session: &mut Session) -> Result<(), Error> {
        let connection = &mut session.connection;
        let (keys, quarantined) = store::quarantined(connection).await?;
        session.held = keys.into_iter().collect();
        gauge!("postrider_outbox_quarantined_rows").set(quarantined as f64);
        gauge!("postrider_outbox_oldest_age_seconds").set(store::oldest_s(connection).await?);
        store::rotate(connection).await?;
        self.check.pass();
        Ok(())
    }

    async fn pause(&self, length: Duration) {
        tokio::select! {
            () = tokio::time::sleep(length) => {}
            () = self.stop.cancelled() => {}
        }
    }
}
