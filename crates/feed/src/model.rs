//! Incoming posts and follows, their validation, and the values of their events.

use std::borrow::Cow;

use postrider_http::{Code, Problem, json};
use postrider_time::clock;
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::event_id::number;

/// Maximum length of a user's id, in bytes.
pub const MAX_ID_BYTES: usize = 255;

/// Maximum id of a post: the largest integer that JavaScript represents exactly.
pub const MAX_POST_ID: i64 = (1 << 53) - 1;

/// A post before validation.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = PostDraft, examples(json!({"author_id": "ann", "content": "first"})))]
pub struct PostDraft<'a> {
    /// The author. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    pub author_id: Cow<'a, str>,
    /// The text. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, required = true)]
    pub content: Cow<'a, str>,
}

/// A follow or an unfollow before validation.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = FollowDraft, examples(json!({"follower_id": "bea", "followee_id": "ann"})))]
pub struct FollowDraft<'a> {
    /// The user whose feed changes. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    pub follower_id: Cow<'a, str>,
    /// The author whose posts the feed shows. Not empty, and not the follower.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    pub followee_id: Cow<'a, str>,
}

/// The reason why a post or follow cannot be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("`{0}` must not be missing or empty")]
    Missing(&'static str),
    #[error("`{0}` must not contain a null character (U+0000), which cannot be stored")]
    Nul(&'static str),
    #[error("`{field}` must have at most {limit} bytes (got {bytes})")]
    TooLong { field: &'static str, bytes: usize, limit: usize },
    #[error("`follower_id` and `followee_id` must differ")]
    Oneself,
}

impl Flaw {
    /// Returns the problem, without the place of the field.
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::TooLong { .. } => Code::INVALID_FIELD,
            _ => Code::INVALID_REQUEST,
        };
        Problem::new(code, self.to_string())
    }
}

impl From<Flaw> for Problem {
    fn from(flaw: Flaw) -> Self {
        let field = match flaw {
            Flaw::Missing(field) | Flaw::Nul(field) | Flaw::TooLong { field, .. } => field,
            Flaw::Oneself => "followee_id",
        };
        flaw.problem().at_field(field)
    }
}

impl PostDraft<'_> {
    pub fn check(&self, max_content_bytes: usize) -> Result<(), Flaw> {
        check_field("author_id", &self.author_id, MAX_ID_BYTES)?;
        check_field("content", &self.content, max_content_bytes)
    }
}

impl FollowDraft<'_> {
    pub fn check(&self) -> Result<(), Flaw> {
        check_field("follower_id", &self.follower_id, MAX_ID_BYTES)?;
        check_field("followee_id", &self.followee_id, MAX_ID_BYTES)?;
        if self.follower_id == self.followee_id { Err(Flaw::Oneself) } else { Ok(()) }
    }
}

/// Checks that a text is not empty, that Postgres can store it, and that it has at most `limit`
/// bytes.
pub fn check_field(field: &'static str, text: &str, limit: usize) -> Result<(), Flaw> {
    match text.len() {
        0 => Err(Flaw::Missing(field)),
        _ if text.contains('\0') => Err(Flaw::Nul(field)),
        bytes if bytes > limit => Err(Flaw::TooLong { field, bytes, limit }),
        _ => Ok(()),
    }
}

