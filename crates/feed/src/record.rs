//! Parsing of the records of the topic into events.

use std::borrow::Cow;

use postrider_http::{Code, json};
use postrider_kafka::{batch::Record, dead_letter::Reason, event};
use serde::Deserialize;

use super::event_id::{EventId, Identity};

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
    let actor = check(actor_id)?;
    let post_id = payload.post_id.ok_or_else(|| missing("post_id"));
    let followee = payload.followee_id.ok_or_else(|| missing("followee_id")).and_then(check);
    let change = match &*r#type {
        "POST_CREATED" => Change::Created { post_id: post_id?, author: actor },
        "POST_DELETED" => Change::Deleted { post_id: post_id?, author: actor },
        "USER_FOLLOWED" => Change::Followed { follower: actor, followee: followee? },
        "USER_UNFOLLOWED" => Change::Unfollowed { follower: actor, followee: followee? },
        "USER_ERASED" => Change::Erased { user: actor },
        other => {
            let message = format!("`{other:.40}` is not an event type of feeds");
            return Err(Reason { class: "unknown_type", message });
        }
    };
    let identity = event_id.identity(record.header(event::ID), change.author());
    Ok(Event { offset: record.offset(), identity, change })
}

fn check(id: Cow<'_, str>) -> Result<String, Reason> {
    let bad = |message: &str| Reason { class: "bad_id", message: message.to_owned() };
    match id.len() {
        0 => Err(bad("an id is empty")),
        _ if id.contains('\0') => Err(bad("an id has a null character")),
        bytes if bytes > super::model::MAX_ID_BYTES => Err(bad("an id is too long")),
        _ => Ok(id.into_owned()),
    }
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

    fn read(value: &str) -> Result<Change, &'static str> {
        let mut batch = Batch::default();
        let time = Timestamp::CreateTime(0);
        batch.push(&OwnedMessage::new(Some(value.into()), None, "t".to_owned(), time, 0, 7, None));
        let event = super::read(&batch.record(0)).map_err(|reason| reason.class)?;
        assert_eq!(event.offset, 7);
        Ok(event.change)
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
