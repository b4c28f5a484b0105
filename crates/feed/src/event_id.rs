//! The number of an event, which the value of its record has as `event_id`.
//!
//! Existing consumers of the topic parse it as int64 and use it for one thing: to recognise an
//! event that they have seen. It is the SHA-256 of the event's UUID, cut to 63 bits, so that a
//! retry, which has the same UUID, has the same number. A consumer that remembers n events mistakes
//! a new one for an old one with a probability of n / 2^63: 1e-11 for a hundred million. No other
//! layout of 63 bits does better. A prefix of time separates events of different milliseconds and
//! crowds those of the same one, and the ids of writes with an idempotency key have no time.
//!
//! The projection itself tells events apart by number and author: duplicates of an event have its
//! key.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, de};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The largest number.
const MAX: u64 = i64::MAX.cast_unsigned();
/// The namespace of identities.
const NAMESPACE: Uuid = Uuid::from_u128(0x5b1f_7c92_04ae_5d63_9c1a_e2d0_77b4_63f8);

/// Returns the number of an event: 1 to 2^63 - 1.
pub fn number(id: Uuid) -> u64 {
    let hash: [u8; 32] = Sha256::digest(id.as_bytes()).into();
    let first = hash.iter().take(8).fold(0, |number: u64, &byte| number << 8 | u64::from(byte));
    first % MAX + 1
}

/// The `event_id` in a record's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventId {
    Number(u64),
    /// In a record that a former version wrote.
    Uuid(Uuid),
}

/// The identity under which the projection remembers an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The same for all records of the event, in either format.
    pub id: Uuid,
    /// The event's UUID, which former versions remembered; `None` where the record does not have
    /// it.
    pub former: Option<Uuid>,
}

impl EventId {
    /// Returns the identity of an event of an author. `header` is the record's `ce_id`.
    pub fn identity(self, header: Option<&[u8]>, author: &str) -> Identity {
        let (number, former) = match self {
            Self::Uuid(id) => (number(id), Some(id)),
            Self::Number(given) => {
                let id = header.and_then(|text| Uuid::try_parse_ascii(text).ok());
                // A UUID that does not hash to this number belongs to another event.
                (given, id.filter(|&id| number(id) == given))
            }
        };
        let name = [&number.to_be_bytes()[..], author.as_bytes()].concat();
        Identity { id: Uuid::new_v5(&NAMESPACE, &name), former }
    }
}

impl<'de> Deserialize<'de> for EventId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either)
    }
}

struct Either;

impl de::Visitor<'_> for Either {
    type Value = EventId;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a whole number from 1 to {MAX}, or a UUID as in old records")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<EventId, E> {
        match number {
            1..=MAX => Ok(EventId::Number(number)),
            other => Err(E::invalid_value(de::Unexpected::Unsigned(other), &self)),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<EventId, E> {
        let id = Uuid::try_parse(text).map(EventId::Uuid);
        id.map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

/// Returns the value of a row of the outbox with the event's number. Rows that a former version
/// wrote have its UUID: at the start, or, where Postgres made the JSON, anywhere.
pub fn with_number(id: Uuid, value: &str) -> Cow<'_, str> {
    let at_start = format!(r#"{{"event_id":"{id}""#);
    if let Some(rest) = value.strip_prefix(&at_start) {
        return Cow::Owned(format!(r#"{{"event_id":{}{rest}"#, number(id)));
    }
    // Inside a JSON string the quotes would be escaped, so this match is the field.
    let field = format!(r#""event_id": "{id}""#);
    match value.split_once(&field).filter(|_| value.starts_with(r#"{"type": "#)) {
        Some((before, after)) => Cow::Owned(format!(r#"{before}"event_id": {}{after}"#, number(id))),
        None => Cow::Borrowed(value),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Result<EventId, serde_json::Error> {
        serde_json::from_str(&value.to_string())
    }

    proptest! {
        #[test]
        fn a_number_is_an_int64_above_zero_and_always_the_same(id: u128) {
            let (number, id) = (number(Uuid::from_u128(id)), Uuid::from_u128(id));
            prop_assert!(number.to_string().parse::<i64>().unwrap() > 0);
            prop_assert_eq!(number, super::number(id));
            prop_assert_eq!(read(&json!(number)).unwrap(), EventId::Number(number));
        }

        #[test]
        fn records_of_an_event_have_one_identity_in_either_format(id: u128, author in ".{1,9}") {
            let id = Uuid::from_u128(id);
            let (text, number) = (id.to_string(), number(id));
            let former = read(&json!(text)).unwrap().identity(Some(text.as_bytes()), &author);
            prop_assert_eq!(former, EventId::Number(number).identity(Some(text.as_bytes()), &author));
            prop_assert_eq!(former.former, Some(id));
            let bare = EventId::Number(number).identity(None, &author);
            prop_assert_eq!(bare, Identity { former: None, ..former });
            let another = EventId::Number(number ^ 1).identity(Some(text.as_bytes()), &author);
            prop_assert!(another.id != former.id && another.former.is_none());
            prop_assert_ne!(EventId::Number(number).identity(None, "").id, former.id);
        }
    }

    #[test]
    fn the_number_of_an_event_never_changes() {
        let id = Uuid::parse_str("0195e6d2-7c00-7a3f-8a51-6f1d2c3b4a59").unwrap();
        assert_eq!(number(id), 2_810_684_355_343_029_551);
    }

    #[test]
    fn an_event_id_that_is_neither_a_number_nor_a_uuid_is_rejected() {
        let max = i64::MAX.cast_unsigned();
        assert_eq!(read(&json!(max)).unwrap(), EventId::Number(max));
        for bad in [json!(0), json!(-1), json!(max + 1), json!(1.0), json!("1"), json!("x"), json!(null), json!([1])] {
            assert!(read(&bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<EventId>("18446744073709551616").is_err());
        assert!(serde_json::from_str::<EventId>("1e3").is_err());
    }

    #[test]
    fn rows_of_a_former_version_get_the_number() {
        let id = Uuid::from_u128(7);
        let (text, number) = (id.to_string(), number(id));
        let compact = json!({"event_id": text, "content": format!(r#""event_id": "{text}""#)}).to_string();
        let by_rust = format!(r#"{{"event_id":"{text}","type":"X","payload":{compact}}}"#);
        let wanted = format!(r#"{{"event_id":{number},"type":"X","payload":{compact}}}"#);
        assert_eq!(with_number(id, &by_rust), wanted);
        let tricky = json!(format!(r#""event_id": "{text}""#)).to_string();
        let by_postgres = format!(r#"{{"type": "X", "actor_id": {tricky}, "event_id": "{text}", "timestamp": 1}}"#);
        let wanted = format!(r#"{{"type": "X", "actor_id": {tricky}, "event_id": {number}, "timestamp": 1}}"#);
        assert_eq!(with_number(id, &by_postgres), wanted);
        for other in [wanted.as_str(), "l1", "", r#"{"event_id":1}"#] {
            assert_eq!(with_number(id, other), other);
            assert!(matches!(with_number(id, other), Cow::Borrowed(_)));
        }
        assert_eq!(with_number(Uuid::from_u128(8), &by_rust), by_rust);
    }
}
