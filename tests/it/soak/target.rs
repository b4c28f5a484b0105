//! The HTTP target of the relay: records what arrives, and fails on demand.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::StatusCode, routing::post};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    inject::{Inject, Injection},
    ledger::{Delivery, Ledger, Topic},
    tail::number_of,
};
use crate::harness::proxy::Proxy;

/// The target's response to requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Manner {
    Take,
    /// Responds with 500 and does not accept the record.
    Fail,
    /// Does not respond and does not accept the record.
    Hang,
}

/// A server behind a proxy, which can lose its responses.
pub struct Target {
    pub proxy: Proxy,
    desk: Arc<Desk>,
    server: JoinHandle<()>,
}

struct Desk {
    ledger: Ledger,
    manner: AtomicU8,
    injection: Injection,
    /// Deliveries, by key, that are recorded after the next delivery of the key.
    held: Mutex<BTreeMap<String, Delivery>>,
}

impl Target {
    pub async fn start(ledger: Ledger, injection: Injection) -> Self {
        let manner = AtomicU8::new(Manner::Take as u8);
        let desk = Arc::new(Desk { ledger, manner, injection, held: Mutex::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start().await;
        proxy.lead_to(&listener.local_addr().unwrap().to_string());
        let router = Router::new().route("/hook", post(take)).with_state(desk.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { proxy, desk, server }
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.proxy.address)
    }

    pub fn set(&self, manner: Manner) {
        self.desk.manner.store(manner as u8, Ordering::Relaxed);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn take(State(desk): State<Arc<Desk>>, body: Bytes) -> StatusCode {
    let manner = desk.manner.load(Ordering::Relaxed);
    // Some requests always fail, so that there are always retries.
    let moody = fastrand::u8(..) < 5;
    let taken = manner == Manner::Take as u8 && !moody;
    desk.write_down(&body, taken);
    if manner == Manner::Hang as u8 {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..10))).await;
    if taken { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
}

impl Desk {
    fn write_down(&self, body: &[u8], taken: bool) {
        let Ok(body) = serde_json::from_slice::<Value>(body) else {
            return self.ledger.incident(format!("the target got {:?}", String::from_utf8_lossy(body)));
        };
        let place = body["partition"].as_i64().zip(body["offset"].as_i64());
        let Some((partition, offset)) = place else {
            return self.ledger.incident(format!("the target got {body}"));
        };
        let delivery = Delivery {
            place: (partition as i32, offset),
            key: body["key"].as_str().unwrap_or_default().to_owned(),
            number: number_of(Topic::Orders, &body["value"]),
            taken,
            at_ms: self.ledger.now_ms(),
        };
        if taken && self.injection.now(Inject::Drop) {
            return;
        }
        let mut held = self.held.lock().unwrap();
        let mut evidence = self.ledger.evidence();
        if taken && self.injection.now(Inject::Swap) {
            held.insert(delivery.key.clone(), delivery);
            return;
        }
        let late = held.remove(&delivery.key);
        evidence.deliveries.push(delivery);
        evidence.deliveries.extend(late);
    }
}
