//! The end of a run: waits after the faults until everything has caught up, and runs the judge.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fastrand::Rng;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{sync::Mutex, time::sleep};

use super::{
    GROUPS, PARTITIONS, Run, check,
    check::Finding,
    commits::Commits,
    events::Searched,
    ledger::{Evidence, Ledger, Topic},
    partitions, posters, readers, senders, visitors,
};
use crate::harness::{World, mailbox::Noted, stack::off_runtime};

/// Time limit for everything to catch up, even on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Waiting ends after this time without progress. It is longer than the two and a half minutes
/// within which a partition that no member reads is noticed (docs/operations.md).
const STANDSTILL: Duration = Duration::from_secs(160);

/// Samples the commits, and right afterwards the progress of the sinks.
pub struct Gauge {
    commits: std::sync::Arc<Commits>,
    redis_url: String,
    /// The prefix of the view's keys.
    redis_prefix: String,
    database: PgConnectOptions,
    /// Allows one sample at a time, so that samples are in order.
    turn: Mutex<()>,
}

impl Gauge {
    /// Connects to Redis and Postgres directly. Kafka advertises its proxy, so it is reached
    /// through the proxy.
    pub fn new(world: &World) -> Self {
        Self {
            commits: std::sync::Arc::new(Commits::new(world, &GROUPS, &partitions())),
            redis_url: world.redis_url.clone(),
            redis_prefix: format!("{}:", world.prefix),
            database: world.database(),
            turn: Mutex::default(),
        }
    }

    /// Records one sample. A group or a sink that does not answer is left out.
    pub async fn sample(&self, ledger: &Ledger) {
        let _turn = self.turn.lock().await;
        let (commits, to) = (self.commits.clone(), ledger.clone());
        let mut samples = off_runtime(move || commits.sample(&to)).await;
        for sample in &mut samples {
            let reached = match sample.topic {
                Topic::Messages => self.markers().await,
                Topic::Comments => self.progress("comments").await,
                Topic::Chat => self.progress("messages").await,
                Topic::Posts => self.progress("feed").await,
                _ => None,
            };
            sample.reached = reached.unwrap_or_default();
        }
        let next = self.offsets("SELECT partition, next FROM message_undelivered".to_owned()).await;
        let noted = self.noted().await.map(|places| Noted { at_ms: ledger.now_ms(), places });
        let cursors = noted.as_ref().map(|noted| noted.places.clone());
        let searched = next.zip(cursors).map(|(next, cursors)| Searched { next, cursors });
        let mut evidence = ledger.evidence();
        evidence.commits.extend(samples);
        evidence.noted.extend(noted);
        evidence.searched.extend(searched);
    }

    /// Reads the next offset of each partition whose view is complete.
    async fn markers(&self) -> Option<BTreeMap<i32, i64>> {
        let client = redis::Client::open(self.redis_url.as_str()).ok()?;
        let mut connection =
            tokio::time::timeout(Duration::from_secs(1), client.get_multiplexed_async_connection()).await.ok()?.ok()?;
        let mut reached = BTreeMap::new();
        for partition in 0..PARTITIONS {
            let view = format!("{}kv:{{e0.p{partition}}}:view", self.redis_prefix);
            let asked = redis::cmd("HGET").arg(view).arg("").to_owned();
            let marker: Option<String> =
                tokio::time::timeout(Duration::from_secs(1), asked.query_async(&mut connection)).await.ok()?.ok()?;
            let next = marker.as_deref().and_then(|marker| marker.strip_prefix("L:")?.split(':').next()?.parse().ok());
            reached.extend(next.map(|next| (partition, next)));
        }
        Some(reached)
    }

    /// Reads the next offset of each partition of a projection.
    async fn progress(&self, projection: &str) -> Option<BTreeMap<i32, i64>> {
        let query = "SELECT partition, next FROM projection_progress WHERE projection";
        self.offsets(format!("{query} = '{projection}'")).await
    }

    async fn offsets(&self, query: String) -> Option<BTreeMap<i32, i64>> {
        Some(self.rows::<i32>(query).await?.into_iter().collect())
    }

