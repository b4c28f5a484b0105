//! Watches the files, has their content tested, and waits for this process's turn to restart with
//! it.

use std::{
    collections::BTreeMap,
    pin::pin,
    time::{Duration, Instant},
};

use metrics::gauge;
use postrider_health::{Check, Health};

use super::{Config, Fingerprint, Trial, Verdict, candidate::Candidate};

/// Parts that may be refused: values of the metric's label `what`.
const PARTS: [&str; 4] = ["settings", "kafka", "redis", "postgres"];
/// Number of failed looks in a row after which a file counts as unreadable, and not as being
/// replaced.
const UNREADABLE_LOOKS: u32 = 3;
/// Time between two warnings about the same files.
const REMINDER: Duration = Duration::from_secs(60);
/// Pause between two attempts to release a lease.
const RETURN_PAUSE: Duration = Duration::from_secs(1);

/// Sets the metrics to their values while no file has changed.
pub fn describe() {
    report(&BTreeMap::new());
    gauge!("postrider_rotation_waiting").set(0.0);
}

fn report(refused: &BTreeMap<&'static str, String>) {
    for what in PARTS {
        gauge!("postrider_rotation_refused", "what" => what).set(f64::from(u8::from(refused.contains_key(what))));
    }
}

/// Watch over `rotation.files`.
pub struct Watch<T> {
    config: Config,
    trial: T,
    /// `None` if no file is watched.
    check: Option<Check>,
    /// Files that the process was started with; `None` while they are unknown, because one was
    /// missing.
    in_use: Option<Fingerprint>,
    candidate: Option<Candidate>,
    /// Number of looks in a row at which a file could not be read.
    unreadable: u32,
}

impl<T: Trial> Watch<T> {
    /// Creates a watch. `in_use` identifies the files that the configuration was loaded from. Adds
    /// a check that only informs and never fails.
    pub fn new(config: Config, in_use: Option<Fingerprint>, trial: T, health: &Health) -> Self {
        let check = (!config.files.is_empty()).then(|| health.check("rotation"));
        check.iter().for_each(Check::pass);
        Self { config, trial, check, in_use, candidate: None, unreadable: 0 }
    }

