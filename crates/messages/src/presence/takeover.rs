//! Ends the connections that stopped processes have left behind, and sends overdue events. Every
//! process checks; a claim decides which one acts, and acting twice is harmless.

use std::collections::{HashMap, HashSet};

use metrics::{counter, gauge};
use postrider_limits::bound;
use redis::RedisError;
use tokio::time::Instant;

use super::{
    Shared,
    announce::Change,
    keys::Bucket,
    script::{Calls, Lease, Speaker, TAKEN, Update},
};

/// Maximum number of receivers read or ended at a time.
const CHUNK: usize = 100;
/// Maximum number of due events of a bucket that are sent in one round.
const MAX_DUE: usize = 1_000;
/// Time after a change after which its event is overdue, in milliseconds.
const DUE_MS: i64 = 5_000;
/// Duration of a claim, in milliseconds: covers one bucket. Afterwards another process may
/// continue.
const CLAIM_MS: u64 = 10_000;

/// Observations of other processes.
#[derive(Default)]
pub struct Watchman {
    /// Processes with an expired or missing lease, with the observed lease and the time of the
    /// observation.
    suspects: HashMap<String, (String, Instant)>,
}

/// A process whose connections are to be ended.
struct Dead {
    process: String,
    /// Observed expiry of its lease; empty if it is no longer in the registry.
    lease: String,
}

impl Watchman {
    /// Checks at every heartbeat; runs forever.
    pub async fn watch(&mut self, shared: &Shared) {
        loop {
            tokio::time::sleep(shared.config.heartbeat().mul_f64(0.9 + fastrand::f64() * 0.2)).await;
            let Ok(mut calls) = shared.calls() else { continue };
            if let Err(error) = self.look(shared, &mut calls).await {
                tracing::debug!(error = %error, "presence takeover check failed");
            }
        }
    }

    async fn look(&mut self, shared: &Shared, calls: &mut Calls<'_>) -> Result<(), RedisError> {
        let (now_ms, leases) = calls.list().await?;
        for dead in self.find_dead(shared, calls, now_ms, &leases).await {
            end_process(shared, calls, &dead, false).await?;
        }
        if let Err(error) = count_remembered(shared, calls, now_ms).await {
            tracing::debug!(error = %error, "counting remembered receivers failed");
        }
        // One process per heartbeat interval.
        let pause_ms = (shared.config.heartbeat().as_millis()).to_string();
        let sweeper = shared.keys.sweeper();
        let chosen: Option<String> = calls.run(&["SET", &sweeper, "1", "NX", "PX", &pause_ms]).await?;
        if chosen.is_some() {
            send_due(shared, calls, now_ms - DUE_MS).await?;
        }
        Ok(())
    }

    /// Returns the leaving processes whose time has come, and those without a valid lease that
    /// stayed silent for a heartbeat while Redis was available. After an outage of Redis all leases
    /// have expired.
    async fn find_dead(&mut self, shared: &Shared, calls: &mut Calls<'_>, now_ms: i64, leases: &[Lease]) -> Vec<Dead> {
        let over = |lease: &&Lease| lease.ends.parse::<f64>().is_ok_and(|ends| ends <= now_ms as f64);
        let mut silent = orphans(calls, leases).await;
        let mut dead = Vec::new();
        for lease in leases.iter().filter(over) {
            if lease.leaving {
                dead.push(Dead { process: lease.process.clone(), lease: String::new() });
            } else {
                silent.insert(lease.process.clone(), lease.ends.clone());
            }
        }
        let silence = shared.config.heartbeat().mul_f64(1.2);
        self.suspects.retain(|process, (lease, _)| silent.get(process) == Some(lease));
        for (process, lease) in silent {
            let (_, since) = self.suspects.entry(process.clone()).or_insert_with(|| (lease.clone(), Instant::now()));
            if since.elapsed() >= silence {
                dead.push(Dead { process, lease });
            }
        }
        dead
    }
}

/// Reports the number of disconnected receivers whose last connection is stored.
async fn count_remembered(shared: &Shared, calls: &mut Calls<'_>, now_ms: i64) -> Result<(), RedisError> {
    let counts = Bucket::all().map(|bucket| {
        let mut all = redis::cmd("HGETALL");
        all.arg(shared.keys.gone(bucket));
        all
    });
    let mut remembered = 0;
    for answer in calls.redis.ask(counts.collect()).await {
        let counts: Vec<(i64, i64)> = redis::from_redis_value(answer?)?;
        remembered += counts.iter().filter(|(day, _)| *day >= now_ms / 86_400_000).map(|(_, count)| count).sum::<i64>();
    }
    bound::report("remembered_receivers", u64::try_from(remembered).unwrap_or(0), shared.config.max_remembered);
    Ok(())
}

/// Ends all remaining connections and sends all due events; called when no other process is alive.
pub async fn end_all(shared: &Shared, calls: &mut Calls<'_>) -> Result<(), RedisError> {
    let (_, leases) = calls.list().await?;
    for Lease { process, leaving, ends } in leases {
        let lease = if leaving { String::new() } else { ends };
        end_process(shared, calls, &Dead { process, lease }, true).await?;
    }
    send_due(shared, calls, i64::MAX).await
}

