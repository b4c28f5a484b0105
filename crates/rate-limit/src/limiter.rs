//! Takes from the buckets of callers, in Redis or in this process.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use parking_lot::Mutex;
use postrider_redis::Redis;
use redis::{RedisError, Script};
use tokio::sync::watch;

use super::{
    Config,
    bucket::{Bucket, Decision, Rates, TAKE},
};

/// Time that Redis has to answer.
const TIMEOUT: Duration = Duration::from_millis(250);
/// Time for which Redis is not asked after it did not answer.
const PAUSE: Duration = Duration::from_secs(1);
/// Number of callers in memory above which those with full buckets are forgotten.
const REMEMBERED: usize = 10_000;

/// The buckets of all callers.
pub struct Limiter {
    pub(crate) config: Config,
    pub(crate) free: Vec<&'static str>,
    rates: Rates,
    redis: watch::Receiver<Option<Redis>>,
    prefix: String,
    take: Script,
    started: Instant,
    /// Milliseconds after the start until which Redis is not asked.
    paused_until_ms: AtomicU64,
    local: Mutex<HashMap<String, Bucket>>,
}

/// Reasons why Redis did not take a request.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("it is not connected")]
    NotConnected,
    #[error("it did not answer within {} ms", TIMEOUT.as_millis())]
    TimedOut,
    #[error(transparent)]
    Redis(#[from] RedisError),
}

impl Limiter {
    /// `key_prefix` is that of all of postrider's keys in Redis. Requests for the paths in `free`
    /// are not limited.
    pub fn new(
        config: Config,
        redis: watch::Receiver<Option<Redis>>,
        key_prefix: &str,
        free: Vec<&'static str>,
    ) -> Self {
        gauge!("postrider_rate_limit_local").set(0.0);
        Self {
            rates: Rates::new(&config),
            config,
            free,
            redis,
            prefix: format!("{key_prefix}limit:"),
            take: Script::new(TAKE),
            started: Instant::now(),
            paused_until_ms: AtomicU64::new(0),
            local: Mutex::default(),
        }
    }

    /// Takes a request with this many bytes of a caller.
    pub(crate) async fn take(&self, caller: &str, bytes: u64) -> Decision {
        if let Some(decision) = self.shared(caller, bytes, false).await {
            return decision;
        }
        let now = self.now();
        let mut local = self.local.lock();
        if local.len() >= REMEMBERED && !local.contains_key(caller) {
            local.retain(|_, bucket| !bucket.is_full(now));
        }
        local.entry(caller.to_owned()).or_default().take(&self.rates, bytes as f64, now)
    }

    /// Takes bytes that an accepted request has sent.
    pub(crate) async fn charge(&self, caller: &str, bytes: u64) {
        if self.shared(caller, bytes, true).await.is_some() {
            return;
        }
        let now = self.now();
        if let Some(bucket) = self.local.lock().get_mut(caller) {
            bucket.charge(&self.rates, bytes as f64, now);
        }
    }

    /// Asks Redis. Returns `None` while it does not answer.
    async fn shared(&self, caller: &str, bytes: u64, only_charge: bool) -> Option<Decision> {
        let elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if elapsed_ms < self.paused_until_ms.load(Ordering::Relaxed) {
            return None;
        }
        match self.ask(caller, bytes, only_charge).await {
            Ok(decision) => {
                if self.paused_until_ms.swap(0, Ordering::Relaxed) != 0 {
                    gauge!("postrider_rate_limit_local").set(0.0);
                    self.local.lock().clear();
                    tracing::info!("limits of callers are shared by all processes again");
                }
                Some(decision)
            }
            Err(fault) => {
                let until = elapsed_ms.saturating_add(u64::try_from(PAUSE.as_millis()).unwrap_or(u64::MAX)).max(1);
                if self.paused_until_ms.swap(until, Ordering::Relaxed) == 0 {
                    gauge!("postrider_rate_limit_local").set(1.0);
                    tracing::warn!(%fault, "limits of callers hold per process until Redis answers");
                }
                None
            }
        }
    }

    async fn ask(&self, caller: &str, bytes: u64, only_charge: bool) -> Result<Decision, Fault> {
        let mut redis = self.redis.borrow().clone().ok_or(Fault::NotConnected)?;
        let mut call = self.take.key(format!("{}{caller}", self.prefix));
        call.arg(self.rates.per_request).arg(self.rates.per_byte).arg(self.rates.burst);
        call.arg(bytes).arg(u8::from(only_charge));
        let answer = tokio::time::timeout(TIMEOUT, call.invoke_async::<(i64, i64, i64)>(&mut redis)).await;
        let (wait, requests_full, bytes_full) = answer.map_err(|_| Fault::TimedOut)??;
        Ok(Decision { wait: wait as f64, requests_full: requests_full as f64, bytes_full: bytes_full as f64 })
    }

    fn now(&self) -> f64 {
        // Not zero at the start, where every bucket is full.
        self.started.elapsed().as_secs_f64() * 1e6 + self.rates.burst
    }
}

/// Counts a refused request.
pub(crate) fn count_refusal() {
    counter!("postrider_rate_limited_total").increment(1);
}
