//! Parses and checks records of clients and prepares them for the producer.

use std::{borrow::Cow, collections::BTreeMap, ops::Range, time::Instant};

use base64::{Engine, prelude::BASE64_STANDARD};
use postrider_http::{
    Code, Problem,
    decode::{self, Decoded, Refused, quoted, segment, shortened},
    json,
    problem::Place,
};
use postrider_kafka::{Outgoing, TopicLimits, admission, batch_bytes, event::Event};
use postrider_time::clock;
use rdkafka::message::{Header, OwnedHeaders};
use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) const JSON: &str = "application/json";
/// Content types of bodies. All but the first are names of NDJSON.
pub(super) const ACCEPTED: [&str; 4] = [JSON, "application/x-ndjson", "application/jsonl", "application/ndjson"];

/// Position of a record in its request.
pub(super) enum RecordNumber {
    /// The only record; it is refused if the producer's queue is full.
    Alone,
    /// One of several: its number, and the time until which it waits for space in the queue.
    Part(u64, Instant),
}

/// One record to produce. An empty key counts as no key.
#[derive(Debug, Deserialize)]
pub struct Record<'a> {
    #[serde(borrow)]
    pub topic: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key_base64: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    payload_base64: Option<Cow<'a, str>>,
    #[serde(borrow)]
    headers: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    partition: Option<i32>,
    #[serde(borrow)]
    timestamp: Option<Timestamp<'a>>,
    /// A batch: these records instead of a single one.
    #[serde(borrow)]
    pub records: Option<Vec<&'a RawValue>>,
}

/// Distinguishes `null`, which is a valid payload, from an absent field.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "must be a whole number of milliseconds since 1970, or an RFC 3339 time")]
enum Timestamp<'a> {
    Milliseconds(i64),
    #[serde(borrow)]
    Rfc3339(Cow<'a, str>),
}

/// A checked record, from which the producer borrows.
#[derive(Debug)]
pub struct Checked<'a> {
    pub topic: Cow<'a, str>,
    key: Option<Cow<'a, [u8]>>,
    payload: Cow<'a, [u8]>,
    headers: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    partition: Option<i32>,
    timestamp_ms: Option<i64>,
}

/// Timestamps that are taken for seconds: as milliseconds, these are times from 2 January 1970 to
/// March 1973; as seconds, from 1973 to 5138.
const SECONDS: Range<i64> = 100_000_000..100_000_000_000;

/// Returns the error of an invalid field of a record: a malformed request, 400.
fn malformed(field: &str, detail: impl Into<String>) -> Problem {
    Problem::new(Code::INVALID_REQUEST, detail).at_field(field)
}

impl<'a> Record<'a> {
    /// Decodes a record. A number out of range is malformed too. Errors call the text by `what`.
    pub fn parse(text: &'a [u8], what: &str) -> Result<Decoded<Self>, Box<Refused>> {
        decode::decode(text, what).map_err(|mut refused| {
            if refused.problem.code == Code::INVALID_FIELD {
                refused.problem.code = Code::INVALID_REQUEST;
            }
            refused
        })
    }

