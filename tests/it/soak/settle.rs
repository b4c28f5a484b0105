//! When the faults are over: everything catches up, and then it is judged.

use std::{
    collections::BTreeMap,
    str::FromStr,
    time::{Duration, Instant},
};

use fastrand::Rng;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{sync::Mutex, time::sleep};

use super::{Commits, GROUPS, PARTITIONS, Run, check, check::Finding, ledger::Ledger, partitions, readers, senders};
use crate::harness::{Stack, World, stack::off_runtime};

/// Time for everything to catch up, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Time without anything catching up, after which nothing will.
const STANDSTILL: Duration = Duration::from_secs(60);

/// Samples what is committed, and right after that how far the sinks are.
pub struct Gauge {
    commits: std::sync::Arc<Commits>,
    redis_url: String,
    /// Begins the keys of the view.
    redis_prefix: String,
    database: PgConnectOptions,
    /// One sample at a time, so that they are in order.
    turn: Mutex<()>,
}

impl Gauge {
    /// Looks at the servers themselves, not through proxies, where that can be.
    pub async fn new(world: &World, stack: &Stack) -> Self {
        let schema = world.prefix.trim_end_matches('_');
        let database =
            PgConnectOptions::from_str(stack.get("DATABASE_URL")).unwrap().options([("search_path", schema)]);
        Self {
            commits: std::sync::Arc::new(Commits::new(world, &GROUPS, &partitions())),
            redis_url: world.redis_url.clone(),
            redis_prefix: format!("{}:", world.prefix),
            database,
            turn: Mutex::default(),
        }
    }

    /// A group whose brokers, or whose sink, do not answer now is left out.
    pub async fn sample(&self, ledger: &Ledger) {
        let _turn = self.turn.lock().await;
        let (commits, to) = (self.commits.clone(), ledger.clone());
        let mut samples = off_runtime(move || commits.sample(&to)).await;
        for sample in &mut samples {
            let reached = match sample.topic {
                super::Topic::Messages => self.markers().await,
                super::Topic::Comments => self.progress().await,
                _ => None,
            };
            sample.reached = reached.unwrap_or_default();
        }
        ledger.evidence().commits.extend(samples);
    }

    /// Of each partition whose view is complete: where it goes on.
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

    async fn progress(&self) -> Option<BTreeMap<i32, i64>> {
        let read = async {
            let mut connection = self.database.connect().await.ok()?;
            let rows = sqlx::query_as::<_, (i32, i64)>("SELECT partition, next FROM comments_progress");
            Some(rows.fetch_all(&mut connection).await.ok()?.into_iter().collect())
        };
        tokio::time::timeout(Duration::from_secs(2), read).await.ok()?
    }
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

    /// Ends the load, waits until nothing is missing, and says what is wrong all the same.
    pub async fn settle(&mut self) -> Vec<Finding> {
        self.await_ready(PATIENCE).await;
        self.clients.stop.cancel();
        while let Some(done) = self.senders.join_next().await {
            done.unwrap();
        }
        let (began, ledger) = (Instant::now(), self.site.ledger.clone());
        let (mut open, mut since) = (0, began);
        let findings = loop {
            self.look().await;
            let findings = check::in_the_end(&ledger.evidence());
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
        let late = check::at_any_time(&ledger.evidence());
        if findings.is_empty() { late } else { findings }
    }

    /// What the sinks have now. What cannot be known stays as it was.
    async fn look(&self) {
        let (ledger, client) = (&self.site.ledger, senders::client());
        let api = self.clients.fleet.api(&mut Rng::new());
        let keys = readers::keys(&ledger.evidence());
        let view = readers::view(&client, &api, keys).await;
        let listed = readers::listed(&client, &api).await;
        let commits = self.gauge.commits.clone();
        let ends = off_runtime(move || commits.ends()).await;
        self.gauge.sample(ledger).await;
        let mut evidence = ledger.evidence();
        evidence.view = view.unwrap_or_default();
        evidence.listed = listed.unwrap_or_default();
        evidence.ends = ends.unwrap_or_default();
    }
}
