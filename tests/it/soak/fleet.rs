//! The product's processes: kills, freezes and restarts them, and reports deaths that no fault
//! caused.

use std::{
    fs,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use reqwest::Client;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::Mutex;

use super::ledger::Ledger;
use crate::harness::{App, World, app::Builder, wait::seconds};

/// Limit of a process's resident memory, several times what it needs here.
pub const MAX_RSS_KIB: u64 = 400 << 10;
/// Time limit for an orderly stop.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// One process of the fleet, which may be replaced by a new one.
pub struct Member {
    pub name: String,
    role: &'static str,
    build: Box<dyn Fn() -> Builder + Send + Sync>,
    app: Mutex<Option<App>>,
    /// Separate from `app`, so that readers do not wait for a restart.
    address: RwLock<Address>,
    /// True while no fault is ending the process.
    wanted: AtomicBool,
}

#[derive(Default, Clone)]
struct Address {
    api: String,
    management: String,
    pid: u32,
}

impl Member {
    pub async fn start(name: &str, role: &'static str, build: impl Fn() -> Builder + Send + Sync + 'static) -> Self {
        let member = Self {
            name: name.to_owned(),
            role,
            build: Box::new(build),
            app: Mutex::default(),
            address: RwLock::default(),
            wanted: AtomicBool::new(false),
        };
        member.revive().await;
        member
    }

    fn address(&self) -> Address {
        self.address.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts a process; does not wait until it is ready.
    pub async fn revive(&self) {
        let mut place = self.app.lock().await;
        let app = (self.build)().role(self.role).even_if_not_ready().start().await;
        let address = Address { api: app.api.clone(), management: app.management.clone(), pid: app.pid() };
        *self.address.write().unwrap_or_else(PoisonError::into_inner) = address;
        *place = Some(app);
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Kills the process with SIGKILL.
    pub async fn kill(&self, ledger: &Ledger) {
        self.signal(Signal::KILL, ledger).await;
        self.bury(ledger, false).await;
    }

    /// Sends SIGTERM; the process must exit with code 0.
    pub async fn stop(&self, ledger: &Ledger) {
        self.signal(Signal::TERM, ledger).await;
        self.bury(ledger, true).await;
    }

    async fn signal(&self, signal: Signal, ledger: &Ledger) {
        let mut place = self.app.lock().await;
        if let Some(app) = place.as_mut() {
            self.check(app, ledger);
            self.wanted.store(false, Ordering::Relaxed);
            if app.ended().is_none() {
                app.signal(signal);
            }
        }
    }

    pub async fn freeze(&self) {
        self.send(Signal::STOP).await;
    }

    pub async fn thaw(&self) {
        self.send(Signal::CONT).await;
    }

    async fn send(&self, signal: Signal) {
        if let Some(app) = self.app.lock().await.as_mut()
            && app.ended().is_none()
        {
            app.signal(signal);
        }
    }

    /// Waits until the process ends, and checks its exit code and its log.
    async fn bury(&self, ledger: &Ledger, well: bool) {
        let Some(mut app) = self.app.lock().await.take() else { return };
        let log = app.log_path().display().to_string();
        let ended = tokio::time::timeout(STOP_PATIENCE, async {
            loop {
                if let Some(status) = app.ended() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match ended.await {
            Ok(status) if well && !status.success() => {
                ledger.incident(format!("{} ended with {status} after SIGTERM: {log}", self.name));
            }
            Ok(_) => {}
            Err(_) => ledger.incident(format!("{} did not stop within {STOP_PATIENCE:?}: {log}", self.name)),
        }
        if app.log().contains("panicked") {
            ledger.incident(format!("{} panicked: {log}", self.name));
            // Dropping `app` would fail the test before the report is printed.
            let pid = Pid::from_raw(i32::try_from(app.pid()).unwrap()).unwrap();
            let _ = kill_process(pid, Signal::KILL);
            std::mem::forget(app);
        }
    }

    /// Reports a process that ended although no fault ended it.
    fn check(&self, app: &mut App, ledger: &Ledger) {
        let wanted = self.wanted.load(Ordering::Relaxed);
        if let Some(status) = app.ended().filter(|_| wanted) {
            self.wanted.store(false, Ordering::Relaxed);
            ledger.incident(format!("{} died unexpectedly with {status}: {}", self.name, app.log_path().display()));
        }
    }

    fn watch(&self, ledger: &Ledger) {
        if let Ok(mut place) = self.app.try_lock()
            && let Some(app) = place.as_mut()
        {
            self.check(app, ledger);
        }
        let Some(rss_kib) = rss_kib(self.address().pid) else { return };
        let mut evidence = ledger.evidence();
        let peak = evidence.peak_rss_kib.entry(self.role).or_default();
        let swollen = rss_kib > MAX_RSS_KIB && *peak <= MAX_RSS_KIB;
        *peak = (*peak).max(rss_kib);
        drop(evidence);
        if swollen {
            ledger.incident(format!("{} has {} MiB resident", self.name, rss_kib >> 10));
        }
    }
}

fn rss_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// All processes of the run.
pub struct Fleet {
    pub members: Vec<Member>,
    /// The full name of the key-value topic.
    pub messages: String,
}

impl Fleet {
    /// Starts two processes of each role; `relays` configures the relay routes.
    pub async fn start(world: &Arc<World>, relays: &str) -> Self {
        let places = ["api", "processor", "relay"].into_iter().flat_map(|role| [(role, 1), (role, 2)]);
        let members = places.map(|(role, number)| {
            let (world, relays) = (world.clone(), relays.to_owned());
            let build = move || world.app().env("POSTRIDER_GATEWAY__RELAYS", &relays);
            async move { Member::start(&format!("{role}-{number}"), role, build).await }
        });
        let members = futures_util::future::join_all(members).await;
        Self { members, messages: world.topic("messages") }
    }

    /// Returns the address of a random api process, which may be down.
    pub fn api(&self, rng: &mut Rng) -> String {
        let apis: Vec<&Member> = self.members.iter().filter(|member| member.role == "api").collect();
        apis[rng.usize(..apis.len())].address().api
    }

    /// Checks all processes once a second, until it is dropped.
    pub async fn watch(&self, ledger: &Ledger) {
        loop {
            self.members.iter().for_each(|member| member.watch(ledger));
            tokio::time::sleep(seconds(1)).await;
        }
    }

    /// Returns the processes that are not ready, with the reasons.
    pub async fn unready(&self, client: &Client) -> Vec<String> {
        let mut unready = Vec::new();
        for member in &self.members {
            let url = format!("{}/readyz?verbose", member.address().management);
            match client.get(url).send().await {
                Ok(answer) if answer.status() == 200 => {}
                Ok(answer) => {
                    unready.push(format!("{}: {}", member.name, answer.text().await.unwrap_or_default()));
                }
                Err(error) => unready.push(format!("{}: {error}", member.name)),
            }
        }
        unready
    }

    pub async fn stop(&self, ledger: &Ledger) {
        for member in &self.members {
            member.stop(ledger).await;
        }
    }
}
