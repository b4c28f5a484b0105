//! A message as it comes in, and what is wrong with it.

use std::borrow::Cow;

use serde::Deserialize;
use utoipa::ToSchema;

use crate::platform::http::{Code, Problem, json};

/// Longest id, in bytes.
pub const MAX_ID_BYTES: usize = 255;

/// A message that nobody has looked at yet. Further fields travel with it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Message)]
pub struct Draft<'a> {
    /// The conversation. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255)]
    chat_id: Cow<'a, str>,
    /// Who says it. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255)]
    sender_id: Cow<'a, str>,
    /// Who is to get it. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255)]
    receiver_id: Cow<'a, str>,
    /// What is said. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1)]
    content: Cow<'a, str>,
}

/// What of a record of any producer matters here.
#[derive(Debug, Deserialize)]
struct Addressed<'a> {
    #[serde(rename = "receiverId", borrow, default)]
    receiver_id: Cow<'a, str>,
}

/// Why an id names nobody.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("`{0}` is missing or empty")]
    Missing(&'static str),
    #[error("`{0}` has a null character, which cannot be stored")]
    Nul(&'static str),
    #[error("`{0}` has {1} bytes, the limit is {MAX_ID_BYTES}")]
    TooLong(&'static str, usize),
}

impl From<Flaw> for Problem {
    fn from(flaw: Flaw) -> Self {
        let code = match flaw {
            Flaw::Missing(_) | Flaw::Nul(_) => Code::InvalidRequest,
            Flaw::TooLong(..) => Code::InvalidField,
        };
        Self::new(code, flaw.to_string())
    }
}

/// Checks the body of a message, and returns whom it is for.
pub fn check(body: &[u8]) -> Result<Cow<'_, str>, Problem> {
    let Draft { chat_id, sender_id, receiver_id, content } = json::parse_object(body)?;
    for (name, id) in [("chatId", &chat_id), ("senderId", &sender_id), ("receiverId", &receiver_id)] {
        check_id(name, id)?;
    }
    match &*content {
        "" => Err(Flaw::Missing("content").into()),
        text if text.contains('\0') => Err(Flaw::Nul("content").into()),
        _ => Ok(receiver_id),
    }
}

/// Whom a record is for, whoever wrote it.
pub fn receiver(value: &[u8]) -> Result<Cow<'_, str>, Problem> {
    let Addressed { receiver_id } = json::parse_object(value)?;
    check_id("receiverId", &receiver_id)?;
    Ok(receiver_id)
}

/// Whether this can be the id of somebody.
pub fn check_id(name: &'static str, id: &str) -> Result<(), Flaw> {
    match id.len() {
        0 => Err(Flaw::Missing(name)),
        _ if id.contains('\0') => Err(Flaw::Nul(name)),
        bytes if bytes > MAX_ID_BYTES => Err(Flaw::TooLong(name, bytes)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_cannot_be_stored_is_named() {
        let with = |field: &str, value: &str| {
            let mut body = serde_json::json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "x"});
            body[field] = serde_json::from_str(value).unwrap();
            check(body.to_string().as_bytes()).map(Cow::into_owned).map_err(|problem| problem.code)
        };
        assert_eq!(with("more", "[1]"), Ok("r".to_owned()));
        assert_eq!(with("receiverId", r#""a\"\u00e4\ud83c\udf89""#), Ok("a\"ä🎉".to_owned()));
        for field in ["chatId", "senderId", "receiverId", "content"] {
            for bad in [r#""""#, r#""a\u0000""#, "null", "1", "{}"] {
                assert_eq!(with(field, bad), Err(Code::InvalidRequest), "{field} {bad}");
            }
        }
        assert_eq!(with("receiverId", &format!("\"{}\"", "x".repeat(256))), Err(Code::InvalidField));
        let doubled = br#"{"chatId":"c","senderId":"s","receiverId":"r","receiverId":"q","content":"x"}"#;
        assert_eq!(check(doubled).unwrap_err().code, Code::InvalidRequest, "one message, one receiver");
        assert_eq!(check(b"[]").unwrap_err().code, Code::InvalidRequest);
        assert_eq!(receiver(br#"{"receiverId":"r"}"#).unwrap(), "r");
    }
}