/// Returns the value of a post's event in two parts: before and after the post's id, which Postgres
/// assigns.
pub fn created(event_id: Uuid, author_id: &str, content: &str) -> (String, String) {
    let mut head = begin(event_id, "POST_CREATED", author_id.len());
    payload_of(&mut head, author_id);
    head.extend_from_slice(br#"{"post_id":"#);
    let mut tail = Vec::with_capacity(content.len() + 40);
    tail.extend_from_slice(br#","content":"#);
    json::write_string(&mut tail, content);
    end(&mut tail);
    (text(head), text(tail))
}

/// Returns the value of the event of a deletion in two parts: before and after the author's id,
/// which Postgres adds.
pub fn deleted(event_id: Uuid, post_id: i64) -> (String, String) {
    let mut tail = Vec::with_capacity(80);
    tail.extend_from_slice(br#","payload":{"post_id":"#);
    tail.extend_from_slice(itoa::Buffer::new().format(post_id).as_bytes());
    end(&mut tail);
    (text(begin(event_id, "POST_DELETED", 0)), text(tail))
}

/// Returns the value of the event of a follow, or of an unfollow. `kind` is `USER_FOLLOWED` or
/// `USER_UNFOLLOWED`.
pub fn followed(event_id: Uuid, kind: &str, follower_id: &str, followee_id: &str) -> String {
    let mut value = begin(event_id, kind, follower_id.len() + followee_id.len());
    payload_of(&mut value, follower_id);
    value.extend_from_slice(br#"{"followee_id":"#);
    json::write_string(&mut value, followee_id);
    end(&mut value);
    text(value)
}

/// Returns the value of the event of an erased account.
pub fn erased(event_id: Uuid, user_id: &str) -> String {
    let mut value = begin(event_id, "USER_ERASED", user_id.len());
    payload_of(&mut value, user_id);
    value.push(b'{');
    end(&mut value);
    text(value)
}

/// Writes the value up to the actor's id, with capacity for `more` bytes.
fn begin(event_id: Uuid, kind: &str, more: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(140 + more);
    value.extend_from_slice(br#"{"event_id":"#);
    value.extend_from_slice(itoa::Buffer::new().format(number(event_id)).as_bytes());
    value.extend_from_slice(br#","type":""#);
    value.extend_from_slice(kind.as_bytes());
    value.extend_from_slice(br#"","actor_id":"#);
    value
}

fn payload_of(value: &mut Vec<u8>, actor_id: &str) {
    json::write_string(value, actor_id);
    value.extend_from_slice(br#","payload":"#);
}

fn end(value: &mut Vec<u8>) {
    value.extend_from_slice(br#"},"timestamp":"#);
    value.extend_from_slice(itoa::Buffer::new().format(clock::now_ms() / 1_000).as_bytes());
    value.push(b'}');
}

/// Converts the bytes, which are always UTF-8 here.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn missing_and_invalid_fields_are_reported() {
        let post = |author: &str, content: &str| {
            PostDraft { author_id: author.to_owned().into(), content: content.to_owned().into() }.check(5)
        };
        assert_eq!(post("a", "fünf"), Ok(()));
        assert_eq!(post("", "x"), Err(Flaw::Missing("author_id")));
        assert_eq!(post("a", ""), Err(Flaw::Missing("content")));
        assert_eq!(post("a\0", "x"), Err(Flaw::Nul("author_id")));
        assert_eq!(post("a", "fünfe"), Err(Flaw::TooLong { field: "content", bytes: 6, limit: 5 }));
        let follow = |follower: &str, followee: &str| {
            FollowDraft { follower_id: follower.to_owned().into(), followee_id: followee.to_owned().into() }.check()
        };
        assert_eq!(follow("a", "b"), Ok(()));
        assert_eq!(follow("a", "a"), Err(Flaw::Oneself));
        assert_eq!(follow("a", ""), Err(Flaw::Missing("followee_id")));
        assert!(matches!(follow(&"x".repeat(256), "b"), Err(Flaw::TooLong { .. })));
    }

    /// Pins the values, because existing consumers parse them field by field.
    #[test]
    fn the_values_of_events_do_not_change() {
        let id = Uuid::from_u128(7);
        let (number, (head, tail)) = (number(id), created(id, "a", "hi"));
        let now_s = clock::now_ms() / 1_000;
        let begin = |kind: &str| format!(r#"{{"event_id":{number},"type":"{kind}","actor_id":"a","payload":"#);
        let exactly = |value: &str, kind: &str, payload: &str| {
            let rest = value.strip_prefix(&begin(kind)).and_then(|rest| rest.strip_prefix(payload));
            let time = rest.and_then(|rest| rest.strip_prefix(r#","timestamp":"#)?.strip_suffix('}'));
            assert!(
                time.unwrap_or(value).parse::<i64>().is_ok_and(|time| (now_s..now_s + 60).contains(&time)),
                "{value}"
            );
        };
        exactly(&format!("{head}12{tail}"), "POST_CREATED", r#"{"post_id":12,"content":"hi"}"#);
        let (head, tail) = deleted(id, 12);
        exactly(&format!(r#"{head}"a"{tail}"#), "POST_DELETED", r#"{"post_id":12}"#);
        exactly(&followed(id, "USER_FOLLOWED", "a", "b"), "USER_FOLLOWED", r#"{"followee_id":"b"}"#);
        exactly(&erased(id, "a"), "USER_ERASED", "{}");
    }

    proptest! {
        #[test]
        fn an_event_has_the_fields_of_the_write(author in ".{1,20}", content in ".{1,40}", post_id in 1..MAX_POST_ID) {
            let id = Uuid::from_u128(7);
            let (head, tail) = created(id, &author, &content);
            let value: Value = serde_json::from_str(&format!("{head}{post_id}{tail}")).unwrap();
            prop_assert_eq!(&value["event_id"], &Value::from(number(id)));
            prop_assert_eq!(&value["type"], "POST_CREATED");
            prop_assert_eq!(&value["actor_id"], &Value::from(author.clone()));
            prop_assert_eq!(&value["payload"]["post_id"], &Value::from(post_id));
            prop_assert_eq!(&value["payload"]["content"], &Value::from(content.clone()));
            prop_assert!(value["timestamp"].as_i64().unwrap() > 1_600_000_000);
            let value: Value = serde_json::from_str(&followed(id, "USER_FOLLOWED", &author, &content)).unwrap();
            prop_assert_eq!(&value["payload"]["followee_id"], &Value::from(content));
            let value: Value = serde_json::from_str(&erased(id, &author)).unwrap();
            prop_assert_eq!(&value["payload"], &serde_json::json!({}));
        }
    }
}
