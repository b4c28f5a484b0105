//! Receivers that connect and disconnect, to exercise presence. At the end, some are connected and
//! some are not.

use std::{collections::BTreeMap, time::Duration};

use fastrand::Rng;
use futures_util::StreamExt;
use reqwest::Client;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    readers::{DEVICES, get},
    senders::Clients,
};
use crate::harness::{socket::connect, wait::seconds};

/// Receivers, and whether they are connected at the end.
const VISITORS: [(&str, bool); 6] =
    [("v0", true), ("v1", false), ("v2", true), ("v3", false), ("v4", true), ("v5", false)];
/// Time limit for a handshake, and for a connection without any frame, not even a ping. After it,
/// the visitor connects to another process.
const PATIENCE: Duration = seconds(3);

/// Returns the tasks of all visitors.
pub fn all(clients: &Clients, seed: u64) -> impl Iterator<Item = impl Future<Output = ()> + Send + use<>> {
    let clients = clients.clone();
    VISITORS.iter().zip(seed..).map(move |((receiver, stays), seed)| {
        let (clients, rng) = (clients.clone(), Rng::with_seed(seed));
        Visitor { clients, receiver, stays: *stays, rng }.run()
    })
}

struct Visitor {
    clients: Clients,
    receiver: &'static str,
    stays: bool,
    rng: Rng,
}

impl Visitor {
    async fn run(mut self) {
        loop {
            self.count(0);
            let calm = self.clients.stop.is_cancelled();
            if calm && !self.stays {
                return;
            }
            self.visit().await;
            self.count(0);
            // Some are back before they count as disconnected.
            let soon = self.rng.bool();
            let away_ms = self.rng.u64(if soon { 10..300 } else { 300..4_000 });
            let _ = self.clients.stop.run_until_cancelled(sleep(Duration::from_millis(away_ms))).await;
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn count(&self, connections: i64) {
        self.clients.ledger.evidence().connected.insert(self.receiver.to_owned(), connections);
    }

    async fn visit(&mut self) {
        let api = self.clients.fleet.api(&mut self.rng);
        let query = format!("?receiverId={}", self.receiver);
        let Ok(Ok((mut socket, _))) = timeout(PATIENCE, connect(&api, &query, &[])).await else { return };
        self.count(1);
        let leaves = Instant::now() + Duration::from_millis(self.rng.u64(100..4_000));
        let stop = self.clients.stop.clone();
        loop {
            tokio::select! {
                frame = timeout(PATIENCE, socket.next()) => {
                    if !matches!(frame, Ok(Some(Ok(_)))) {
                        return;
                    }
                }
                () = sleep_until(leaves), if !stop.is_cancelled() => break,
                () = stop.cancelled(), if !self.stays => break,
            }
        }
        if self.rng.bool() {
            let _ = timeout(Duration::from_millis(200), socket.close(None)).await;
        }
    }
}

/// Returns the number of devices of each receiver; visitors record their own connections.
pub fn devices() -> BTreeMap<String, i64> {
    let mut counts = BTreeMap::new();
    for (receiver, _) in DEVICES {
        *counts.entry(receiver.to_owned()).or_default() += 1;
    }
    counts
}

/// Asks the API for the number of connections of each receiver, `None` if it is disconnected.
/// Leaves out receivers for which the API returns an error.
pub async fn present(
    client: &Client,
    api: &str,
    receivers: impl IntoIterator<Item = String>,
) -> BTreeMap<String, Option<i64>> {
    let mut present = BTreeMap::new();
    for receiver in receivers {
        let found = get(client, &format!("{api}/api/v1/presence/{receiver}")).await;
        let Some(found) = found.filter(|found| found.status == 200).map(|found| found.json()) else { continue };
        let connected = found["state"] == "connected";
        present.insert(receiver, connected.then(|| found["connections"].as_i64().unwrap_or(-1)));
    }
    present
}
