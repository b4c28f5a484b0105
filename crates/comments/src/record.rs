//! Conversion of a record of the topic into a row of the table.

use postrider_http::Code;
use postrider_kafka::{batch::Record, dead_letter::Reason, event};
use uuid::Uuid;

use super::{
    cursor::MAX_CREATED_MS,
    model::{Draft, Flaw, Id},
    store::Row,
};

/// Namespace of the event ids that are derived from a record's position.
const PLACE_NAMESPACE: Uuid = Uuid::from_u128(0x21d4_3ae0_7f5c_5b8e_8a11_64c0_93f2_be07);

/// Returns the row of a record, or the reason why the record is not a comment.
pub fn row(record: &Record<'_>, topic_epoch: u32, partition: i32, max_text_bytes: usize) -> Result<Row, Reason> {
    let Some(value) = record.value() else {
        return Err(Reason { class: "no_value", message: "the record has no value".to_owned() });
    };
    let comment = Draft::from_record(value).map_err(|problem| {
        let class = if problem.code == Code::INVALID_JSON { "not_json" } else { "wrong_type" };
        Reason { class, message: problem.detail }
    })?;
    let comment = comment.check(max_text_bytes).map_err(|flaw| {
        let class = match flaw {
            Flaw::NoText => "no_text",
            Flaw::Nul(_) => "null_character",
            Flaw::TooLarge { .. } => "too_large",
        };
        Reason { class, message: flaw.to_string() }
    })?;
    let text = |id: Option<Id>| id.map(|id| id.text().into_owned());
    Ok(Row {
        event_id: event_id(record, topic_epoch, partition).to_string(),
        topic_epoch,
        partition,
        offset: record.offset(),
        text: comment.text,
        author_id: text(comment.author_id),
        post_id: text(comment.post_id),
        created_ms: record.timestamp_ms().clamp(0, MAX_CREATED_MS),
    })
}

/// Returns the id that the writer set in the header. Records of older producers have none; their id
/// is derived from the record's position, so that it is the same on every read.
fn event_id(record: &Record<'_>, topic_epoch: u32, partition: i32) -> Uuid {
    let given = record.header(event::ID).and_then(|id| Uuid::try_parse_ascii(id).ok());
    given.unwrap_or_else(|| {
        let position = format!("{topic_epoch}/{partition}@{}", record.offset());
        Uuid::new_v5(&PLACE_NAMESPACE, position.as_bytes())
    })
}
