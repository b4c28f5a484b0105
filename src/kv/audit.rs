//! Reads leave an event in the topic `audit`.

use metrics::{Counter, counter};
use serde::Serialize;
use uuid::Uuid;

use super::AuditMode;
use crate::platform::{
    clock,
    http::{Code, Problem, RequestContext},
    kafka::{
        Outgoing, Producer, TopicsReady,
        event::{self, Event},
    },
};

/// The record's value.
#[derive(Serialize)]
struct Read<'a> {
    event_id: Uuid,
    r#type: &'static str,
    key: &'a str,
    found: bool,
    request_id: &'a str,
    /// Seconds since the epoch.
    timestamp: i64,
}

/// Writes audit events, in the way that is configured.
pub struct Audit {
    mode: AuditMode,
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
    dropped: Counter,
}

impl Audit {
    pub fn new(mode: AuditMode, topic: String, producer: Producer, topics_ready: TopicsReady) -> Self {
        Self { mode, topic, producer, topics_ready, dropped: counter!("postrider_kv_audit_dropped_total") }
    }

    /// Records a read. Fails only where the event is required and could not be stored.
    pub async fn read(&self, context: &RequestContext, key: &str, found: bool) -> Result<(), Problem> {
        if self.mode == AuditMode::Off {
            return Ok(());
        }
        let read = Read {
            event_id: event::new_id(),
            r#type: "KV_READ",
            key,
            found,
            request_id: context.request_id.to_str().unwrap_or_default(),
            timestamp: clock::now_ms() / 1_000,
        };
        let value = serde_json::to_vec(&read).map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
        let event = Event { id: read.event_id, kind: "postrider.kv.read", source: "/kv", trace: context.trace };
        let record = Outgoing {
            topic: &self.topic,
            payload: Some(&value),
            headers: Some(event.headers(0)),
            ..Outgoing::default()
        };
        if self.mode == AuditMode::Async {
            if !self.topics_ready.get() || self.producer.send_and_forget(record).is_err() {
                self.dropped.increment(1);
            }
            return Ok(());
        }
        if !self.topics_ready.get() {
            return Err(Problem::new(Code::KafkaUnavailable, "the read cannot be audited: the topics are not ready"));
        }
        let unaudited = |error| Problem::new(Code::KafkaUnavailable, format!("the read cannot be audited: {error}"));
        self.producer.store(record).await.map(|_| ()).map_err(unaudited)
    }
}
