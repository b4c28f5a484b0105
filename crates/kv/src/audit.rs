//! Writes an event to the topic `audit` for every read.

use std::time::Duration;

use axum::http::HeaderValue;
use metrics::{Counter, counter};
use postrider_http::{Code, Problem, RequestContext};
use postrider_kafka::{
    Outgoing, Producer, SendError, TopicsReady,
    event::{self, Event},
};
use postrider_telemetry::trace_context::TraceContext;
use postrider_time::clock;
use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::AuditMode;

/// Time for which events are collected. No response waits for them, and many at once cost Kafka and
/// its client less than one at a time.
const GATHER: Duration = Duration::from_millis(5);
/// Maximum number of queued events; further ones are dropped and counted.
const QUEUE: usize = 4_096;

/// A read that was answered.
struct Read {
    id: Uuid,
    key: String,
    found: bool,
    request_id: HeaderValue,
    trace: TraceContext,
    at_ms: i64,
}

/// Value of the audit record.
#[derive(Serialize)]
struct Value<'a> {
    event_id: Uuid,
    r#type: &'static str,
    key: &'a str,
    found: bool,
    request_id: &'a str,
    /// Seconds since the Unix epoch.
    timestamp: i64,
}

impl Read {
    fn new(context: &RequestContext, key: &str, found: bool) -> Self {
        Self {
            id: event::new_id(),
            key: key.to_owned(),
            found,
            request_id: context.request_id.clone(),
            trace: context.trace,
            at_ms: clock::now_ms(),
        }
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        let value = Value {
            event_id: self.id,
            r#type: "KV_READ",
            key: &self.key,
            found: self.found,
            request_id: self.request_id.to_str().unwrap_or_default(),
            timestamp: self.at_ms / 1_000,
        };
        serde_json::to_writer(out, &value)
    }
}

/// Writes audit events in the configured mode.
pub struct Audit {
    mode: AuditMode,
    events: Events,
    queue: mpsc::Sender<Read>,
    dropped: Counter,
}

/// State shared by both modes.
#[derive(Clone)]
struct Events {
    topic: String,
    producer: Producer,
    topics_ready: TopicsReady,
}

impl Events {
    fn outgoing<'a>(&'a self, read: &Read, value: &'a [u8]) -> Outgoing<'a> {
        let event = Event { id: read.id, kind: "postrider.kv.read", source: "/kv", trace: read.trace };
        Outgoing { topic: &self.topic, payload: Some(value), headers: Some(event.headers(0)), ..Outgoing::default() }
    }
}

impl Audit {
    /// Returns the writer and the task that sends queued events to Kafka; see
    /// [`Carrying::until_closed`].
    pub fn new(mode: AuditMode, topic: String, producer: Producer, topics_ready: TopicsReady) -> (Self, Carrying) {
        let events = Events { topic, producer, topics_ready };
        let dropped = counter!("postrider_kv_audit_dropped_total");
        let (queue, reads) = mpsc::channel(QUEUE);
        let carrying = Carrying { reads, events: events.clone(), dropped: dropped.clone() };
        (Self { mode, events, queue, dropped }, carrying)
    }

    /// Records a read. Fails only in the mode `required`, if the event could not be stored.
    pub async fn read(&self, context: &RequestContext, key: &str, found: bool) -> Result<(), Problem> {
        match self.mode {
            AuditMode::Off => Ok(()),
            AuditMode::Async => {
                // While Kafka is unavailable, events are dropped here rather than queued.
                let events = &self.events;
                let queued = events.topics_ready.get()
                    && events.producer.is_up()
                    && self.queue.try_send(Read::new(context, key, found)).is_ok();
                if !queued {
                    self.dropped.increment(1);
                }
                Ok(())
            }
            AuditMode::Required => self.store(&Read::new(context, key, found)).await,
        }
    }

    async fn store(&self, read: &Read) -> Result<(), Problem> {
        let audit_failed = |reason: &str| {
            Problem::new(Code::KAFKA_UNAVAILABLE, format!("the audit event of this read cannot be stored: {reason}"))
        };
        if !self.events.topics_ready.get() {
            return Err(audit_failed("the topics are not ready"));
        }
        let mut value = Vec::with_capacity(256);
        read.write(&mut value).map_err(|error| Problem::new(Code::INTERNAL, error.to_string()))?;
        let stored = self.events.producer.store(self.events.outgoing(read, &value)).await;
        stored.map(|_| ()).map_err(|error: SendError| audit_failed(&error.to_string()))
    }
}

/// The task that sends queued events to Kafka, off the request path.
pub struct Carrying {
    reads: mpsc::Receiver<Read>,
    events: Events,
    dropped: Counter,
}

impl Carrying {
    /// Runs until every [`Audit`] is dropped and all events are passed to the producer.
    pub async fn until_closed(mut self) {
        let (mut gathered, mut value) = (Vec::with_capacity(QUEUE), Vec::with_capacity(256));
        while self.reads.recv_many(&mut gathered, QUEUE).await > 0 {
            for read in gathered.drain(..) {
                value.clear();
                let sent = self.events.topics_ready.get()
                    && read.write(&mut value).is_ok()
                    && self.events.producer.send_and_forget(self.events.outgoing(&read, &value)).is_ok();
                if !sent {
                    self.dropped.increment(1);
                }
            }
            tokio::time::sleep(GATHER).await;
        }
    }
}