    /// Waits until the process should drain and restart; never returns if there is no file to
    /// watch.
    pub async fn until_due(&mut self) {
        if self.config.files.is_empty() {
            return std::future::pending().await;
        }
        let trial = self.trial.clone();
        let mut noticed = pin!(trial.noticed());
        let (mut was_noticed, mut returned) = (false, false);
        let expiry = Instant::now() + Duration::from_millis(self.config.lease_ms);
        while let Some(pause) = self.step().await {
            let pause = if was_noticed && !returned { pause.min(RETURN_PAUSE) } else { pause };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = &mut noticed, if !was_noticed => was_noticed = true,
            }
            // Release the lease nowhere else, so that the lease for the next rotation is never
            // released.
            if was_noticed && !returned {
                returned = self.return_lease().await || Instant::now() > expiry;
            }
        }
    }

    /// Returns whether the files are still those that the restart is due for; if not, ends the
    /// turn.
    pub async fn is_still_due(&mut self) -> bool {
        let found = self.look().await;
        let Some(mut candidate) = self.candidate.take() else { return false };
        let is_due = found == Some(candidate.files);
        if !is_due {
            candidate.give_back().await;
        }
        is_due
    }

    /// Ends this process's turn, if it has one.
    pub async fn call_off(&mut self) {
        if let Some(mut candidate) = self.candidate.take() {
            candidate.give_back().await;
        }
    }

    /// Releases the lease. Returns whether there is none left to release.
    async fn return_lease(&self) -> bool {
        match self.trial.give_back().await {
            Ok(true) => tracing::info!("ready again, rotation lease released"),
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(problem = %error, "cannot release the rotation lease");
                return false;
            }
        }
        true
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.config.interval_ms.max(10))
    }

    async fn look(&mut self) -> Option<Fingerprint> {
        match Fingerprint::of(self.config.files.clone()).await {
            Ok(found) => {
                if self.unreadable >= UNREADABLE_LOOKS {
                    tracing::info!("all files of `rotation.files` are readable again");
                    self.check.iter().for_each(Check::pass);
                }
                self.unreadable = 0;
                Some(found)
            }
            Err(error) => {
                // A mount is replaced in steps; a file that is missing in between exists at the
                // next look.
                self.unreadable = self.unreadable.saturating_add(1);
                if self.unreadable == UNREADABLE_LOOKS {
                    tracing::warn!(%error, "file of `rotation.files` unreadable, rotations are not noticed");
                    self.warn(format!("a file of `rotation.files` cannot be read: {error}"));
                }
                None
            }
        }
    }

    /// Takes one step. Returns the pause before the next one; `None` when it is time to restart.
    async fn step(&mut self) -> Option<Duration> {
        let Some(files) = self.look().await else { return Some(self.interval()) };
        if files == *self.in_use.get_or_insert(files) {
            self.settle();
            return Some(self.interval());
        }
        let known = self.candidate.take().filter(|candidate| candidate.files == files);
        let mut candidate = match known {
            Some(known) if known.tried.elapsed() < self.interval() => known,
            known => self.attempt(files, known).await,
        };
        let pause = match &mut candidate.verdict {
            Verdict::Works(_) => candidate.await_turn(&self.config).await,
            Verdict::Refused(_) | Verdict::Unreachable(_) => Some(self.interval()),
        };
        if pause.is_none() && self.look().await != Some(files) {
            // The files have changed since the test: the process would start with untested content.
            candidate.give_back().await;
            return Some(Duration::ZERO);
        }
        gauge!("postrider_rotation_waiting").set(f64::from(u8::from(candidate.is_waiting())));
        self.candidate = Some(candidate);
        pause
    }

    /// Records that the mounted files are those in use.
    fn settle(&mut self) {
        if self.candidate.take().is_some() {
            tracing::info!("mounted files are those in use again");
            self.check.iter().for_each(Check::pass);
            describe();
        }
    }

    async fn attempt(&self, files: Fingerprint, known: Option<Candidate>) -> Candidate {
        if known.is_none() {
            tracing::info!("mounted files changed, testing them");
        }
        let was_ready = self.trial.is_ready();
        let verdict = self.trial.attempt().await;
        let is_away = !was_ready && !self.trial.is_ready();
        let now = Instant::now();
        let warned = known.as_ref().map(|known| known.warned).filter(|at| at.elapsed() < REMINDER);
        self.report_verdict(&verdict, warned.is_none());
        let (holder, turn) = known.map(|known| (known.holder, known.turn)).unwrap_or_default();
        Candidate { files, verdict, tried: now, warned: warned.unwrap_or(now), is_away, holder, turn }
    }

    fn report_verdict(&self, verdict: &Verdict, log: bool) {
        let again = format!("retried every {} s", self.interval().as_secs_f64());
        match verdict {
            Verdict::Works(_) => {
                report(&BTreeMap::new());
                self.check.iter().for_each(Check::pass);
            }
            Verdict::Refused(parts) => {
                let problem = parts.iter().map(|(what, why)| format!("{what}: {why}")).collect::<Vec<_>>().join("; ");
                if log {
                    tracing::warn!(problem, "rotated secret does not work, keeping the secret in use");
                }
                report(parts);
                self.warn(format!("a rotated secret does not work and is not in use ({again}): {problem}"));
            }
            Verdict::Unreachable(problem) => {
                if log {
                    tracing::info!(problem, "cannot test a rotated secret, a server does not answer");
                }
                report(&BTreeMap::new());
                self.warn(format!("a rotated secret cannot be tested ({again}): {problem}"));
            }
        }
    }
}

