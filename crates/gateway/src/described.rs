//! The body of `/produce` for the API description. The handler reads a borrowed twin of it.

use std::collections::BTreeMap;

use utoipa::ToSchema;

/// One record to produce, or a batch of them in `records`. A single record needs a topic, here or
/// in the query, and `payload` or `payload_base64`.
#[derive(ToSchema)]
#[schema(examples(
    json!({"topic": "my-topic", "key": "optional-key", "payload": {"message": "Hello Kafka!"}}),
    json!({"topic": "my-topic", "records": [{"key": "a", "payload": 1}, {"key": "a", "payload": 2}]}),
))]
#[expect(dead_code, reason = "describes the JSON; the handler reads a borrowed twin")]
pub struct ProduceRequest {
    #[serde(flatten)]
    record: ProduceRecord,
    /// A batch: these records instead of a single one.
    #[schema(nullable = false)]
    records: Option<Vec<ProduceRecord>>,
}

/// One record to produce. It needs `payload` or `payload_base64`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the JSON; the handler reads a borrowed twin")]
struct ProduceRecord {
    /// Topic; required unless `?topic=` or the batch names one.
    topic: Option<String>,
    /// Determines the partition; records with the same key stay in order.
    key: Option<String>,
    /// Binary key, instead of `key`.
    #[schema(content_encoding = "base64")]
    key_base64: Option<String>,
    /// Any JSON value; stored minified, otherwise unchanged.
    payload: Option<serde_json::Value>,
    /// Binary payload, instead of `payload`.
    #[schema(content_encoding = "base64")]
    payload_base64: Option<String>,
    /// Record headers; `ce_…` and `traceparent` are reserved.
    headers: Option<BTreeMap<String, String>>,
    /// Partition, from 0; overrides the partition that the key hashes to.
    partition: Option<i32>,
    /// Milliseconds since the Unix epoch, or an RFC 3339 time.
    timestamp: Option<serde_json::Value>,
}
