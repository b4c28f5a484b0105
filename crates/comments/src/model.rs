//! Comments as clients send them, in JSON or a form, with their validation, and as they are read.

use std::borrow::Cow;

use postrider_http::{Code, Problem, decode, params};
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::store::Row;

/// Longest `author_id` or `post_id`, in bytes.
pub const MAX_ID_BYTES: usize = 255;

/// Largest integer that JavaScript represents exactly.
const MAX_NUMBER: u64 = (1 << 53) - 1;

/// An integer that every JSON parser reads without loss of precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "u64")]
#[schema(as = Integer53, maximum = 9007199254740991u64)]
pub struct Whole(u64);

impl TryFrom<u64> for Whole {
    type Error = &'static str;

    fn try_from(number: u64) -> Result<Self, &'static str> {
        if number <= MAX_NUMBER { Ok(Self(number)) } else { Err("too large") }
    }
}

/// An id of an author or a post.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = CommentReference)]
#[serde(untagged, expecting = "must be a string or a whole number from 0 to 2^53 - 1")]
pub enum Id {
    Number(#[schema(inline)] Whole),
    Text(String),
}

impl Id {
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Number(Whole(number)) => number.to_string().into(),
            Self::Text(text) => text.into(),
        }
    }
}

/// A valid comment. Also the value of its record.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Comment {
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub author_id: Option<Id>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub post_id: Option<Id>,
}

/// A comment before validation.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = CommentDraft, examples(json!({"text": "nice", "author_id": "ann", "post_id": 7})))]
pub struct Draft {
    /// The text. Neither empty nor blank.
    #[schema(min_length = 1, nullable = false, required = true)]
    text: Option<String>,
    /// The author: a string, or a whole number.
    author_id: Option<Id>,
    /// The post that is commented on: a string, or a whole number.
    post_id: Option<Id>,
}

/// The reason why a comment cannot be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("`text` must not be missing, empty or blank")]
    NoText,
    #[error("`{0}` must not contain a null character (U+0000), which cannot be stored")]
    Nul(&'static str),
    #[error("`{field}` must have at most {limit} bytes (got {bytes})")]
    TooLarge { field: &'static str, bytes: usize, limit: usize },
}

impl Flaw {
    /// Returns the problem, without the place of the field.
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::NoText | Self::Nul(_) => Code::INVALID_REQUEST,
            Self::TooLarge { .. } => Code::INVALID_FIELD,
        };
        Problem::new(code, self.to_string())
    }
}

impl From<Flaw> for Problem {
    fn from(flaw: Flaw) -> Self {
        let field = match flaw {
            Flaw::NoText => "text",
            Flaw::Nul(field) | Flaw::TooLarge { field, .. } => field,
        };
        flaw.problem().at_field(field)
    }
}

impl Draft {
    /// Reads the fields of an `application/x-www-form-urlencoded` body; unknown fields are ignored.
    pub fn from_form(body: &[u8]) -> Result<Self, Problem> {
        params::from_form(body)
    }

    pub fn from_json(body: &[u8]) -> Result<Self, Problem> {
        decode::object(body)
    }

    /// Reads the value of a record of any producer. Unknown fields are ignored.
    pub fn from_record(value: &[u8]) -> Result<Self, Problem> {
        decode::decode(value, "value").map(|decoded| decoded.value).map_err(|refused| refused.problem)
    }

    /// Validates the draft. An empty id, as forms send it, counts as none.
    pub fn check(self, max_text_bytes: usize) -> Result<Comment, Flaw> {
        let text = self.text.filter(|text| !text.trim().is_empty()).ok_or(Flaw::NoText)?;
        check_field("text", &text, max_text_bytes)?;
        let id = |field, id: Option<Id>| {
            let Some(id) = id.filter(|id| !id.text().is_empty()) else { return Ok(None) };
            check_field(field, &id.text(), MAX_ID_BYTES)?;
            Ok(Some(id))
        };
        Ok(Comment { text, author_id: id("author_id", self.author_id)?, post_id: id("post_id", self.post_id)? })
    }
}

