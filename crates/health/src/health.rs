//! Health of a process: readiness checks that components set, and heartbeats of long-running loops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use postrider_process::drain::Draining;
use serde_json::{Value, json};

/// Longest time without a heartbeat before the process counts as stuck.
const BEAT_LIMIT: Duration = Duration::from_secs(30);

/// The health of one process. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    started: Instant,
    checks: Mutex<Vec<Check>>,
    beats: Mutex<Vec<Beat>>,
    published: Mutex<Vec<Published>>,
    draining: Draining,
    was_ready: AtomicBool,
}

/// A condition that must hold for the process to be ready. It fails until a component sets it.
#[derive(Clone)]
pub struct Check {
    name: &'static str,
    state: Arc<Mutex<State>>,
}

/// State of a check. The texts are sentences for the operator on call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Passing,
    /// A problem to fix that does not affect readiness.
    Warning(String),
    Failing(String),
}

impl State {
    fn fails(&self) -> bool {
        matches!(self, Self::Failing(_))
    }

    fn report(&self) -> Value {
        match self {
            Self::Passing => json!({"status": "ok"}),
            Self::Warning(detail) => json!({"status": "warning", "detail": detail}),
            Self::Failing(detail) => json!({"status": "failing", "detail": detail}),
        }
    }
}

/// Heartbeat of one loop.
#[derive(Clone)]
pub struct Beat {
    name: &'static str,
    epoch: Instant,
    last_ms: Arc<AtomicU64>,
}

/// Latest report of one consumer, shown at `/consumers`.
#[derive(Clone)]
pub struct Published(Arc<Mutex<Value>>);

impl Published {
    pub fn set(&self, report: Value) {
        *self.0.lock() = report;
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            inner: Arc::new(Inner {
                started: Instant::now(),
                checks: Mutex::default(),
                beats: Mutex::default(),
                published: Mutex::default(),
                draining: Draining::default(),
                was_ready: AtomicBool::new(false),
            }),
        }
    }
}

impl Health {
    /// Adds a readiness check.
    pub fn check(&self, name: &'static str) -> Check {
        let check = Check { name, state: Arc::new(Mutex::new(State::Failing("not known yet".to_owned()))) };
        check.count(false);
        self.inner.checks.lock().push(check.clone());
        check
    }

    /// Adds a loop to liveness.
    pub fn beat(&self, name: &'static str) -> Beat {
        let beat = Beat { name, epoch: self.inner.started, last_ms: Arc::default() };
        beat.tick();
        self.inner.beats.lock().push(beat.clone());
        beat
    }

    /// Adds a consumer to `/consumers`.
    pub fn publish(&self, name: &'static str) -> Published {
        let published = Published(Arc::new(Mutex::new(json!({"consumer": name}))));
        self.inner.published.lock().push(published.clone());
        published
    }

    /// Returns the latest report of every consumer.
    pub fn consumers(&self) -> Value {
        let published = self.inner.published.lock();
        published.iter().map(|one| one.0.lock().clone()).collect()
    }

    /// Makes the process not ready, whatever its checks say.
    pub fn drain(&self) {
        self.inner.draining.begin();
    }

    /// Ends the drain; readiness depends on the checks again.
    pub fn call_off_drain(&self) {
        self.inner.draining.call_off();
    }

    /// Returns the drain flag, for servers that keep answering during a drain.
    pub fn draining(&self) -> Draining {
        self.inner.draining.clone()
    }

    /// Returns whether the process is ready, with the report that `?verbose` shows. It is ready if
    /// no check fails and it is not draining.
    pub fn readiness(&self) -> (bool, Value) {
        let checks = self.inner.checks.lock();
        let draining = self.inner.draining.has_begun();
        let mut ready = !draining;
        let mut report = serde_json::Map::new();
        for check in checks.iter() {
            let state = check.state();
            ready &= !state.fails();
            report.insert(check.name.to_owned(), state.report());
        }
        if ready {
            self.inner.was_ready.store(true, Ordering::Relaxed);
        }
        (ready, json!({"ready": ready, "draining": draining, "checks": report}))
    }

    /// Returns whether the check with this name fails; `false` if there is no such check.
    pub fn fails(&self, name: &str) -> bool {
        let checks = self.inner.checks.lock();
        checks.iter().any(|check| check.name == name && check.state().fails())
    }

    /// Returns whether the process has been ready at least once.
    pub fn has_started(&self) -> bool {
        self.readiness().0 || self.inner.was_ready.load(Ordering::Relaxed)
    }

    /// Returns whether every loop has sent a heartbeat in time, with the seconds since the last
    /// heartbeat of each.
    pub fn liveness(&self) -> (bool, Value) {
        let beats = self.inner.beats.lock();
        let mut alive = true;
        let mut report = serde_json::Map::new();
        for beat in beats.iter() {
            let silence = beat.silence();
            alive &= silence < BEAT_LIMIT;
            report.insert(beat.name.to_owned(), json!({"silent_seconds": silence.as_secs_f64()}));
        }
        (alive, json!({"alive": alive, "loops": report}))
    }
}

impl Check {
    pub fn pass(&self) {
        self.set(State::Passing);
    }

    /// Passes, with a warning in the report.
    pub fn warn(&self, detail: impl Into<String>) {
        self.set(State::Warning(detail.into()));
    }

    /// Fails. `problem` is a sentence for the operator on call.
    pub fn fail(&self, problem: impl Into<String>) {
        self.set(State::Failing(problem.into()));
    }

    fn set(&self, state: State) {
        let mut current = self.state.lock();
        if current.fails() != state.fails() {
            self.count(!state.fails());
        }
        *current = state;
    }

    fn count(&self, passes: bool) {
        metrics::gauge!("postrider_check_ok", "check" => self.name).set(f64::from(u8::from(passes)));
    }

    fn state(&self) -> State {
        self.state.lock().clone()
    }
}

impl Beat {
    pub fn tick(&self) {
        let ms = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(ms, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.epoch.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_needs_every_check_and_ends_with_the_drain() {
        let health = Health::default();
        let (kafka, redis) = (health.check("kafka"), health.check("redis"));
        kafka.pass();
        assert!(!health.readiness().0, "redis is not known yet");
        assert!(!health.has_started());
        redis.pass();
        assert!(health.readiness().0);
        redis.fail("gone");
        let (ready, report) = health.readiness();
        assert!(!ready && health.has_started());
        assert_eq!(["redis", "kafka", "other"].map(|name| health.fails(name)), [true, false, false]);
        assert_eq!(report["checks"]["redis"]["detail"], "gone");
        redis.warn("a replica is away");
        let (ready, report) = health.readiness();
        assert!(ready, "a warning does not affect readiness");
        assert_eq!(report["checks"]["redis"], json!({"status": "warning", "detail": "a replica is away"}));
        redis.pass();
        health.drain();
        assert!(!health.readiness().0);
        health.call_off_drain();
        assert!(health.readiness().0);
    }

    #[test]
    fn a_loop_without_heartbeats_is_not_alive() {
        let health = Health::default();
        let mut beat = health.beat("loop");
        assert!(health.liveness().0);
        beat.epoch = Instant::now().checked_sub(BEAT_LIMIT * 2).unwrap();
        health.inner.beats.lock()[0] = beat;
        assert!(!health.liveness().0);
    }
}
