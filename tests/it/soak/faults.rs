//! The faults: one every few seconds, in a random order that the seed determines.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    fleet::Fleet,
    ledger::{Fault, Ledger},
    recovery::{longest_ms, missing},
    target::{Manner, Target},
};
use crate::harness::{
    Stack,
    proxy::{Mode, Proxy},
    sessions::Notebook,
};

/// Everything that faults can break.
pub struct Site {
    pub fleet: Arc<Fleet>,
    pub target: Target,
    /// The proxies between the product and the servers, by the servers' names.
    pub proxies: [(&'static str, Proxy); 3],
    pub ledger: Ledger,
    pub notebook: Notebook,
    pub stack: Stack,
}

/// Kinds of faults: the part that is broken, and how. Each has a bound in `recovery.rs`.
pub const KINDS: [&str; 25] = [
    "api killed",
    "api frozen",
    "api restarted",
    "processor killed",
    "processor frozen",
    "processor restarted",
    "relay killed",
    "relay frozen",
    "relay restarted",
    "kafka killed",
    "kafka restarted",
    "kafka frozen",
    "kafka answers lost",
    "kafka black hole",
    "redis emptied",
    "redis killed",
    "redis frozen",
    "redis answers lost",
    "redis black hole",
    "postgres killed",
    "postgres restarted",
    "postgres frozen",
    "postgres answers lost",
    "postgres black hole",
    "target fails",
];

/// The percentage of faults after which the next one waits until all services are back.
const AWAITED: u8 = 35;

impl Site {
    /// Injects faults until the stop; none is active when it returns.
    pub async fn trouble(&self, mut rng: Rng, stop: &CancellationToken) {
        let mut deck: Vec<&'static str> = Vec::new();
        while !stop.is_cancelled() {
            if deck.is_empty() {
                // Each kind once before any comes again.
                deck.extend(KINDS);
                rng.shuffle(&mut deck);
            }
            let kind = deck.pop().unwrap_or(KINDS[0]);
            // Sometimes a second fault overlaps with the first.
            let second = (rng.u8(0..100) < 20).then(|| deck.pop()).flatten();
            let (mut one, mut other) = (rng.fork(), rng.fork());
            let apart = second.is_none_or(|second| part(second) != part(kind));
            tokio::join!(self.fault(kind, &mut one), async {
                if let Some(second) = second.filter(|_| apart) {
                    sleep(Duration::from_millis(500)).await;
                    self.fault(second, &mut other).await;
                }
            });
            let pause = Duration::from_millis(rng.u64(500..3_000));
            let _ = stop.run_until_cancelled(sleep(pause)).await;
            if rng.u8(0..100) < AWAITED {
                self.await_recovery().await;
            }
        }
        self.await_recovery().await;
    }

    /// Waits until all services are back after the last faults, or until their bounds have passed.
    async fn await_recovery(&self) {
        let (ended_ms, due_ms) = {
            let evidence = self.ledger.evidence();
            let ends = evidence.faults.iter().map(|fault| (fault.to_ms, fault.to_ms + longest_ms(fault.kind)));
            ends.fold((0, 0), |(ended_ms, due_ms), (end, due)| (ended_ms.max(end), due_ms.max(due)))
        };
        while self.ledger.now_ms() <= due_ms + 100 {
            let frame_ms = self.notebook.last_ms();
            if missing(&self.ledger.evidence(), frame_ms, ended_ms).is_empty() {
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn fault(&self, kind: &'static str, rng: &mut Rng) {
        let from_ms = self.ledger.now_ms();
        let what = match part(kind) {
            part if kind.ends_with("answers lost") => {
                self.answers(part, if rng.bool() { Mode::CutResponses } else { Mode::MuteResponses }, rng).await
            }
            part if kind.ends_with("black hole") => self.answers(part, Mode::BlackHole, rng).await,
            "api" | "processor" | "relay" => self.process(kind, rng).await,
            "kafka" => self.kafka(kind, rng).await,
            "redis" => self.redis(kind, rng).await,
            "postgres" => self.postgres(kind, rng).await,
            _ => self.target(rng).await,
        };
        let to_ms = self.ledger.now_ms();
        eprintln!("soak: {:6.1} s  {kind}: {what}, {:.1} s", from_ms as f64 / 1e3, (to_ms - from_ms) as f64 / 1e3);
        self.ledger.evidence().faults.push(Fault { kind, what, from_ms, to_ms });
    }

    async fn process(&self, kind: &str, rng: &mut Rng) -> String {
        let name = format!("{}-{}", part(kind), rng.u8(1..=2));
        let Some(member) = self.fleet.members.iter().find(|member| member.name == name) else { return name };
        match kind.rsplit(' ').next() {
            Some("killed") => {
                member.kill(&self.ledger).await;
                sleep(Duration::from_millis(rng.u64(0..3_000))).await;
                member.revive().await;
            }
            // Sometimes longer than the group waits for a member.
            Some("frozen") => {
                member.freeze().await;
                sleep(Duration::from_millis(rng.u64(1_000..9_000))).await;
                member.thaw().await;
            }
            _ => {
                member.stop(&self.ledger).await;
                member.revive().await;
            }
        }
        name
    }

    async fn frozen(&self, service: &str, rng: &mut Rng) -> String {
        self.stack.ctl(&["pause", service]).await;
        sleep(Duration::from_millis(rng.u64(1_000..6_000))).await;
        self.stack.ctl(&["resume", service]).await;
        format!("{service} was frozen")
    }

    async fn kafka(&self, kind: &str, rng: &mut Rng) -> String {
        match kind {
            "kafka killed" => {
                self.stack.ctl(&["kill", "kafka"]).await;
                sleep(Duration::from_millis(rng.u64(0..2_000))).await;
                self.stack.ctl(&["start", "kafka"]).await;
            }
            "kafka restarted" => self.stack.ctl(&["restart", "kafka"]).await,
            _ => return self.frozen("kafka", rng).await,
        }
        "the broker".to_owned()
    }

    async fn redis(&self, kind: &str, rng: &mut Rng) -> String {
        match kind {
            "redis emptied" => {
                crate::harness::redis::run::<String>(self.stack.get("REDIS_URL"), &["FLUSHALL"]).await;
                "FLUSHALL".to_owned()
            }
            "redis killed" => {
                self.stack.ctl(&["kill", "redis"]).await;
                sleep(Duration::from_millis(rng.u64(0..2_000))).await;
                self.stack.ctl(&["start", "redis"]).await;
                "came back empty".to_owned()
            }
            _ => self.frozen("redis", rng).await,
        }
    }

    async fn postgres(&self, kind: &str, rng: &mut Rng) -> String {
        if kind == "postgres frozen" {
            return self.frozen("postgres", rng).await;
        }
        if kind == "postgres killed" {
            self.stack.ctl(&["kill", "postgres"]).await;
            sleep(Duration::from_millis(rng.u64(0..2_000))).await;
            self.stack.ctl(&["start", "postgres"]).await;
            return "with all its backends".to_owned();
        }
        let how = if rng.bool() { &["--immediate"][..] } else { &[] };
        self.stack.ctl(&[&["restart", "postgres"], how].concat()).await;
        how.join(" ")
    }

    async fn target(&self, rng: &mut Rng) -> String {
        let how = rng.u8(0..4);
        match how {
            0 => self.target.set(Manner::Fail),
            1 => self.target.set(Manner::Hang),
            2 => self.target.proxy.set(Mode::Down),
            _ => self.target.proxy.set(Mode::CutResponses),
        }
        sleep(Duration::from_millis(rng.u64(1_000..6_000))).await;
        self.target.set(Manner::Take);
        self.target.proxy.set(Mode::Pass);
        ["answers 500", "hangs", "is down", "accepts records but its responses are lost"][usize::from(how)].to_owned()
    }

    /// Lets a server execute requests, but loses its answers.
    async fn answers(&self, server: &str, mode: Mode, rng: &mut Rng) -> String {
        if let Some((_, proxy)) = self.proxies.iter().find(|(name, _)| *name == server) {
            proxy.set(mode);
            sleep(Duration::from_millis(rng.u64(1_000..4_000))).await;
            proxy.set(Mode::Pass);
        }
        format!("{mode:?} of {server}")
    }
}

/// Returns the part that a fault breaks. Two faults at a time never break the same part.
fn part(kind: &str) -> &str {
    kind.split(' ').next().unwrap_or(kind)
}
