//! A dead letter as it is read back from its topic.

use base64::{Engine, prelude::BASE64_STANDARD};
use postrider_kafka::{dead_letter::header, event};
use postrider_telemetry::unknown::Unknown;
use postrider_time::clock;
use rdkafka::{
    Message,
    message::{Header, Headers, OwnedHeaders},
};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// The fields of a letter, borrowed from its record.
#[derive(Debug, Default)]
pub struct Fields<'a> {
    pub id: &'a str,
    pub topic: &'a str,
    pub partition: i32,
    pub offset: i64,
    pub key: Option<&'a [u8]>,
    pub timestamp: Option<&'a str>,
    pub group: &'a str,
    pub error: &'a str,
    pub class: &'a str,
    pub attempts: u32,
    pub first_failed: &'a str,
    pub failed: &'a str,
    pub trace_id: Option<&'a str>,
    pub event_id: Option<&'a str>,
    pub tombstone: bool,
    pub omitted_bytes: Option<u64>,
    pub headers_omitted: bool,
    pub value: &'a [u8],
    /// Number of headers that belong to the original record; they come first.
    pub own: usize,
}

impl<'a> Fields<'a> {
    /// Reads a letter. Returns `None` for a tombstone, and for a record that is not a letter.
    pub fn of<M: Message>(message: &'a M) -> Option<Self> {
        let headers = message.headers()?;
        let own = (0..headers.count()).rev().find(|&at| headers.get(at).key == header::MARK)?;
        let id = std::str::from_utf8(message.key()?).ok()?;
        let mut fields = Self { id, value: message.payload()?, own, ..Self::default() };
        for at in 0..headers.count() {
            let Header { key, value } = headers.get(at);
            let value = value.unwrap_or_default();
            let text = std::str::from_utf8(value).unwrap_or_default();
            if at < own {
                if key == event::ID {
                    fields.event_id = Some(text);
                }
                continue;
            }
            match key {
                header::TOPIC => fields.topic = text,
                header::PARTITION => fields.partition = text.parse().ok()?,
                header::OFFSET => fields.offset = text.parse().ok()?,
                header::KEY => fields.key = Some(value),
                header::TIMESTAMP => fields.timestamp = Some(text),
                header::GROUP => fields.group = text,
                header::ERROR => fields.error = text,
                header::ERROR_CLASS => fields.class = text,
                header::ATTEMPTS => fields.attempts = text.parse().unwrap_or(0),
                header::FIRST_FAILED => fields.first_failed = text,
                header::FAILED => fields.failed = text,
                header::TRACE_ID => fields.trace_id = Some(text),
                header::MARK => known(header::MARK, text, "1")?,
                header::TOMBSTONE => {
                    known(header::TOMBSTONE, text, "true")?;
                    fields.tombstone = true;
                }
                // The value is missing whatever size the header states.
                header::VALUE_OMITTED => fields.omitted_bytes = Some(text.parse().unwrap_or(0)),
                header::HEADERS_OMITTED => fields.headers_omitted = true,
                _ => {}
            }
        }
        (!fields.topic.is_empty()).then_some(fields)
    }

    /// Returns the time of the last failure, in milliseconds since the epoch; 0 if it cannot be
    /// parsed.
    pub fn failed_ms(&self) -> i64 {
        clock::parse_rfc3339(self.failed).unwrap_or(0)
    }
}

/// Returns `None` if a header has a value that this version does not know; the letter is then
/// ignored.
fn known(header: &'static str, found: &str, expected: &str) -> Option<()> {
    if found == expected {
        return Some(());
    }
    Unknown::new(header, found);
    None
}

/// One letter in a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub struct Summary {
    /// Position of the record, and consumer group; they identify the letter. An example is
    /// `messages/3@1234 postrider-kv`.
    pub id: String,
    /// The dead-letter topic that holds the letter.
    pub letters: String,
    /// The original topic of the record.
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// The record's key, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub key: Option<String>,
    /// The record's key in Base64, if it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub key_base64: Option<String>,
    /// The record's timestamp.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub timestamp: Option<String>,
    /// The event's id (`ce_id`), which identifies duplicates.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub event_id: Option<String>,
    /// The consumer group that dead-lettered the record.
    pub group: String,
    /// A stable name of the kind of error.
    pub error_class: String,
    pub error: String,
    pub attempts: u32,
    pub first_failed_at: String,
    pub failed_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub trace_id: Option<String>,
    /// Size of the record's value, in bytes.
    pub value_bytes: u64,
    /// True if the record is a tombstone: its value is null.
    pub tombstone: bool,
    /// True if the value, perhaps with key and headers, was too large to keep, so that the letter
    /// cannot be replayed.
    pub incomplete: bool,
}

impl Summary {
    pub fn read(fields: &Fields<'_>, message: &impl Message) -> Self {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let (key, key_base64) = text_or_base64(fields.key);
        Self {
            id: fields.id.to_owned(),
            letters: message.topic().to_owned(),
            topic: fields.topic.to_owned(),
            partition: fields.partition,
            offset: fields.offset,
            key,
            key_base64,
            timestamp: owned(fields.timestamp),
            event_id: owned(fields.event_id),
            group: fields.group.to_owned(),
            error_class: fields.class.to_owned(),
            error: fields.error.to_owned(),
            attempts: fields.attempts,
            first_failed_at: fields.first_failed.to_owned(),
            failed_at: fields.failed.to_owned(),
            trace_id: owned(fields.trace_id),
            value_bytes: fields.omitted_bytes.unwrap_or(fields.value.len() as u64),
            tombstone: fields.tombstone,
            incomplete: fields.omitted_bytes.is_some() || fields.headers_omitted,
        }
    }
}

