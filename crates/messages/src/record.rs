//! Converts a record of the topic into a row.

use postrider_http::Code;
use postrider_kafka::{PartitionId, batch::Record, dead_letter::Reason, event};
use uuid::Uuid;

use super::{
    model::{self, Flaw, Unaddressed},
    store::Row,
};

/// Latest time that RFC 3339 can represent, in milliseconds since the Unix epoch.
const MAX_CREATED_MS: i64 = 253_402_300_799_999;
/// Namespace of event ids that are derived from a record's position.
const POSITION_NAMESPACE: Uuid = Uuid::from_u128(0x8c1f_02d6_5a3b_5e47_b0aa_93cf_6d21_7e58);

/// Returns the row of a record, or the reason why the record is not a valid message.
pub fn row(record: &Record<'_>, partition_id: PartitionId) -> Result<Row, Reason> {
    let Some(value) = record.value() else {
        return Err(Reason { class: "no_value", message: "the record has no value".to_owned() });
    };
    let receiver = model::receiver(value).map_err(|error| {
        let class = match &error {
            Unaddressed::Body(problem) if problem.code == Code::INVALID_JSON => "not_json",
            Unaddressed::Body(_) => "wrong_type",
            Unaddressed::Id(Flaw::TooLong(..)) => "receiver_too_long",
            Unaddressed::Id(Flaw::Missing(_)) => "no_receiver",
            Unaddressed::Id(Flaw::Nul(_)) => "null_character",
        };
        Reason { class, message: error.to_string() }
    })?;
    Ok(Row {
        event_id: event_id(record, partition_id).to_string(),
        offset: record.offset(),
        receiver_id: receiver.into_owned(),
        // The value was parsed as JSON, so it is UTF-8.
        value: String::from_utf8_lossy(value).into_owned(),
        created_ms: record.timestamp_ms().clamp(0, MAX_CREATED_MS),
    })
}

/// Returns the event id that the producer set. Records of other producers have none; their id is
/// derived from the position, so it is the same on every read.
fn event_id(record: &Record<'_>, partition_id: PartitionId) -> Uuid {
    let given = record.header(event::ID).and_then(|id| Uuid::try_parse_ascii(id).ok());
    given.unwrap_or_else(|| {
        let position = format!("{}/{}@{}", partition_id.epoch, partition_id.partition, record.offset());
        Uuid::new_v5(&POSITION_NAMESPACE, position.as_bytes())
    })
}
