//! Bodies of `/produce` that are read or written without a serializer, for the API description.

use serde::Serialize;
use utoipa::ToSchema;

/// Records, one `ProduceRecord` per line.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "describes a body that is read as it arrives")]
pub struct RecordStream(Vec<u8>);

/// Response for one stored record.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordProduced)]
pub struct Produced {
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
pub enum ProduceAnswer {
    Record(Produced),
    Batch(BatchAnswer),
}

/// Response for a batch.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchProduced)]
pub struct BatchAnswer {
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
pub enum PartResult {
    Stored(PartStored),
    Failed(PartFailed),
}

/// Result of a stored record.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordStored)]
pub struct PartStored {
    /// Always true.
    success: bool,
    topic: String,
    partition: i32,
    offset: i64,
}

/// Result of a record that is not known to be stored.
#[derive(Serialize, ToSchema)]
#[schema(as = RecordFailed)]
pub struct PartFailed {
    /// Always false.
    success: bool,
    /// The stable error code; see docs/errors.md.
    code: String,
    /// The HTTP status that the record would get alone.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// A sentence about this failure.
    error: String,
}