/// A letter with everything that was kept of its record.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = DeadLetterDetail)]
pub struct Detail {
    #[serde(flatten)]
    pub summary: Summary,
    /// The value, if it is JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    pub value: Option<Value>,
    /// The value, if it is UTF-8 but not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value_text: Option<String>,
    /// The value in Base64, if it is neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value_base64: Option<String>,
    /// The record's own headers, in order.
    pub headers: Vec<HeaderValue>,
}

/// A header of a record. A header without a value is null.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = RecordHeader)]
pub struct HeaderValue {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value_base64: Option<String>,
}

impl Detail {
    pub fn read(fields: &Fields<'_>, message: &impl Message) -> Self {
        let headers = own_headers(fields, message).map(|Header { key, value }| {
            let (value, value_base64) = text_or_base64(value);
            HeaderValue { name: key.to_owned(), value, value_base64 }
        });
        let summary = Summary::read(fields, message);
        let kept = (!summary.tombstone && !summary.incomplete).then_some(fields.value);
        let value = kept.and_then(|value| serde_json::from_slice(value).ok());
        let (value_text, value_base64) = text_or_base64(kept.filter(|_| value.is_none()));
        Self { summary, value, value_text, value_base64, headers: headers.collect() }
    }
}

/// The original record of a letter, for a replay.
#[derive(Debug)]
pub struct Original {
    /// The letter's id, and the topic and partition that hold it.
    pub id: String,
    pub letters: String,
    pub letters_partition: i32,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    /// The value; `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    pub headers: OwnedHeaders,
    /// True if the letter holds the whole record.
    pub complete: bool,
}

impl Original {
    pub fn read(fields: &Fields<'_>, message: &impl Message) -> Self {
        let headers = OwnedHeaders::new_with_capacity(fields.own);
        Self {
            id: fields.id.to_owned(),
            letters: message.topic().to_owned(),
            letters_partition: message.partition(),
            topic: fields.topic.to_owned(),
            partition: fields.partition,
            offset: fields.offset,
            key: fields.key.map(<[u8]>::to_vec),
            value: (!fields.tombstone).then(|| fields.value.to_vec()),
            headers: own_headers(fields, message).fold(headers, OwnedHeaders::insert),
            complete: fields.omitted_bytes.is_none() && !fields.headers_omitted,
        }
    }

    /// Returns the record's original position: topic, partition, offset.
    pub fn place(&self) -> (&str, i32, i64) {
        (&self.topic, self.partition, self.offset)
    }
}

fn own_headers<'a>(fields: &Fields<'_>, message: &'a impl Message) -> impl Iterator<Item = Header<'a, &'a [u8]>> {
    message.headers().into_iter().flat_map(Headers::iter).take(fields.own)
}

fn text_or_base64(bytes: Option<&[u8]>) -> (Option<String>, Option<String>) {
    match bytes.map(|bytes| (bytes, std::str::from_utf8(bytes))) {
        None => (None, None),
        Some((_, Ok(text))) => (Some(text.to_owned()), None),
        Some((bytes, Err(_))) => (None, Some(BASE64_STANDARD.encode(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    /// Builds a letter with these headers, plus the two that every letter has.
    fn letter(headers: &[(&str, &str)]) -> OwnedMessage {
        let headers = headers.iter().chain(&[(header::PARTITION, "3"), (header::OFFSET, "7")]);
        let headers = headers
            .fold(OwnedHeaders::new(), |headers, &(key, value)| headers.insert(Header { key, value: Some(value) }));
        let time = Timestamp::CreateTime(0);
        OwnedMessage::new(Some(b"1".to_vec()), Some(b"id".to_vec()), "l".to_owned(), time, 0, 0, Some(headers))
    }

    #[test]
    fn a_letter_of_an_unknown_format_is_ignored() {
        let whole = letter(&[(header::MARK, "1"), (header::TOPIC, "t")]);
        assert!(Fields::of(&whole).is_some_and(|fields| !fields.tombstone && fields.omitted_bytes.is_none()));
        assert!(Fields::of(&letter(&[(header::MARK, "2"), (header::TOPIC, "t")])).is_none());
        let tombstone = |says| letter(&[(header::MARK, "1"), (header::TOPIC, "t"), (header::TOMBSTONE, says)]);
        assert!(Fields::of(&tombstone("true")).is_some_and(|fields| fields.tombstone));
        assert!(Fields::of(&tombstone("false")).is_none(), "a replay would delete the key");
    }

    #[test]
    fn a_letter_without_its_value_is_incomplete_whatever_size_it_states() {
        for size in ["7", "many", ""] {
            let letter = letter(&[(header::MARK, "1"), (header::TOPIC, "t"), (header::VALUE_OMITTED, size)]);
            let fields = Fields::of(&letter).unwrap();
            assert!(Summary::read(&fields, &letter).incomplete, "{size}");
            assert!(!Original::read(&fields, &letter).complete, "{size}");
        }
    }
}