    /// Reads the receivers' cursors. Each receiver has one cursor, because all its messages are in
    /// one partition.
    async fn noted(&self) -> Option<BTreeMap<String, i64>> {
        let rows = self.rows::<String>("SELECT receiver_id, delivered FROM message_cursors".to_owned()).await?;
        Some(rows.into_iter().collect())
    }

    async fn rows<K>(&self, query: String) -> Option<Vec<(K, i64)>>
    where
        (K, i64): for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow> + Send + Unpin,
    {
        let read = async {
            let mut connection = self.database.connect().await.ok()?;
            sqlx::query_as(sqlx::AssertSqlSafe(query)).fetch_all(&mut connection).await.ok()
        };
        tokio::time::timeout(Duration::from_secs(2), read).await.ok()?
    }
}

/// Checks a copy of the evidence, which takes seconds, off the runtime: the proxies to the servers
/// run in it.
pub async fn judge(ledger: &Ledger, check: fn(&Evidence) -> Vec<Finding>) -> Vec<Finding> {
    let evidence = ledger.evidence().clone();
    off_runtime(move || check(&evidence)).await
}

impl Run {
    pub async fn await_ready(&self, within: Duration) -> bool {
        let (client, began) = (senders::client(), Instant::now());
        loop {
            let unready = self.site.fleet.unready(&client).await;
            if unready.is_empty() {
                return true;
            }
            if began.elapsed() > within {
                let what = format!("not ready after {} s: {}", within.as_secs(), unready.join("; "));
                self.site.ledger.incident(what);
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends the load, waits until everything has caught up, and returns the remaining findings.
    pub async fn settle(&mut self) -> Vec<Finding> {
        self.await_ready(PATIENCE).await;
        self.site.ledger.load_ends();
        self.clients.stop.cancel();
        while let Some(done) = self.senders.join_next().await {
            done.unwrap();
        }
        let (began, ledger) = (Instant::now(), self.site.ledger.clone());
        let (mut open, mut since) = (0, began);
        let findings = loop {
            self.look().await;
            let findings = judge(&ledger, check::in_the_end).await;
            if findings.len() != open {
                (open, since) = (findings.len(), Instant::now());
            }
            if findings.is_empty() || began.elapsed() > PATIENCE || since.elapsed() > STANDSTILL {
                break findings;
            }
            sleep(Duration::from_secs(1)).await;
        };
        eprintln!("soak: settled after {:.1} s", began.elapsed().as_secs_f32());
        self.tasks.shutdown().await;
        self.tail = None;
        self.site.fleet.stop(&ledger).await;
        let late = judge(&ledger, check::at_any_time).await;
        if findings.is_empty() { late } else { findings }
    }

    /// Records the current state of the sinks. A sink that does not answer counts as empty until
    /// the next attempt.
    async fn look(&self) {
        let (ledger, client) = (&self.site.ledger, senders::client());
        let api = self.clients.fleet.api(&mut Rng::new());
        let keys = readers::keys(&ledger.evidence());
        let view = readers::view(&client, &api, keys).await;
        let listed = readers::listed(&client, &api).await;
        let mut mailboxes = BTreeMap::new();
        for receiver in readers::RECEIVERS {
            let mailbox = readers::mailbox(&client, &api, receiver).await;
            mailboxes.insert(receiver.to_owned(), mailbox.unwrap_or_default());
        }
        let mut feeds = BTreeMap::new();
        for reader in posters::READERS {
            let feed = posters::feed(&client, &api, reader).await;
            feeds.insert(reader.to_owned(), feed.unwrap_or_default());
        }
        ledger.evidence().connected.extend(visitors::devices());
        let receivers: Vec<String> = ledger.evidence().connected.keys().cloned().collect();
        let present = visitors::present(&client, &api, receivers).await;
        let commits = self.gauge.commits.clone();
        let ends = off_runtime(move || commits.ends()).await;
        self.gauge.sample(ledger).await;
        let mut evidence = ledger.evidence();
        evidence.view = view.unwrap_or_default();
        evidence.listed = listed.unwrap_or_default();
        evidence.mailboxes = mailboxes;
        evidence.feeds = feeds;
        evidence.present = present;
        evidence.sessions = self.notebook.sessions();
        evidence.ends = ends.unwrap_or_default();
    }
}
