//! Converts records of the topic into writes to the view.

use postrider_http::json;
use postrider_kafka::{batch::Record, dead_letter::Reason, event, partition_of};
use postrider_telemetry::unknown::Unknown;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    EXPIRES_HEADER, VERSION_HEADER,
    entry::{Entry, State},
    keys::Keys,
    script::{FORGET_AFTER_S, REMEMBER_S, Repeat, Writes},
};

/// A record that is applied by version, because it is or may be a repetition of an earlier write.
#[derive(Debug, Clone, Copy)]
pub struct Repeated {
    pub offset: i64,
    /// Offset up to which the record is the newest: its own, unless the projection wrote it.
    pub version: i64,
    /// Set for a write with an idempotency key, whose first offset the view stores. Derived from id
    /// and key, so the same id for another key of the view is a different write.
    pub id: Option<Uuid>,
}

impl Repeated {
    pub fn of(record: &Record<'_>) -> Option<Self> {
        let text = |name| record.header(name).and_then(|value| std::str::from_utf8(value).ok());
        let offset = record.offset();
        if record.header(VERSION_HEADER).is_some() {
            // A record with an invalid version is not a record of the view.
            let version = text(VERSION_HEADER)?.parse().ok()?;
            return Some(Self { offset, version, id: None });
        }
        let id = text(event::ID).and_then(|id| Uuid::try_parse(id).ok()).filter(|id| id.get_version_num() == 5)?;
        Some(Self { offset, version: offset, id: Some(Uuid::new_v5(&id, record.key()?)) })
    }
}

/// The view that records are written to.
pub struct ViewLocation<'a> {
    pub keys: &'a Keys,
    pub partition: i32,
    pub partitions: i32,
}

/// A record that is not a valid push.
#[derive(Debug)]
pub struct Unfit {
    pub reason: Reason,
    /// True if it is a push in a partition that its key does not belong to.
    pub misplaced: bool,
}

fn unfit(class: &'static str, message: &str) -> Unfit {
    Unfit { reason: Reason { class, message: message.to_owned() }, misplaced: false }
}

/// Checks that a record is a valid push. Returns its key.
pub fn judge<'r>(location: &ViewLocation<'_>, record: &Record<'r>) -> Result<&'r [u8], Unfit> {
    let key = record.key().filter(|key| !key.is_empty()).ok_or_else(|| unfit("no_key", "the record has no key"))?;
    if partition_of(key, location.partitions) != location.partition {
        let misplaced = record.header("ce_source") == Some(b"/kv");
        return Err(Unfit { misplaced, ..unfit("wrong_partition", "the key belongs to another partition") });
    }
    for header in [EXPIRES_HEADER, VERSION_HEADER] {
        number(record, header)?;
    }
    match record.value().map(json::parse::<&RawValue>) {
        Some(Err(error)) => Err(unfit("not_json", &error.detail)),
        None | Some(Ok(_)) => Ok(key),
    }
}

/// Parses the number in a header; `None` without the header.
fn number(record: &Record<'_>, header: &'static str) -> Result<Option<i64>, Unfit> {
    let Some(value) = record.header(header) else { return Ok(None) };
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    let bad = || unfit("bad_header", &Unknown::of_bytes(header, value).to_string());
    number.map(Some).ok_or_else(bad)
}

/// Adds the changes of one record to `writes`.
pub fn add(writes: &mut Writes, location: &ViewLocation<'_>, record: &Record<'_>, now_ms: i64) -> Result<(), Unfit> {
    let key = judge(location, record)?;
    let expires = number(record, EXPIRES_HEADER)?;
    let state = match record.value() {
        None => State::Deleted,
        Some(value) => State::Value { value, expires_ms: expires },
    };
    let ends_ms = match state {
        State::Deleted => Some(now_ms + REMEMBER_S * 1_000),
        State::Value { expires_ms, .. } => expires_ms,
    };
    match Repeated::of(record) {
        None => {
            writes.set(key, Entry { version: record.offset(), state }.encode());
            if let Some(at_ms) = ends_ms {
                writes.ends(key, at_ms);
            }
        }
        Some(repeated) => {
            let entry = Entry { version: repeated.version, state }.encode();
            let id_key = repeated.id.map(|id| location.keys.id(id));
            let appended_s = record.timestamp_ms() / 1_000;
            let remember = now_ms / 1_000 - appended_s < FORGET_AFTER_S;
            let repeat = Repeat { version: repeated.version, id_key, remember, appended_s, ends_ms };
            writes.set_unless_newer(key, &entry, repeat);
        }
    }
    Ok(())
}
