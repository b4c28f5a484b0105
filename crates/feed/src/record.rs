//! Parsing of the records of the topic into events.

use std::borrow::Cow;

use postrider_http::{Code, decode::quoted, json};
use postrider_kafka::{batch::Record, dead_letter::Reason, event};
use serde::Deserialize;

use super::{
    event_id::{EventId, Identity},
    model::{Flaw, MAX_ID_BYTES, check_field},
};

/// The fields of an event that the projection uses.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    pub offset: i64,
    pub identity: Identity,
    pub change: Change,
}

/// The kind of event. The projection uses it only as a trigger; Postgres has the current state.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Created { post_id: i64, author: String },
    Deleted { post_id: i64, author: String },
    Followed { follower: String, followee: String },
    Unfollowed { follower: String, followee: String },
    Erased { user: String },
}

#[derive(Deserialize)]
struct Value<'a> {
    event_id: EventId,
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    actor_id: Cow<'a, str>,
    #[serde(borrow, default)]
    payload: Payload<'a>,
}

#[derive(Default, Deserialize)]
struct Payload<'a> {
    post_id: Option<i64>,
    #[serde(borrow)]
    followee_id: Option<Cow<'a, str>>,
}

/// Parses a record, or returns the reason why it is not an event.
pub fn read(record: &Record<'_>) -> Result<Event, Reason> {
    let Some(value) = record.value() else {
        return Err(Reason { class: "no_value", message: "the record has no value".to_owned() });
    };
    let Value { event_id, r#type, actor_id, payload } = json::parse_object(value).map_err(|problem| {
        let class = if problem.code == Code::INVALID_JSON { "not_json" } else { "wrong_type" };
        Reason { class, message: problem.detail }
    })?;
    let missing = |what| Reason { class: "wrong_type", message: format!("`payload.{what}` is missing") };
    let actor = check("actor_id", actor_id)?;
    let post_id = payload.post_id.ok_or_else(|| missing("post_id"));
    let followee = payload.followee_id.ok_or_else(|| missing("followee_id"));
    let followee = followee.and_then(|id| check("payload.followee_id", id));
    let change = match &*r#type {
        "POST_CREATED" => Change::Created { post_id: post_id?, author: actor },
        "POST_DELETED" => Change::Deleted { post_id: post_id?, author: actor },
        "USER_FOLLOWED" => Change::Followed { follower: actor, followee: followee? },
        "USER_UNFOLLOWED" => Change::Unfollowed { follower: actor, followee: followee? },
        "USER_ERASED" => Change::Erased { user: actor },
        other => {
            let known = "`POST_CREATED`, `POST_DELETED`, `USER_FOLLOWED`, `USER_UNFOLLOWED` or `USER_ERASED`";
            let message = format!("`type` must be {known} (got {})", quoted(other));
            return Err(Reason { class: "unknown_type", message });
        }
    };
    let identity = event_id.identity(record.header(event::ID), change.author());
    Ok(Event { offset: record.offset(), identity, change })
}

fn check(name: &'static str, id: Cow<'_, str>) -> Result<String, Reason> {
    let bad = |flaw: Flaw| Reason { class: "bad_id", message: flaw.to_string() };
    check_field(name, &id, MAX_ID_BYTES).map(|()| id.into_owned()).map_err(bad)
}

impl Change {
    /// Returns the author whose posts or followers the event changes.
    pub fn author(&self) -> &str {
        match self {
            Self::Created { author, .. } | Self::Deleted { author, .. } => author,
            Self::Followed { followee, .. } | Self::Unfollowed { followee, .. } => followee,
            Self::Erased { user } => user,
        }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};
    use uuid::Uuid;

    use super::*;
    use crate::model;
    use postrider_kafka::batch::Batch;

    fn event(value: &str) -> Result<Event, Reason> {
        let mut batch = Batch::default();
        let time = Timestamp::CreateTime(0);
        batch.push(&OwnedMessage::new(Some(value.into()), None, "t".to_owned(), time, 0, 7, None));
        super::read(&batch.record(0))
    }

    fn read(value: &str) -> Result<Change, &'static str> {
        let event = event(value).map_err(|reason| reason.class)?;
        assert_eq!(event.offset, 7);
        Ok(event.change)
    }

    #[test]
    fn the_reason_of_an_invalid_record_names_the_field_what_was_found_and_what_is_wanted() {
        for (value, reason) in [
            ("7", "the value must be a JSON object (got 7)"),
            (
                r#"{"event_id":0,"type":"USER_ERASED","actor_id":"a"}"#,
                "`event_id` must be a whole number from 1 to 9223372036854775807, or a UUID as in old records (got 0)",
            ),
            (r#"{"event_id":1,"type":"USER_ERASED","actor_id":5}"#, "`actor_id` must be a string (got 5)"),
            (
                r#"{"event_id":1,"type":"POST_CREATED","actor_id":"a","payload":{"post_id":"1"}}"#,
                r#"`payload.post_id` must be a whole number from -9223372036854775808 to 9223372036854775807 (got the string "1")"#,
            ),
            (r#"{"event_id":1,"type":"USER_ERASED","actor_id":""}"#, "`actor_id` must not be missing or empty"),
        ] {
            assert_eq!(event(value).unwrap_err().message, reason);
        }
    }

    #[test]
    fn written_events_are_read_back() {
        let (id, text) = (Uuid::from_u128(1), |text: &str| text.to_owned());
        let (head, tail) = model::created(id, "a\"b", "…");
        assert_eq!(read(&format!("{head}12{tail}")), Ok(Change::Created { post_id: 12, author: text("a\"b") }));
        let followed = model::followed(id, "USER_FOLLOWED", "u", "a");
        assert_eq!(read(&followed), Ok(Change::Followed { follower: text("u"), followee: text("a") }));
        let unfollowed = model::followed(id, "USER_UNFOLLOWED", "u", "a");
        assert_eq!(read(&unfollowed), Ok(Change::Unfollowed { follower: text("u"), followee: text("a") }));
        assert_eq!(read(&model::erased(id, "u")), Ok(Change::Erased { user: text("u") }));
    }

    #[test]
    fn an_invalid_record_is_dead_lettered_with_a_class() {
        let with = |kind: &str, actor: &str, payload: &str| {
            read(&format!(
                r#"{{"event_id":"{}","type":"{kind}","actor_id":"{actor}","payload":{payload}}}"#,
                Uuid::nil()
            ))
        };
        assert_eq!(read("{"), Err("not_json"));
        assert_eq!(read("[]"), Err("wrong_type"));
        assert_eq!(read(r#"{"type":"POST_CREATED"}"#), Err("wrong_type"));
        for id in ["0", "-1", "1.5", "9223372036854775808", "\"7\"", "null", "\"\"", "[1]"] {
            let erased = format!(r#"{{"event_id":{id},"type":"USER_ERASED","actor_id":"a"}}"#);
            assert_eq!(read(&erased), Err("wrong_type"), "{id}");
        }
        assert_eq!(with("POST_CREATED", "a", "{}"), Err("wrong_type"));
        assert_eq!(with("USER_FOLLOWED", "a", r#"{"post_id":1}"#), Err("wrong_type"));
        assert_eq!(with("POST_LIKED", "a", r#"{"post_id":1}"#), Err("unknown_type"));
        assert_eq!(with("USER_ERASED", "", "{}"), Err("bad_id"));
        assert_eq!(with("USER_ERASED", "\\u0000", "{}"), Err("bad_id"));
    }
}
