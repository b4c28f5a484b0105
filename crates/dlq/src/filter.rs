//! Filters that choose dead letters.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use postrider_http::decode::quoted;
use postrider_kafka as kafka;
use postrider_time::clock;

use super::{DELIVERIES_TOPIC, EVENTS_TOPIC, letter::Fields};

/// The dead-letter topics to read.
#[derive(Debug, Clone, Default)]
pub enum Letters {
    /// Both topics of postrider.
    #[default]
    All,
    Events,
    Deliveries,
    /// A topic by its full name.
    Topic(String),
}

impl Letters {
    /// Returns the full names of the topics.
    pub fn topics(&self, config: &kafka::Config) -> Vec<String> {
        match self {
            Self::All => vec![config.topic(EVENTS_TOPIC), config.topic(DELIVERIES_TOPIC)],
            Self::Events => vec![config.topic(EVENTS_TOPIC)],
            Self::Deliveries => vec![config.topic(DELIVERIES_TOPIC)],
            Self::Topic(name) => vec![name.clone()],
        }
    }
}

/// Conditions on letters; a letter must meet every condition that is set.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// The letter's id is one of these; empty means any.
    pub ids: Vec<String>,
    /// The record's topic, with or without the prefix of our topics.
    pub topic: Option<String>,
    /// The record's key.
    pub key: Option<Vec<u8>>,
    /// The last failure was at this time or later, in milliseconds since the epoch.
    pub since_ms: Option<i64>,
    /// The class of the error, or a part of its message, ignoring case.
    pub error: Option<String>,
}

impl Filter {
    /// Returns whether no condition is set, so that every letter matches.
    pub fn is_empty(&self) -> bool {
        let Self { ids, topic, key, since_ms, error } = self;
        ids.is_empty() && topic.is_none() && key.is_none() && since_ms.is_none() && error.is_none()
    }

    /// Returns the name of a condition that is empty, as an unset variable of a script leaves it.
    /// A key may be empty.
    pub fn empty_condition(&self) -> Option<&'static str> {
        let named = [("topic", &self.topic), ("error", &self.error)];
        named.iter().find(|(_, text)| text.as_ref().is_some_and(|text| text.trim().is_empty())).map(|(name, _)| *name)
    }

    /// Returns whether a letter meets all conditions. `prefix` is that of our own topics.
    pub fn matches(&self, letter: &Fields<'_>, prefix: &str) -> bool {
        let is_topic = |topic: &String| letter.topic == topic || letter.topic.strip_prefix(prefix) == Some(topic);
        let is_error =
            |error: &String| letter.class == error || letter.error.to_lowercase().contains(&error.to_lowercase());
        (self.ids.is_empty() || self.ids.iter().any(|id| id == letter.id))
            && self.topic.as_ref().is_none_or(is_topic)
            && self.key.as_deref().is_none_or(|key| letter.key == Some(key))
            && self.since_ms.is_none_or(|since_ms| letter.failed_ms() >= since_ms)
            && self.error.as_ref().is_none_or(is_error)
    }
}

/// Base64 with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Error of a key that is not base64. The text continues a sentence that begins with its name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be base64 (got {})", quoted(.0))]
pub struct KeyError(String);

/// Parses a key in base64, of the standard alphabet or that of URLs.
pub fn parse_key(text: &str) -> Result<Vec<u8>, KeyError> {
    let standard = text.replace('-', "+").replace('_', "/");
    BASE64.decode(standard).map_err(|_| KeyError(text.to_owned()))
}

/// Error of a text that is neither a time nor an age.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be a time such as 2026-01-31T12:00:00Z or an age such as 90s, 15m, 2h or 7d (got `{0}`)")]
pub struct SinceError(String);

/// Parses an RFC 3339 time, or an age such as `90s`, `15m`, `2h` or `7d`, into milliseconds since
/// the epoch.
pub fn parse_since(text: &str, now_ms: i64) -> Result<i64, SinceError> {
    if let Some(ms) = clock::parse_rfc3339(text) {
        return Ok(ms);
    }
    clock::parse_span_ms(text).map(|age| now_ms - age).ok_or_else(|| SinceError(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_takes_times_and_ages() {
        let now_ms = clock::parse_rfc3339("2026-01-31T12:00:00Z").unwrap();
        for (text, expected) in [
            ("2026-01-31T13:00:00+01:00", now_ms),
            ("90s", now_ms - 90_000),
            ("15m", now_ms - 900_000),
            ("2h", now_ms - 7_200_000),
            ("7d", now_ms - 604_800_000),
        ] {
            assert_eq!(parse_since(text, now_ms), Ok(expected), "{text}");
        }
        for bad in ["", "h", "2", "2 h", "-2h", "2w", "yesterday", "2026-01-31", "99999999999d", "ä"] {
            assert!(parse_since(bad, now_ms).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_text_is_no_condition() {
        let empty = || Some(String::new());
        assert_eq!(Filter { error: empty(), ..Filter::default() }.empty_condition(), Some("error"));
        assert_eq!(Filter { topic: empty(), ..Filter::default() }.empty_condition(), Some("topic"));
        assert_eq!(Filter { key: Some(Vec::new()), ..Filter::default() }.empty_condition(), None);
    }

    #[test]
    fn a_binary_key_is_given_in_base64_of_either_alphabet() {
        for text in ["+/8=", "-_8=", "-_8"] {
            assert_eq!(parse_key(text), Ok(vec![0xfb, 0xff]), "{text}");
        }
        assert_eq!(parse_key(""), Ok(Vec::new()));
        assert_eq!(parse_key("?").unwrap_err().to_string(), "must be base64 (got `?`)");
        let letter = Fields { id: "t/0@7 g", topic: "t", key: Some(&[0, 255]), ..Fields::default() };
        let filter = |key: &str| Filter { key: Some(parse_key(key).unwrap()), ..Filter::default() };
        assert!(filter("AP8=").matches(&letter, "") && !filter("AP4=").matches(&letter, ""));
    }

    #[test]
    fn a_letter_matches_when_all_conditions_hold() {
        let letter = Fields {
            id: "p_messages/0@7 kv",
            topic: "p_messages",
            key: Some(b"k"),
            error: "Connection Refused",
            class: "transport",
            ..Fields::default()
        };
        let some = |text: &str| Some(text.to_owned());
        let any = Filter::default;
        for (filter, expected) in [
            (any(), true),
            (Filter { topic: some("messages"), ..any() }, true),
            (Filter { topic: some("p_messages"), ..any() }, true),
            (Filter { topic: some("p_"), ..any() }, false),
            (Filter { error: some("transport"), ..any() }, true),
            (Filter { error: some("connection ref"), ..any() }, true),
            (Filter { error: some("trans"), ..any() }, false),
            (Filter { key: Some(b"k".to_vec()), ..any() }, true),
            (Filter { key: Some(b"k".to_vec()), topic: some("other"), ..any() }, false),
            (Filter { ids: vec!["x".to_owned(), letter.id.to_owned()], ..any() }, true),
            (Filter { ids: vec!["x".to_owned()], ..any() }, false),
            (Filter { since_ms: Some(1), ..any() }, false),
        ] {
            assert_eq!(filter.matches(&letter, "p_"), expected, "{filter:?}");
        }
        assert!(any().is_empty());
        assert!(!Filter { since_ms: Some(0), ..any() }.is_empty());
    }
}