/// Checks that Postgres can store this text and that it has at most `limit` bytes.
pub fn check_field(field: &'static str, text: &str, limit: usize) -> Result<(), Flaw> {
    match text.len() {
        _ if text.contains('\0') => Err(Flaw::Nul(field)),
        bytes if bytes > limit => Err(Flaw::TooLarge { field, bytes, limit }),
        _ => Ok(()),
    }
}

/// A stored comment.
#[derive(Serialize, ToSchema)]
#[schema(as = StoredComment)]
pub struct Listed<'a> {
    /// The id of the comment's event, a UUID.
    id: &'a str,
    text: &'a str,
    /// Author of the comment as text, even if it was sent as a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    author_id: Option<&'a str>,
    /// Post that is commented on as text, even if it was sent as a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    post_id: Option<&'a str>,
    /// Time at which Kafka received the comment, in RFC 3339.
    #[schema(format = DateTime)]
    created_at: String,
}

impl<'a> From<&'a Row> for Listed<'a> {
    fn from(row: &'a Row) -> Self {
        Self {
            id: &row.event_id,
            text: &row.text,
            author_id: row.author_id.as_deref(),
            post_id: row.post_id.as_deref(),
            created_at: clock::rfc3339(row.created_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn form(body: &str) -> Result<Comment, Problem> {
        Draft::from_form(body.as_bytes())?.check(100).map_err(Problem::from)
    }

    #[test]
    fn a_form_is_read_as_browsers_write_it() {
        let comment = form("text=so+nice%21+%F0%9F%8E%89&author_id=&post_id=7&other=1&&text2").unwrap();
        let expected =
            Comment { text: "so nice! 🎉".to_owned(), author_id: None, post_id: Some(Id::Text("7".to_owned())) };
        assert_eq!(comment, expected);
        assert_eq!(form("te%78t=a%zz").unwrap().text, "a%zz");
        for bad in ["", "text", "text=", "text=+%09", "text=a&text=b", "text=%ff", "text=a%00", "{\"text\":\"a\"}"] {
            assert_eq!(form(bad).unwrap_err().code, Code::INVALID_REQUEST, "{bad}");
        }
    }

    #[test]
    fn invalid_fields_are_reported() {
        let check = |body: &str| Draft::from_json(body.as_bytes()).unwrap().check(5).map(|_| ());
        assert_eq!(check(r#"{"text":"fünf","author_id":"a","post_id":9007199254740991,"x":[]}"#), Ok(()));
        assert_eq!(check(r#"{"text":null}"#), Err(Flaw::NoText));
        assert_eq!(check(r#"{"text":" \n\u00a0"}"#), Err(Flaw::NoText));
        assert_eq!(check(r#"{"text":"a\u0000"}"#), Err(Flaw::Nul("text")));
        assert_eq!(check(r#"{"text":"a","post_id":"\u0000"}"#), Err(Flaw::Nul("post_id")));
        assert_eq!(check(r#"{"text":"fünfe"}"#), Err(Flaw::TooLarge { field: "text", bytes: 6, limit: 5 }));
        let long = format!(r#"{{"text":"a","author_id":"{}"}}"#, "x".repeat(256));
        assert_eq!(check(&long), Err(Flaw::TooLarge { field: "author_id", bytes: 256, limit: MAX_ID_BYTES }));
        for bad in [
            r#"{"text":1}"#,
            r#"{"text":"a","post_id":-1}"#,
            r#"{"text":"a","post_id":9007199254740992}"#,
            r#"{"text":"a","author_id":[]}"#,
            "[]",
        ] {
            assert_eq!(Draft::from_json(bad.as_bytes()).unwrap_err().code, Code::INVALID_REQUEST, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_a_form(text in "\\PC{1,40}") {
            prop_assume!(!text.trim().is_empty());
            let encoded: String = percent_encoding::percent_encode(text.as_bytes(), percent_encoding::NON_ALPHANUMERIC).collect();
            let draft = Draft::from_form(format!("text={encoded}").as_bytes()).unwrap();
            prop_assert_eq!(draft.check(1_000).unwrap().text, text);
        }

        #[test]
        fn parsing_any_form_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Draft::from_form(&bytes);
        }
    }
}
