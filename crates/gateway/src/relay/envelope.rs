//! Body of a delivery, in the format of the replaced service:
//! `{"topic":…,"partition":…,"offset":…,"key":…,"value":…,"timestamp":…}`.

use std::{borrow::Cow, fmt::Write as _};

use postrider_http::json::{self, write_string};
use postrider_time::clock;
use serde::de::IgnoredAny;

/// Fields of an envelope that differ from record to record.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<&'a [u8]>,
    /// `None` for a tombstone.
    pub value: Option<&'a [u8]>,
    pub timestamp_ms: i64,
}

/// Writes the envelopes of one topic.
#[derive(Debug, Clone)]
pub struct Envelope {
    /// The JSON before the partition number.
    head: Vec<u8>,
}

impl Envelope {
    pub fn new(topic: &str) -> Self {
        let mut head = br#"{"topic":"#.to_vec();
        write_string(&mut head, topic);
        head.extend_from_slice(br#","partition":"#);
        Self { head }
    }

    /// Appends one envelope. Invalid UTF-8 in a key or value becomes U+FFFD, as the Go encoder of
    /// the replaced service wrote it.
    pub fn render(&self, out: &mut Vec<u8>, content: &Content<'_>) {
        let (key, value) = (content.key, content.value.unwrap_or_default());
        // Field names, numbers and punctuation take less than 160 bytes; escapes are rare.
        out.reserve(self.head.len() + key.map_or(0, <[u8]>::len) + value.len() + 160);
        out.extend_from_slice(&self.head);
        let mut number = itoa::Buffer::new();
        out.extend_from_slice(number.format(content.partition).as_bytes());
        out.extend_from_slice(br#","offset":"#);
        out.extend_from_slice(number.format(content.offset).as_bytes());
        if let Some(key) = key {
            out.extend_from_slice(br#","key":"#);
            write_string(out, &text(key));
        }
        out.extend_from_slice(br#","value":"#);
        match object(value) {
            Some(object) => out.extend_from_slice(object.as_bytes()),
            None => {
                out.extend_from_slice(br#"{"raw_message":"#);
                write_string(out, &text(value));
                out.push(b'}');
            }
        }
        out.extend_from_slice(br#","timestamp":""#);
        out.extend_from_slice(timestamp(content.timestamp_ms).as_bytes());
        out.extend_from_slice(br#""}"#);
    }
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Returns the value unchanged if it is a JSON object that satisfies postrider's rules for request
/// bodies (UTF-8, no lone surrogates, at most 128 levels), so that every parser accepts it.
fn object(value: &[u8]) -> Option<&str> {
    let value = value.trim_ascii();
    if value.first() != Some(&b'{') {
        return None;
    }
    let text = json::check(value).ok()?;
    serde_json::from_str::<IgnoredAny>(text).ok()?;
    Some(text)
}

/// Formats a time in whole seconds: the example that clients were written against has no fraction,
/// and not every parser accepts one. An unknown time, or one before 1970, becomes the epoch.
fn timestamp(ms: i64) -> String {
    let mut text = clock::rfc3339(ms.max(0));
    match text.find('.') {
        Some(dot) => {
            text.truncate(dot);
            text.push('Z');
        }
        None => {
            text.clear();
            let _ = text.write_str("1970-01-01T00:00:00Z");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const NOON_2023: i64 = 1_672_574_400_000;

    fn content<'a>(key: Option<&'a [u8]>, value: Option<&'a [u8]>) -> Content<'a> {
        Content { partition: 0, offset: 12_345, key, value, timestamp_ms: NOON_2023 }
    }

    fn render(content: &Content<'_>) -> String {
        let mut out = Vec::new();
        Envelope::new("t").render(&mut out, content);
        String::from_utf8(out).unwrap()
    }

    fn value_of(value: Option<&[u8]>) -> Value {
        serde_json::from_str::<Value>(&render(&content(None, value))).unwrap()["value"].clone()
    }

    #[test]
    fn the_envelope_matches_the_documentation_byte_for_byte() {
        assert_eq!(
            render(&content(Some(b"k"), Some(br#"{"message":"Hello"}"#))),
            r#"{"topic":"t","partition":0,"offset":12345,"key":"k","value":{"message":"Hello"},"timestamp":"2023-01-01T12:00:00Z"}"#
        );
        assert_eq!(
            render(&content(None, Some(b"plain \"text\"\n"))),
            r#"{"topic":"t","partition":0,"offset":12345,"value":{"raw_message":"plain \"text\"\n"},"timestamp":"2023-01-01T12:00:00Z"}"#
        );
    }

    #[test]
    fn an_object_is_passed_through_unchanged() {
        for object in [r#"{}"#, r#"{ "b": 1.50e+3, "a" : [ 1 ], "b":2 }"#, r#"{"s":"\u00e9é\ud83d\ude00"}"#] {
            let rendered = render(&content(None, Some(format!(" \n{object}\t").as_bytes())));
            assert!(rendered.contains(&format!(r#""value":{object},"timestamp""#)), "{rendered}");
        }
    }

    #[test]
    fn other_values_become_a_raw_message() {
        let deep = format!("{}1{}", "{\"a\":".repeat(200), "}".repeat(200));
        for value in [
            "[1,2]",
            "7",
            "\"text\"",
            "null",
            "true",
            "",
            " ",
            "{",
            "{\"a\":1}x",
            "{'a':1}",
            r#"{"a":"\ud83d"}"#,
            &deep,
        ] {
            assert_eq!(value_of(Some(value.as_bytes())), json!({ "raw_message": value }), "{value}");
        }
        assert_eq!(value_of(None), json!({"raw_message": ""}), "a tombstone");
    }

    #[test]
    fn invalid_utf8_becomes_replacement_characters() {
        let rendered = render(&content(Some(&[0xff, b'k']), Some(&[b'a', 0xc3, 0x28, 0])));
        let envelope: Value = serde_json::from_str(&rendered).unwrap();
        assert_eq!(envelope["key"], "\u{fffd}k");
        assert_eq!(envelope["value"]["raw_message"], "a\u{fffd}(\0");
    }

    #[test]
    fn the_time_is_in_whole_seconds() {
        assert_eq!(timestamp(NOON_2023 + 999), "2023-01-01T12:00:00Z");
        for unknown in [0, -1, i64::MIN, i64::MAX] {
            assert_eq!(timestamp(unknown), "1970-01-01T00:00:00Z");
        }
    }

    proptest! {
        #[test]
        fn every_envelope_is_json_with_the_documented_fields(
            topic in "[a-zA-Z0-9._-]{1,40}", partition in 0_i32.., offset in 0_i64.., ms in 0_i64..4_000_000_000_000,
            key in prop::option::of(prop::collection::vec(any::<u8>(), 0..40)),
            value in prop::option::of(prop::collection::vec(any::<u8>(), 0..200)),
        ) {
            let mut out = Vec::new();
            let content = Content { partition, offset, key: key.as_deref(), value: value.as_deref(), timestamp_ms: ms };
            Envelope::new(&topic).render(&mut out, &content);
            let read: Value = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(&read["topic"], &json!(topic));
            prop_assert_eq!(&read["partition"], &json!(partition));
            prop_assert_eq!(&read["offset"], &json!(offset));
            let key = key.map(|key| String::from_utf8_lossy(&key).into_owned());
            prop_assert_eq!(read.get("key").cloned(), key.map(Value::from));
            prop_assert!(read["value"].is_object());
            let text = read["timestamp"].as_str().unwrap();
            prop_assert_eq!(clock::parse_rfc3339(text), Some(ms / 1_000 * 1_000));
        }
    }
}
