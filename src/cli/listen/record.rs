//! A record as a line of JSON.

use base64::{Engine, prelude::BASE64_STANDARD};
use postrider_process::panic;
use postrider_time::clock;
use rdkafka::message::{Headers, Message};
use serde::Serialize;
use serde_json::value::RawValue;

/// A record with text and JSON as such, and other bytes in Base64.
#[derive(Serialize)]
struct Shown<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    /// RFC 3339; null if the record has none.
    timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    headers: Vec<Header<'a>>,
}

#[derive(Serialize)]
struct Header<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

/// Returns the record as JSON.
pub fn as_json(record: &impl Message) -> Result<String, serde_json::Error> {
    let (key, key_base64) = text_or_base64(record.key());
    let value: Option<&RawValue> = record.payload().and_then(|value| serde_json::from_slice(value).ok());
    let (value_text, value_base64) = text_or_base64(record.payload().filter(|_| value.is_none()));
    serde_json::to_string(&Shown {
        topic: record.topic(),
        partition: record.partition(),
        offset: record.offset(),
        timestamp: record.timestamp().to_millis().map(clock::rfc3339),
        key,
        key_base64,
        value,
        value_text,
        value_base64,
        headers: headers(record),
    })
}

fn headers(record: &impl Message) -> Vec<Header<'_>> {
    let Some(headers) = record.headers() else { return Vec::new() };
    let one = |index| {
        // The client library panics on a header name that is not UTF-8; it is left out.
        let header = panic::contain(|| headers.try_get(index))??;
        let (value, value_base64) = text_or_base64(header.value);
        Some(Header { name: header.key, value, value_base64 })
    };
    (0..headers.count()).filter_map(one).collect()
}

fn text_or_base64(bytes: Option<&[u8]>) -> (Option<&str>, Option<String>) {
    match bytes.map(|bytes| (bytes, std::str::from_utf8(bytes))) {
        None => (None, None),
        Some((_, Ok(text))) => (Some(text), None),
        Some((bytes, Err(_))) => (None, Some(BASE64_STANDARD.encode(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    fn json(key: Option<&[u8]>, value: Option<&[u8]>) -> String {
        let (key, value) = (key.map(<[u8]>::to_vec), value.map(<[u8]>::to_vec));
        let time = Timestamp::CreateTime(1_672_574_400_120);
        as_json(&OwnedMessage::new(value, key, "t".to_owned(), time, 3, 7, None)).unwrap()
    }

    #[test]
    fn json_stays_as_written_and_other_bytes_have_other_names() {
        let line = |key: &str, value: &str| {
            format!(
                r#"{{"topic":"t","partition":3,"offset":7,"timestamp":"2023-01-01T12:00:00.120Z"{key}{value},"headers":[]}}"#
            )
        };
        assert_eq!(json(Some(b"k"), Some(br#"{"b":1e3,"a":1}"#)), line(r#","key":"k""#, r#","value":{"b":1e3,"a":1}"#));
        assert_eq!(json(None, Some(b"hi there")), line("", r#","value_text":"hi there""#));
        assert_eq!(json(Some(&[255]), Some(&[254])), line(r#","key_base64":"/w==""#, r#","value_base64":"/g==""#));
        assert_eq!(json(None, None), line("", ""), "a tombstone has no value");
    }
}