/// Returns the processes that have entries in a bucket but are not in the registry, which may have
/// been lost alone.
async fn orphans(calls: &mut Calls<'_>, leases: &[Lease]) -> HashMap<String, String> {
    let known: HashSet<&str> = leases.iter().map(|lease| lease.process.as_str()).collect();
    let mut found = HashMap::new();
    for bucket in Bucket::all() {
        let head = calls.keys.head(bucket);
        // If a shard is unavailable, takeovers on the other shards continue.
        let Ok(fields) = calls.run::<Vec<String>>(&["HKEYS", &head]).await else { continue };
        let processes = fields.iter().filter_map(|field| field.strip_prefix("p:"));
        found.extend(processes.filter(|name| !known.contains(name)).map(|name| (name.to_owned(), String::new())));
    }
    found
}

/// Ends all connections of a process if this process gets the claim.
async fn end_process(shared: &Shared, calls: &mut Calls<'_>, dead: &Dead, at_once: bool) -> Result<(), RedisError> {
    if !calls.claim(&dead.process, &dead.lease, CLAIM_MS, at_once).await? {
        return Ok(());
    }
    let lease_ms = i64::try_from(shared.config.whole_lease_ms()).unwrap_or(0);
    // Time of the last heartbeat.
    let seen_ms = dead.lease.parse::<f64>().map_or(0, |ends| (ends as i64 - lease_ms).max(0));
    let mut receivers = 0;
    for bucket in Bucket::all() {
        if calls.fence(bucket, &dead.process).await? {
            // Its pending events are sent before the events of its end.
            send_due_of(shared, calls, bucket, i64::MAX).await?;
            receivers += end_bucket(shared, calls, bucket, &dead.process, seen_ms).await?;
            calls.claim(&dead.process, "", CLAIM_MS, true).await?;
        }
        calls.finish(bucket, &dead.process).await?;
    }
    calls.forget(&dead.process).await?;
    counter!("postrider_presence_takeovers_total").increment(1);
    tracing::info!(process = dead.process, receivers, "ended the connections of a stopped process");
    Ok(())
}

async fn end_bucket(
    shared: &Shared,
    calls: &mut Calls<'_>,
    bucket: Bucket,
    process: &str,
    seen_ms: i64,
) -> Result<usize, RedisError> {
    let (remember_s, doubt_ms) = (shared.config.remember_s(), shared.config.whole_lease_ms());
    let max_remembered = shared.config.max_remembered_of_a_bucket();
    let speaker = Speaker { process, marker: TAKEN, remember_s, seen_ms, doubt_ms, max_remembered };
    let (own, count) = (shared.keys.own(bucket, process), CHUNK.to_string());
    let (mut cursor, mut ended) = ("0".to_owned(), 0);
    loop {
        let (next, pairs): (String, Vec<String>) = calls.run(&["HSCAN", &own, &cursor, "COUNT", &count]).await?;
        let names = pairs.chunks_exact(2).map(|pair| pair[0].as_str()).filter(|name| !name.is_empty());
        let updates: Vec<_> = names.map(|receiver| Update { receiver, connections: -1, known: None }).collect();
        for chunk in updates.chunks(CHUNK) {
            // `None` if another process has finished the takeover.
            let Some((now_ms, outcomes)) = calls.update(bucket, speaker, chunk).await? else { return Ok(ended) };
            let changes = chunk.iter().zip(outcomes);
            shared
                .announcer
                .add(changes.flat_map(|(update, outcome)| {
                    outcome.changes(&update.receiver.into(), update.connections, now_ms)
                }));
            ended += chunk.len();
        }
        if next == "0" {
            return Ok(ended);
        }
        cursor = next;
    }
}

/// Sends events that have been due since before a time, because their process died or Kafka was
/// unavailable.
async fn send_due(shared: &Shared, calls: &mut Calls<'_>, before_ms: i64) -> Result<(), RedisError> {
    let mut overdue = 0;
    for bucket in Bucket::all() {
        overdue += send_due_of(shared, calls, bucket, before_ms).await?;
    }
    gauge!("postrider_presence_due_events").set(overdue as f64);
    Ok(())
}

/// Sends the overdue events of one bucket. Returns their number.
async fn send_due_of(
    shared: &Shared,
    calls: &mut Calls<'_>,
    bucket: Bucket,
    before_ms: i64,
) -> Result<usize, RedisError> {
    let (due, count) = (shared.keys.due(bucket), CHUNK.to_string());
    let (mut cursor, mut late) = ("0".to_owned(), Vec::new());
    while late.len() < MAX_DUE {
        let (next, pairs): (String, Vec<String>) = calls.run(&["HSCAN", &due, &cursor, "COUNT", &count]).await?;
        // Unreadable events stay due, for a version that can read them.
        let changes = pairs.chunks_exact(2).filter_map(|pair| Change::parse(&pair[1]).ok());
        late.extend(changes.filter(|change| change.at_ms <= before_ms));
        cursor = next;
        if cursor == "0" {
            break;
        }
    }
    if !late.is_empty() {
        tracing::debug!(events = late.len(), "sending overdue presence events");
    }
    let count = late.len();
    shared.announcer.add(late);
    Ok(count)
}
