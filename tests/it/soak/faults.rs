//! What goes wrong, one every few seconds, chosen by a seeded chance.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    fleet::Fleet,
    ledger::{Fault, Ledger},
    target::{Manner, Target},
};
use crate::harness::{
    Stack,
    proxy::{Mode, Proxy},
};

/// What can be broken.
pub struct Site {
    pub fleet: Arc<Fleet>,
    pub target: Target,
    /// Between the product and the servers, by the servers' names.
    pub proxies: [(&'static str, Proxy); 3],
    pub ledger: Ledger,
    pub stack: Stack,
}

/// One kind of fault; the name is also what the report sorts by.
const KINDS: [&str; 19] = [
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
    "redis emptied",
    "redis killed",
    "redis frozen",
    "postgres killed",
    "postgres restarted",
    "target fails",
    "answers lost",
];

impl Site {
    /// Breaks and mends, until told to stop; nothing is broken when it returns.
    pub async fn trouble(&self, mut rng: Rng, stop: &CancellationToken) {
        let mut deck: Vec<&'static str> = Vec::new();
        while !stop.is_cancelled() {
            if deck.is_empty() {
                // Each kind once before any comes again.
                deck.extend(KINDS);
                rng.shuffle(&mut deck);
            }
            let kind = deck.pop().unwrap_or(KINDS[0]);
            // Now and then a second one comes before the first is over.
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
        }
    }

    async fn fault(&self, kind: &'static str, rng: &mut Rng) {
        let from_ms = self.ledger.now_ms();
        let what = match part(kind) {
            _ if kind == "answers lost" => self.answers(rng).await,
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
        format!("{service} stood still")
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
        ["answers 500", "hangs", "is down", "takes it and its answer is lost"][usize::from(how)].to_owned()
    }

    /// Servers do what they are asked, and nobody hears of it.
    async fn answers(&self, rng: &mut Rng) -> String {
        let (server, proxy) = &self.proxies[rng.usize(..self.proxies.len())];
        let mode = if rng.bool() { Mode::CutResponses } else { Mode::MuteResponses };
        proxy.set(mode);
        sleep(Duration::from_millis(rng.u64(1_000..4_000))).await;
        proxy.set(Mode::Pass);
        format!("{mode:?} of {server}")
    }
}

/// What a fault breaks; two at a time never break the same.
fn part(kind: &str) -> &str {
    match kind {
        // A proxy in front of a server that is down tells nothing.
        "answers lost" => "kafka",
        _ => kind.split(' ').next().unwrap_or(kind),
    }
}
