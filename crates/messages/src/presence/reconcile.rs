//! Reconciles presence in Redis with the topic `presence` after Redis has lost data.
//!
//! Then nobody knows which receivers of suspended or dead processes were announced. Once every live
//! process has had time to register its connections again, one process reads the last event of each
//! receiver from the topic. If Redis and the topic agree, the version of the event is restored.
//! Otherwise the state in Redis is announced. Until then, receivers that no process knew are
//! registered without an event.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::counter;
use postrider_kafka::{
    self as kafka,
    scan::{ScanError, Scanner, Span},
};
use rdkafka::{
    Message,
    error::{KafkaError, RDKafkaErrorCode},
};
use redis::RedisError;

use super::{Shared, announce::Change, keys::Bucket, register::Trouble, script::Calls};

/// Maximum time for reading one partition of the topic.
const READ_TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum time for finding the ends of the topic.
const SPANS_TIMEOUT: Duration = Duration::from_secs(20);
/// Time after which another process may start if the one that reads the topic has died. Two at once
/// are harmless.
const CLAIM_MS: u64 = 5_000;
/// Interval at which the claim is renewed.
const CLAIM_RENEWAL: Duration = Duration::from_secs(1);
/// Maximum number of receivers of a partition in memory. If there are more, the partition is read
/// several times, for a part of the buckets each time.
const MAX_RECEIVERS: usize = 200_000;
/// Maximum number of receivers per script.
const CHUNK: usize = 100;

