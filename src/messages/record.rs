//! What one record of the topic means to the tables.

use uuid::Uuid;

use super::{
    model::{self, Flaw},
    store::Row,
};
use crate::platform::kafka::PartitionId;
use crate::platform::{
    http::Code,
    kafka::{batch::Record, dead_letter::Reason, event},
};

/// The latest time that can be written as RFC 3339, in milliseconds since the epoch.
const MAX_CREATED_MS: i64 = 253_402_300_799_999;
/// The namespace of event ids derived from a record's place.
const PLACE_NAMESPACE: Uuid = Uuid::from_u128(0x8c1f_02d6_5a3b_5e47_b0aa_93cf_6d21_7e58);

/// The row of a record, or why no message can be made of it.
pub fn row(record: &Record<'_>, partition_id: PartitionId) -> Result<Row, Reason> {
    let Some(value) = record.value() else {
        return Err(Reason { class: "no_value", message: "the record has no value".to_owned() });
    };
    let receiver = model::receiver(value).map_err(|problem| {
        let class = match problem.code {
            Code::InvalidJson => "not_json",
            Code::InvalidField => "receiver_too_long",
            _ if problem.detail == Flaw::Missing("receiverId").to_string() => "no_receiver",
            _ if problem.detail == Flaw::Nul("receiverId").to_string() => "null_character",
            _ => "wrong_type",
        };
        Reason { class, message: problem.detail }
    })?;
    Ok(Row {
        event_id: event_id(record, partition_id).to_string(),
        offset: record.offset(),
        receiver_id: receiver.into_owned(),
        // Parsed as JSON already, so it is UTF-8.
        value: String::from_utf8_lossy(value).into_owned(),
        created_ms: record.timestamp_ms().clamp(0, MAX_CREATED_MS),
    })
}

/// The id that the writer gave it; where there is none, as in records of other producers, one that is
/// the same whenever this record is read.
fn event_id(record: &Record<'_>, partition_id: PartitionId) -> Uuid {
    let given = record.header(event::ID).and_then(|id| Uuid::try_parse_ascii(id).ok());
    given.unwrap_or_else(|| {
        let place = format!("{}/{}@{}", partition_id.epoch, partition_id.partition, record.offset());
        Uuid::new_v5(&PLACE_NAMESPACE, place.as_bytes())
    })
}
