//! What one record of the topic means to the view.

use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    EXPIRES_HEADER, VERSION_HEADER,
    entry::{Entry, State},
    keys::Keys,
    script::{FORGET_AFTER_S, REMEMBER_S, Repeat, Writes},
};
use crate::platform::{
    http::json,
    kafka::{batch::Record, dead_letter::Reason, event, partition_of},
    unknown::Unknown,
};

/// A record whose version decides, because it repeats an earlier write, or may.
#[derive(Debug, Clone, Copy)]
pub struct Repeated {
    pub offset: i64,
    /// Up to which offset it speaks: its own, unless the projection wrote it.
    pub version: i64,
    /// Set for a write with an idempotency key, whose first offset the view remembers. A key of
    /// another value of the view is another write.
    pub id: Option<Uuid>,
}

impl Repeated {
    pub fn of(record: &Record<'_>) -> Option<Self> {
        let text = |name| record.header(name).and_then(|value| std::str::from_utf8(value).ok());
        let offset = record.offset();
        if record.header(VERSION_HEADER).is_some() {
            // Without a number it is no record of the view.
            let version = text(VERSION_HEADER)?.parse().ok()?;
            return Some(Self { offset, version, id: None });
        }
        let id = text(event::ID).and_then(|id| Uuid::try_parse(id).ok()).filter(|id| id.get_version_num() == 5)?;
        Some(Self { offset, version: offset, id: Some(Uuid::new_v5(&id, record.key()?)) })
    }
}

/// Where the view is that records are added to.
pub struct ViewLocation<'a> {
    pub keys: &'a Keys,
    pub partition: i32,
    pub partitions: i32,
}

/// A record that no push can have written.
#[derive(Debug)]
pub struct Unfit {
    pub reason: Reason,
    /// It is a push all the same, in a partition that its key does not belong to.
    pub misplaced: bool,
}

fn unfit(class: &'static str, message: &str) -> Unfit {
    Unfit { reason: Reason { class, message: message.to_owned() }, misplaced: false }
}

/// Whether the view can take a record. Returns its key.
pub fn judge<'r>(location: &ViewLocation<'_>, record: &Record<'r>) -> Result<&'r [u8], Unfit> {
    let key = record.key().filter(|key| !key.is_empty()).ok_or_else(|| unfit("no_key", "a push has a key"))?;
    if partition_of(key, location.partitions) != location.partition {
        let misplaced = record.header("ce_source") == Some(b"/kv");
        return Err(Unfit { misplaced, ..unfit("wrong_partition", "its key belongs to another partition") });
    }
    for header in [EXPIRES_HEADER, VERSION_HEADER] {
        number(record, header)?;
    }
    match record.value().map(json::parse::<&RawValue>) {
        Some(Err(error)) => Err(unfit("not_json", &format!("its value is not JSON: {error}"))),
        None | Some(Ok(_)) => Ok(key),
    }
}

/// The number in a header of ours; `None` without the header.
fn number(record: &Record<'_>, header: &'static str) -> Result<Option<i64>, Unfit> {
    let Some(value) = record.header(header) else { return Ok(None) };
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    let bad = || unfit("bad_header", &Unknown::of_bytes(header, value).to_string());
    number.map(Some).ok_or_else(bad)
}

/// Adds what one record changes.
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
