//! Checks that components set and beats that loops give.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::platform::drain::Draining;

/// How long a loop may be silent before the process counts as stuck.
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

/// One thing that must hold for the process to be ready. Starts out failing, as not yet known.
#[derive(Clone)]
pub struct Check {
    name: &'static str,
    state: Arc<Mutex<State>>,
}

/// What a check says; the texts are sentences for whoever is on call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Passing,
    /// Something to mend that keeps nobody from being ready.
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

/// The pulse of one loop.
#[derive(Clone)]
pub struct Beat {
    name: &'static str,
    epoch: Instant,
    last_ms: Arc<AtomicU64>,
}

/// What one consumer has in hand, for whoever is on call.
#[derive(Clone)]
pub struct Published(Arc<Mutex<Value>>);

impl Published {
    pub fn set(&self, report: Value) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = report;
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
    /// Adds a check to readiness.
    pub fn check(&self, name: &'static str) -> Check {
        let check = Check { name, state: Arc::new(Mutex::new(State::Failing("not known yet".to_owned()))) };
        check.count(false);
        self.inner.checks.lock().unwrap_or_else(PoisonError::into_inner).push(check.clone());
        check
    }

    /// Adds a loop to liveness.
    pub fn beat(&self, name: &'static str) -> Beat {
        let beat = Beat { name, epoch: self.inner.started, last_ms: Arc::default() };
        beat.tick();
        self.inner.beats.lock().unwrap_or_else(PoisonError::into_inner).push(beat.clone());
        beat
    }

    /// Adds a consumer to `/consumers`.
    pub fn publish(&self, name: &'static str) -> Published {
        let published = Published(Arc::new(Mutex::new(json!({"consumer": name}))));
        self.inner.published.lock().unwrap_or_else(PoisonError::into_inner).push(published.clone());
        published
    }

    /// What every consumer published last.
    pub fn consumers(&self) -> Value {
        let published = self.inner.published.lock().unwrap_or_else(PoisonError::into_inner);
        published.iter().map(|one| one.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// From now on not ready, whatever the checks say.
    pub fn drain(&self) {
        self.inner.draining.begin();
    }

    /// Ready again as the checks say.
    pub fn call_off_drain(&self) {
        self.inner.draining.call_off();
    }

    /// For those who serve meanwhile.
    pub fn draining(&self) -> Draining {
        self.inner.draining.clone()
    }

    /// Whether every check passes, with the report that `?verbose` shows.
    pub fn readiness(&self) -> (bool, Value) {
        let checks = self.inner.checks.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Returns whether the check of this name fails; a check that is not there does not.
    pub fn fails(&self, name: &str) -> bool {
        let checks = self.inner.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks.iter().any(|check| check.name == name && check.state().fails())
    }

    /// Whether the process has been ready once.
    pub fn has_started(&self) -> bool {
        self.readiness().0 || self.inner.was_ready.load(Ordering::Relaxed)
    }

    /// Whether every loop beats, with the silence of each in seconds.
    pub fn liveness(&self) -> (bool, Value) {
        let beats = self.inner.beats.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Passes, with something to mend in the report.
    pub fn warn(&self, detail: impl Into<String>) {
        self.set(State::Warning(detail.into()));
    }

    /// `problem` is a sentence for whoever is on call.
    pub fn fail(&self, problem: impl Into<String>) {
        self.set(State::Failing(problem.into()));
    }

    fn set(&self, state: State) {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if current.fails() != state.fails() {
            self.count(!state.fails());
        }
        *current = state;
    }

    fn count(&self, passes: bool) {
        metrics::gauge!("postrider_check_ok", "check" => self.name).set(f64::from(u8::from(passes)));
    }

    fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        assert!(ready, "a warning keeps nobody from being ready");
        assert_eq!(report["checks"]["redis"], json!({"status": "warning", "detail": "a replica is away"}));
        redis.pass();
        health.drain();
        assert!(!health.readiness().0);
        health.call_off_drain();
        assert!(health.readiness().0);
    }

    #[test]
    fn a_silent_loop_is_not_alive() {
        let health = Health::default();
        let mut beat = health.beat("loop");
        assert!(health.liveness().0);
        beat.epoch = Instant::now().checked_sub(BEAT_LIMIT * 2).unwrap();
        health.inner.beats.lock().unwrap()[0] = beat;
        assert!(!health.liveness().0);
    }
}