    /// Checks every field. `default_topic` applies to a record without a topic.
    pub fn check(self, default_topic: Option<&'a str>) -> Result<Checked<'a>, Problem> {
        let topic = match self.topic {
            Some(topic) => {
                check_topic(&topic).map_err(|problem| problem.at_field("topic"))?;
                topic
            }
            None => {
                let topic = default_topic.ok_or_else(|| malformed("topic", "`topic` is required"))?;
                check_topic(topic)?;
                Cow::Borrowed(topic)
            }
        };
        let key = match (self.key, self.key_base64) {
            (Some(_), Some(_)) => {
                return Err(malformed("key_base64", "`key` and `key_base64` are mutually exclusive; send one of them"));
            }
            (Some(Cow::Borrowed(text)), None) => Some(Cow::Borrowed(text.as_bytes())),
            (Some(Cow::Owned(text)), None) => Some(Cow::Owned(text.into_bytes())),
            (None, Some(text)) => Some(Cow::Owned(decode(&text, "key_base64")?)),
            (None, None) => None,
        };
        let payload = match (self.payload, self.payload_base64) {
            (Some(_), Some(_)) => {
                return Err(malformed(
                    "payload_base64",
                    "`payload` and `payload_base64` are mutually exclusive; send one of them",
                ));
            }
            (Some(raw), None) => match json::minify(raw.get()) {
                Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
                Cow::Owned(text) => Cow::Owned(text.into_bytes()),
            },
            (None, Some(text)) => Cow::Owned(decode(&text, "payload_base64")?),
            (None, None) => return Err(malformed("payload", "`payload` or `payload_base64` is required")),
        };
        let timestamp_ms = match self.timestamp {
            None => None,
            Some(Timestamp::Milliseconds(ms)) if SECONDS.contains(&ms) => {
                let detail = format!(
                    "`timestamp` must be in milliseconds (got {ms}, which looks like seconds); write a time before 1973 as RFC 3339"
                );
                return Err(Problem::new(Code::INVALID_FIELD, detail).at_field("timestamp"));
            }
            Some(Timestamp::Milliseconds(ms)) if ms >= 0 => Some(ms),
            Some(Timestamp::Milliseconds(ms)) => {
                return Err(malformed("timestamp", format!("`timestamp` must not be before 1970 (got {ms})")));
            }
            Some(Timestamp::Rfc3339(text)) => {
                Some(clock::parse_rfc3339(&text).filter(|&ms| ms >= 0).ok_or_else(|| bad_timestamp(&text))?)
            }
        };
        if let Some(partition) = self.partition.filter(|&partition| partition < 0) {
            return Err(malformed("partition", format!("`partition` must be 0 or more (got {partition})")));
        }
        let reserved = |name: &str| name.is_empty() || name.starts_with("ce_") || name == "traceparent";
        if let Some(name) = self.headers.iter().flat_map(BTreeMap::keys).find(|name| reserved(name)) {
            return Err(bad_header(name));
        }
        Ok(Checked {
            topic,
            key: key.filter(|key| !key.is_empty()),
            payload,
            headers: self.headers,
            partition: self.partition,
            timestamp_ms,
        })
    }
}

impl Checked<'_> {
    /// Returns the approximate size of the record in the producer's queue, in bytes.
    pub fn bytes(&self) -> usize {
        admission::weight(self.key.as_deref(), Some(&self.payload))
    }

    /// Refuses a record that the broker would refuse, before it shares a batch with other records.
    pub fn fits(&self, limits: &TopicLimits, event: &Event<'_>) -> Result<(), Problem> {
        let topic = &self.topic;
        if limits.needs_key && self.key.is_none() {
            return Err(malformed("key", format!("`key` is required: topic `{topic}` is compacted")));
        }
        if let Some(ms) = self.timestamp_ms {
            check_timestamp(ms, clock::now_ms(), topic, limits)?;
        }
        // Estimates first, because most records are far below the limit. A header needs up to three
        // bytes for each of its two lengths.
        let headers: usize = self.headers.iter().flatten().map(|(name, value)| name.len() + value.len() + 6).sum();
        if self.bytes() + headers > limits.max_message_bytes / 2 {
            let bytes = batch_bytes(&self.outgoing(event));
            if bytes > limits.max_message_bytes {
                let limit = limits.max_message_bytes;
                let detail = format!(
                    "the record has {bytes} bytes; topic `{topic}` accepts at most {limit} (`max.message.bytes`)"
                );
                return Err(Problem::new(Code::BODY_TOO_LARGE, detail));
            }
        }
        Ok(())
    }

