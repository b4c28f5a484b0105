//! The event `message.undelivered` about a message that was not delivered in time.

use postrider_kafka::event::Event;
use postrider_telemetry::trace_context::TraceContext;
use postrider_time::clock;
use rdkafka::message::OwnedHeaders;
use serde::Serialize;
use uuid::Uuid;

use super::store::Row;
use crate::cursor::Cursor;

/// Namespace of ids that are derived from a message's id and its receiver.
const NAMESPACE: Uuid = Uuid::from_u128(0x27a5_8f6e_9b34_5c1d_8e02_41b7_c9d3_60fa);

/// Names in `snake_case` are former ones, which readers may still use.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Head<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    receiver_id: &'a str,
    #[serde(rename = "receiver_id")]
    former_receiver_id: &'a str,
    /// Event id of the message.
    event_id: &'a str,
    #[serde(rename = "event_id")]
    former_event_id: &'a str,
    /// Cursor that acknowledges the message.
    cursor: String,
    partition: i32,
    offset: i64,
    created_at: String,
    #[serde(rename = "created_at")]
    former_created_at: String,
    stored_at: String,
    #[serde(rename = "stored_at")]
    former_stored_at: String,
}

/// Returns the value of the record. `data` is null if the message is too large to be repeated.
pub fn value(row: &Row, with_data: bool) -> Vec<u8> {
    let cursor: Cursor = [(row.partition_id(), row.offset)].into_iter().collect();
    let (created_at, stored_at) = (clock::rfc3339(row.created_ms), clock::rfc3339(row.stored_ms));
    let head = Head {
        kind: "message.undelivered",
        receiver_id: &row.receiver_id,
        former_receiver_id: &row.receiver_id,
        event_id: &row.event_id,
        former_event_id: &row.event_id,
        cursor: cursor.to_string(),
        partition: row.partition_id().partition,
        offset: row.offset,
        former_created_at: created_at.clone(),
        created_at,
        former_stored_at: stored_at.clone(),
        stored_at,
    };
    // Serializing strings and numbers cannot fail.
    let mut value = serde_json::to_vec(&head).unwrap_or_default();
    let data = row.value.as_deref().filter(|_| with_data).unwrap_or("null");
    value.pop();
    value.extend_from_slice(b",\"data\":");
    value.extend_from_slice(data.as_bytes());
    value.push(b'}');
    value
}

/// Returns the headers of the record. The id is the same whenever the event of a message is
/// repeated.
pub fn headers(row: &Row) -> OwnedHeaders {
    let id = Uuid::new_v5(&NAMESPACE, format!("{} {}", row.event_id, row.receiver_id).as_bytes());
    let (kind, source) = ("postrider.message.undelivered", "/messages");
    Event { id, kind, source, trace: TraceContext::root() }.headers(0)
}