/// Why presence was not reconciled with its topic.
#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error("Redis failed: {0}")]
    Redis(#[from] Trouble),
    #[error("reading the topic failed: {0}")]
    Scan(#[from] ScanError),
    #[error("Kafka failed: {0}")]
    Kafka(#[from] KafkaError),
    #[error("the process is about to end")]
    Ending,
}

impl From<RedisError> for ReconcileError {
    fn from(error: RedisError) -> Self {
        Self::Redis(error.into())
    }
}

impl ReconcileError {
    /// Returns true if reading the topic again would fail again: this process may not read it, or
    /// it is too large.
    fn is_final(&self) -> bool {
        if matches!(self, Self::Scan(ScanError::Deadline)) {
            return true;
        }
        let (Self::Kafka(error) | Self::Scan(ScanError::Kafka(error))) = self else { return false };
        error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed)
    }
}

/// Checks at every heartbeat whether buckets are to be reconciled; runs forever.
pub async fn run(shared: &Shared, kafka: &kafka::Config) {
    loop {
        tokio::time::sleep(shared.config.heartbeat().mul_f64(0.9 + fastrand::f64() * 0.2)).await;
        if shared.doubtful.lock().is_empty() {
            continue;
        }
        if let Err(error) = check(shared, kafka).await {
            tracing::debug!(error = %error, "reconciling presence with its topic failed, retrying");
        }
    }
}

async fn check(shared: &Shared, kafka: &kafka::Config) -> Result<(), ReconcileError> {
    let mut calls = shared.calls()?;
    let (now_ms, leases) = calls.list().await?;
    let lease_ms = i64::try_from(shared.config.whole_lease_ms()).unwrap_or(i64::MAX);
    let doubtful = shared.doubtful.lock().clone();
    let ready: Vec<_> = doubtful.into_iter().filter(|(_, born_ms)| now_ms - born_ms >= lease_ms).collect();
    let Some(last_born_ms) = ready.iter().map(|(_, born_ms)| *born_ms).max() else { return Ok(()) };
    // Changes that a live process has yet to send are newer than the topic, and receivers that it has
    // yet to register are missing in Redis.
    let live = leases.iter().filter(|lease| !lease.leaving).map(|lease| lease.process.as_str());
    let oldest_unsent = calls.oldest_unsent(live).await?;
    if !shared.announcer.is_ready() || oldest_unsent.is_some_and(|version| version <= last_born_ms) {
        return Ok(());
    }
    let (claim, claim_ms) = (shared.keys.reconciler(), CLAIM_MS.to_string());
    if calls.run::<Option<String>>(&["SET", &claim, "1", "NX", "PX", &claim_ms]).await?.is_none() {
        return Ok(());
    }
    let reconciled = tokio::select! {
        reconciled = reconcile(shared, kafka, &mut calls, &ready) => reconciled,
        trouble = renew(shared, &claim) => Err(trouble.into()),
    };
    calls.run::<()>(&["DEL", &claim]).await?;
    let changes = match reconciled {
        Err(error) if error.is_final() => {
            tracing::warn!(
                error = %error,
                topic = shared.announcer.topic(),
                "presence events may be missing: Redis has lost data, and the topic could not be read"
            );
            0
        }
        reconciled => reconciled?,
    };
    for (bucket, born_ms) in &ready {
        calls.mark_reconciled(*bucket, *born_ms).await?;
    }
    counter!("postrider_presence_reconciliations_total").increment(1);
    tracing::info!(buckets = ready.len(), changes, "presence in Redis was compared with its topic");
    Ok(())
}

/// Renews the claim until Redis fails.
async fn renew(shared: &Shared, claim: &str) -> Trouble {
    let claim_ms = CLAIM_MS.to_string();
    loop {
        tokio::time::sleep(CLAIM_RENEWAL).await;
        let renewed = async { Ok(shared.calls()?.run::<()>(&["SET", claim, "1", "PX", &claim_ms]).await?) };
        if let Err(trouble) = renewed.await {
            return trouble;
        }
    }
}

/// Compares the last event of each receiver in these buckets with Redis. Returns the number of
/// changes that it found.
async fn reconcile(
    shared: &Shared,
    kafka: &kafka::Config,
    calls: &mut Calls<'_>,
    buckets: &[(Bucket, i64)],
) -> Result<usize, ReconcileError> {
    let born_ms: HashMap<Bucket, i64> = buckets.iter().copied().collect();
    let topic = shared.announcer.topic();
    let all: Vec<Bucket> = born_ms.keys().copied().collect();
    let mut changes = 0;
    for span in spans(kafka, topic).await? {
        let mut parts = vec![all.clone()];
        while let Some(part) = parts.pop() {
            let Some(last) = last_events(kafka, topic, span, part.clone()).await? else {
                let (one, other) = part.split_at(part.len() / 2);
                parts.extend([one.to_vec(), other.to_vec()]);
                continue;
            };
            for (bucket, last) in by_bucket(last) {
                changes += apply(shared, calls, bucket, born_ms[&bucket], &last).await?;
            }
        }
    }
    Ok(changes)
}

fn by_bucket(changes: Vec<Change>) -> HashMap<Bucket, Vec<Change>> {
    let mut parts: HashMap<Bucket, Vec<Change>> = HashMap::new();
    for change in changes {
        parts.entry(Bucket::of(&change.receiver)).or_default().push(change);
    }
    parts
}

async fn apply(
    shared: &Shared,
    calls: &mut Calls<'_>,
    bucket: Bucket,
    born_ms: i64,
    last: &[Change],
) -> Result<usize, ReconcileError> {
    let mut changes = 0;
    for chunk in last.chunks(CHUNK) {
        // `None` if the bucket has lost data again, or another process was faster.
        let Some(made) = calls.reconcile(bucket, born_ms, shared.config.remember_s(), chunk).await? else { break };
        changes += made.len();
        shared.announcer.add(made);
    }
    Ok(changes)
}

/// Returns the offset ranges of the topic; none if it does not exist.
async fn spans(kafka: &kafka::Config, topic: &str) -> Result<Vec<Span>, ReconcileError> {
    let (kafka, topic) = (kafka.clone(), topic.to_owned());
    let spans =
        move || Ok(Scanner::connect(&kafka)?.spans(&topic, Instant::now() + SPANS_TIMEOUT)?.unwrap_or_default());
    tokio::task::spawn_blocking(spans).await.unwrap_or(Err(ReconcileError::Ending))
}

/// Returns the last event of each receiver of these buckets in one partition; `None` if they are
/// too many for the memory and there are several buckets.
async fn last_events(
    kafka: &kafka::Config,
    topic: &str,
    span: Span,
    buckets: Vec<Bucket>,
) -> Result<Option<Vec<Change>>, ReconcileError> {
    let (kafka, topic) = (kafka.clone(), topic.to_owned());
    let stop = StopOnDrop::default();
    let stopped = stop.0.clone();
    let read = move || {
        let (mut last, mut is_full) = (HashMap::<Arc<str>, Change>::new(), false);
        let scanner = Scanner::connect(&kafka)?;
        scanner.read(&topic, &[span], Instant::now() + READ_TIMEOUT, |record| {
            // An unreadable event was counted; another version may have written it.
            if let Some(change) = record.payload().and_then(|value| Change::parse_event(value).ok())
                && buckets.contains(&Bucket::of(&change.receiver))
                && last.get(&change.receiver).is_none_or(|known| known.version < change.version)
            {
                last.insert(change.receiver.clone(), change);
            }
            is_full = last.len() > MAX_RECEIVERS && buckets.len() > 1;
            if is_full || stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok((!is_full).then(|| last.into_values().collect()))
    };
    let last = tokio::task::spawn_blocking(read).await.unwrap_or(Err(ReconcileError::Ending));
    drop(stop);
    last
}

/// Ends the reading thread when nobody waits for it any more.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