impl<T> Watch<T> {
    fn warn(&self, detail: String) {
        self.check.iter().for_each(|check| check.warn(detail.clone()));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::PathBuf,
        sync::{
            Arc, Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use postrider_health::Health;
    use redis::RedisError;

    use super::*;

    /// Accepts any content but `wrong`, and counts the attempts.
    #[derive(Clone)]
    struct Reads {
        file: PathBuf,
        attempts: Arc<AtomicUsize>,
        /// Content that the file gets during the next attempt.
        next: Arc<Mutex<Option<&'static str>>>,
    }

    impl Trial for Reads {
        async fn attempt(&self) -> Verdict {
            let content = fs::read_to_string(&self.file).unwrap();
            if let Some(next) = self.next.lock().unwrap().take() {
                fs::write(&self.file, next).unwrap();
            }
            self.attempts.fetch_add(1, Ordering::Relaxed);
            match content.as_str() {
                "wrong" => Verdict::Refused(BTreeMap::from([("redis", "no".to_owned())])),
                _ => Verdict::Works(None),
            }
        }

        fn is_ready(&self) -> bool {
            true
        }

        async fn noticed(&self) {}

        async fn give_back(&self) -> Result<bool, RedisError> {
            Ok(false)
        }
    }

    fn watching(name: &str, content: &str) -> (Reads, Watch<Reads>, Health) {
        let file = std::env::temp_dir().join(format!("postrider-rotation-{name}-{}", std::process::id()));
        fs::write(&file, content).unwrap();
        let config =
            Config { files: vec![file.display().to_string()], interval_ms: 10, spread_ms: 0, ..Config::default() };
        let in_use = Fingerprint::read(&config.files).ok();
        let (health, attempts) = (Health::default(), Arc::<AtomicUsize>::default());
        let trial = Reads { file, attempts, next: Arc::default() };
        (trial.clone(), Watch::new(config, in_use, trial, &health), health)
    }

    #[tokio::test]
    async fn content_that_does_not_work_is_retried_until_the_old_content_returns() {
        let (trial, mut watch, health) = watching("wrong", "old");
        assert!(watch.step().await.is_some());
        assert_eq!(trial.attempts.load(Ordering::Relaxed), 0);
        fs::write(&trial.file, "wrong").unwrap();
        for attempts in 1..4 {
            assert!(watch.step().await.is_some());
            assert_eq!(trial.attempts.load(Ordering::Relaxed), attempts);
            let (ready, report) = health.readiness();
            assert!(ready, "{report}");
            assert_eq!(report["checks"]["rotation"]["status"], "warning");
            tokio::time::sleep(Duration::from_millis(11)).await;
        }
        fs::write(&trial.file, "old").unwrap();
        assert!(watch.step().await.is_some());
        assert_eq!(health.readiness().1["checks"]["rotation"]["status"], "ok");
        fs::write(&trial.file, "new").unwrap();
        assert!(watch.step().await.is_none());
        fs::remove_file(&trial.file).unwrap();
    }

    #[tokio::test]
    async fn files_that_change_during_an_attempt_are_tested_again() {
        let (trial, mut watch, _health) = watching("moving", "old");
        fs::write(&trial.file, "new").unwrap();
        *trial.next.lock().unwrap() = Some("wrong");
        assert!(watch.step().await.is_some());
        assert!(watch.step().await.is_some(), "the new content does not work");
        fs::write(&trial.file, "newer").unwrap();
        assert!(watch.step().await.is_none());
        fs::remove_file(&trial.file).unwrap();
    }

    #[tokio::test]
    async fn a_file_that_stays_unreadable_causes_a_warning() {
        let (trial, mut watch, health) = watching("unreadable", "old");
        fs::remove_file(&trial.file).unwrap();
        for status in ["ok", "ok", "warning", "warning"] {
            assert!(watch.step().await.is_some());
            assert_eq!(health.readiness().1["checks"]["rotation"]["status"], status);
        }
        fs::write(&trial.file, "old").unwrap();
        assert!(watch.step().await.is_some());
        assert_eq!(health.readiness().1["checks"]["rotation"]["status"], "ok");
        fs::remove_file(&trial.file).unwrap();
    }

    #[tokio::test]
    async fn a_file_that_was_missing_at_first_counts_from_its_first_content_on() {
        let (trial, mut watch, _health) = watching("missing", "old");
        fs::remove_file(&trial.file).unwrap();
        watch.in_use = None;
        assert!(watch.step().await.is_some());
        fs::write(&trial.file, "first").unwrap();
        assert!(watch.step().await.is_some());
        fs::write(&trial.file, "second").unwrap();
        assert!(watch.step().await.is_none());
        fs::remove_file(&trial.file).unwrap();
    }
}
