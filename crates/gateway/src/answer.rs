//! Answers to produced records: of one, of a batch, and of the records in it.

use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use postrider_http::{Problem, ProblemItem};
use postrider_kafka::Stored;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// Records, one `ProduceRecord` per line.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "describes a body that is read as it arrives")]
pub(super) struct RecordStream(Vec<u8>);

/// Response for one stored record.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordProduced)]
pub(super) struct Produced {
    /// Always true.
    success: bool,
    /// `Message delivered to topic …, partition …, offset …`
    message: String,
    topic: String,
    partition: i32,
    offset: i64,
}

/// Response for one record or a batch.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
#[schema(as = ProduceResponse)]
pub(super) enum ProduceAnswer {
    Record(Produced),
    Batch(BatchAnswer),
}

/// Response for a batch.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchProduced)]
pub(super) struct BatchAnswer {
    /// True if every record is stored.
    success: bool,
    /// One result per record, in order.
    results: Vec<PartResult>,
}

/// Result of one record of a batch or stream.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
#[schema(as = RecordResult)]
pub(super) enum PartResult {
    Stored(PartStored),
    Failed(PartFailed),
}

/// Result of a stored record.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordStored)]
pub(super) struct PartStored {
    /// Always true.
    success: bool,
    topic: String,
    partition: i32,
    offset: i64,
    /// Unknown fields of the record that are near a known one.
    #[schema(nullable = false)]
    warnings: Option<Vec<String>>,
}

/// Result of a record that is not known to be stored.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordFailed)]
pub(super) struct PartFailed {
    /// Always false.
    success: bool,
    /// The stable error code; see docs/errors.md.
    code: String,
    /// The HTTP status that the record would get alone.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// A sentence about this failure.
    error: String,
    /// Parts of the record that are wrong. Pointers of a batch lead into its body, those of a
    /// stream into the line.
    #[schema(nullable = false)]
    errors: Option<Vec<ProblemItem>>,
    /// Unknown fields of the record that are near a known one.
    #[schema(nullable = false)]
    warnings: Option<Vec<String>>,
}

/// Returns the result object of one record.
pub(super) fn part_result(outcome: Result<(String, Stored), Problem>) -> Value {
    match outcome {
        Ok((topic, stored)) => {
            json!({"success": true, "topic": topic, "partition": stored.partition, "offset": stored.offset})
        }
        Err(mut problem) => {
            let mut result = json!({
                "success": false, "code": problem.code.word, "status": problem.code.status.as_u16(), "error": problem.detail,
            });
            if let Some(errors) = problem.extensions.remove("errors") {
                result["errors"] = errors;
            }
            result
        }
    }
}

/// Writes the response for one record without a serializer: topic names need no escaping.
pub(super) fn produced(topic: &str, stored: Stored) -> Vec<u8> {
    let (mut partition, mut offset) = (itoa::Buffer::new(), itoa::Buffer::new());
    let (partition, offset) = (partition.format(stored.partition), offset.format(stored.offset));
    let mut out = Vec::with_capacity(160 + 2 * topic.len());
    for piece in [
        r#"{"success":true,"message":"Message delivered to topic "#,
        topic,
        ", partition ",
        partition,
        ", offset ",
        offset,
        r#"","topic":""#,
        topic,
        r#"","partition":"#,
        partition,
        r#","offset":"#,
        offset,
        "}",
    ] {
        out.extend_from_slice(piece.as_bytes());
    }
    out
}

pub(super) fn json_response(status: u16, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = axum::http::StatusCode::from_u16(status).unwrap_or_default();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_response_has_the_fields_that_older_clients_read() {
        let answer = produced("my-topic", Stored { partition: 2, offset: 41 });
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let expected = json!({
            "success": true, "message": "Message delivered to topic my-topic, partition 2, offset 41",
            "topic": "my-topic", "partition": 2, "offset": 41,
        });
        assert_eq!(answer, expected);
    }
}