    /// Returns the record as the producer sends it.
    pub fn outgoing(&self, event: &Event<'_>) -> Outgoing<'_> {
        let own = self.headers.as_ref().map_or(0, BTreeMap::len);
        let mut headers: OwnedHeaders = event.headers(own);
        for (name, value) in self.headers.iter().flatten() {
            headers = headers.insert(Header { key: name, value: Some(value.as_bytes()) });
        }
        Outgoing {
            topic: &self.topic,
            partition: self.partition,
            key: self.key.as_deref(),
            payload: Some(&self.payload),
            headers: Some(headers),
            timestamp_ms: self.timestamp_ms,
            extra_bytes: 0,
        }
    }
}

/// Refuses a timestamp that the broker would refuse, or whose record it would soon delete.
fn check_timestamp(ms: i64, now_ms: i64, topic: &str, limits: &TopicLimits) -> Result<(), Problem> {
    let ahead_ms = ms - now_ms;
    let (setting, bound_ms) = match ahead_ms {
        0.. => ("message.timestamp.after.max.ms", limits.max_after_ms),
        _ if limits.retention_ms < limits.max_before_ms => ("retention.ms", limits.retention_ms),
        _ => ("message.timestamp.before.max.ms", limits.max_before_ms),
    };
    if ahead_ms.abs() <= bound_ms {
        return Ok(());
    }
    let side = if ahead_ms < 0 { "before" } else { "after" };
    Err(Problem::new(
        Code::INVALID_FIELD,
        format!("`timestamp` must be at most {bound_ms} ms {side} now (`{setting}` of topic `{topic}`; got {ms})"),
    )
    .at_field("timestamp"))
}

fn bad_timestamp(text: &str) -> Problem {
    let wanted = "`timestamp` must be milliseconds or an RFC 3339 time such as 2026-01-31T12:00:00Z, not before 1970";
    malformed("timestamp", format!("{wanted} (got {})", quoted(text)))
}

fn bad_header(name: &str) -> Problem {
    let detail = match name {
        "" => "`headers` must not have an empty name".to_owned(),
        _ => {
            let name = shortened(name);
            format!("`headers` must not have `{name}`; postrider sets `traceparent` and names that begin with `ce_`")
        }
    };
    Problem::new(Code::INVALID_REQUEST, detail).at(Place::Pointer(format!("#/headers{}", segment(name))))
}

fn decode(text: &str, field: &str) -> Result<Vec<u8>, Problem> {
    let wanted = || malformed(field, format!("`{field}` must be base64 with padding (got {})", quoted(text)));
    BASE64_STANDARD.decode(text).map_err(|_| wanted())
}

/// Checks a topic name by Kafka's rules.
pub fn check_topic(topic: &str) -> Result<(), Problem> {
    let malformed = |detail| Err(Problem::new(Code::INVALID_REQUEST, detail));
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    match topic {
        "" => malformed("`topic` is required".to_owned()),
        "." | ".." => malformed(format!("`topic` must not be `{topic}`")),
        _ if topic.len() > 249 => malformed(format!("`topic` must have at most 249 bytes (got {})", topic.len())),
        _ if !topic.bytes().all(legal) => {
            let found = quoted(topic);
            malformed(format!("`topic` may contain only letters, digits, `.`, `_` and `-` (got {found})"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Topic, key and payload.
    type Parts = (String, Option<Vec<u8>>, Vec<u8>);

    fn check(text: &str) -> Result<Parts, Problem> {
        let record = Record::parse(text.as_bytes(), "body").map_err(|refused| refused.problem)?.value;
        let checked = record.check(None)?;
        Ok((checked.topic.into_owned(), checked.key.map(Cow::into_owned), checked.payload.into_owned()))
    }

    #[test]
    fn the_payload_is_minified_and_otherwise_unchanged() {
        let (_, _, payload) = check(r#"{"topic":"t","payload": { "b": 1.0, "a": [ 1e3 ] } }"#).unwrap();
        assert_eq!(payload, br#"{"b":1.0,"a":[1e3]}"#);
        let (_, _, payload) = check(r#"{"topic":"t","payload":null}"#).unwrap();
        assert_eq!(payload, b"null", "null is a valid payload");
    }

    #[test]
    fn binary_keys_and_payloads_are_decoded() {
        let (_, key, payload) = check(r#"{"topic":"t","key_base64":"AP8=","payload_base64":"AQID"}"#).unwrap();
        assert_eq!((key.unwrap(), payload), (vec![0, 255], vec![1, 2, 3]));
    }

    #[test]
    fn an_empty_key_is_no_key() {
        assert_eq!(check(r#"{"topic":"t","key":"","payload":1}"#).unwrap().1, None);
    }

    #[test]
    fn the_error_names_the_invalid_field() {
        for (body, word) in [
            (r#"{"payload":1}"#, "topic"),
            (r#"{"topic":"a b","payload":1}"#, "topic"),
            (r#"{"topic":"..","payload":1}"#, "topic"),
            (r#"{"topic":"t"}"#, "payload"),
            (r#"{"topic":"t","payload":1,"payload_base64":"AA=="}"#, "payload_base64"),
            (r#"{"topic":"t","payload_base64":"?"}"#, "payload_base64"),
            (r#"{"topic":"t","payload":1,"partition":-1}"#, "partition"),
            (r#"{"topic":"t","payload":1,"timestamp":"soon"}"#, "timestamp"),
            (r#"{"topic":"t","payload":1,"headers":{"ce_id":"x"}}"#, "`headers` must not have `ce_id`"),
            (r#"{"topic":"t","payload":1,"headers":{"":"x"}}"#, "an empty name"),
            (r#"{"topic":"t","payload":1,"timestamp":-5}"#, "before 1970 (got -5)"),
            (r#"{"topic":"t","payload":1,"timestamp":""}"#, "(got an empty value)"),
            (r#"{"topic":"t","payload":1,"partition":-1}"#, "0 or more (got -1)"),
            (r#"{"topic":"a b","payload":1}"#, "(got `a b`)"),
            (r#"{"topic":"t","key_base64":"?","payload":1}"#, "`key_base64` must be base64 with padding (got `?`)"),
        ] {
            let problem = check(body).unwrap_err();
            assert_eq!(problem.code, Code::INVALID_REQUEST, "{body}");
            assert!(problem.detail.contains(word), "{body}: {}", problem.detail);
        }
    }

    #[test]
    fn an_error_repeats_only_the_beginning_of_a_header_name() {
        let body = format!(r#"{{"topic":"t","payload":1,"headers":{{"ce_{:1000}":"x"}}}}"#, "");
        assert!(check(&body).unwrap_err().detail.len() < 300);
    }

    #[test]
    fn a_timestamp_in_seconds_is_refused_and_says_so() {
        let problem = check(r#"{"topic":"t","payload":1,"timestamp":1764000000}"#).unwrap_err();
        assert_eq!(problem.code, Code::INVALID_FIELD);
        assert!(problem.detail.contains("must be in milliseconds (got 1764000000, which looks like seconds)"));
        for (timestamp, is_valid) in [
            ("99999999", true),
            ("100000000", false),
            ("99999999999", false),
            ("100000000000", true),
            (r#""1971-01-01T00:00:00Z""#, true),
        ] {
            let body = format!(r#"{{"topic":"t","payload":1,"timestamp":{timestamp}}}"#);
            assert_eq!(check(&body).is_ok(), is_valid, "{timestamp}");
        }
        assert!(check(r#"{"topic":"t","payload":1,"timestamp":1764000000000}"#).is_ok());
    }

    #[test]
    fn a_timestamp_is_bounded_by_the_broker_and_by_the_retention() {
        let limits = TopicLimits { max_before_ms: 500, max_after_ms: 100, retention_ms: 300, ..TopicLimits::default() };
        let detail = |ms, limits| check_timestamp(ms, 1_000, "t", limits).map_err(|problem| problem.detail);
        assert!(detail(700, &limits).is_ok() && detail(1_100, &limits).is_ok());
        assert!(detail(699, &limits).unwrap_err().contains("at most 300 ms before now (`retention.ms` of topic `t`"));
        assert!(
            detail(1_101, &limits).unwrap_err().contains("at most 100 ms after now (`message.timestamp.after.max.ms`")
        );
        let strict = TopicLimits { max_before_ms: 200, ..limits };
        assert!(detail(799, &strict).unwrap_err().contains("`message.timestamp.before.max.ms`"));
        assert!(detail(0, &TopicLimits::default()).is_ok());
    }

    #[test]
    fn wrong_types_are_rejected() {
        for body in [
            r#"{"topic":1,"payload":1}"#,
            r#"{"topic":"t","key":7,"payload":1}"#,
            "[]",
            r#"["t",null,null,1]"#,
            "7",
            r#""x""#,
        ] {
            assert_eq!(check(body).unwrap_err().code, Code::INVALID_REQUEST, "{body}");
        }
    }
}
