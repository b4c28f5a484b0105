//! Parses and checks messages.

use std::borrow::Cow;

use axum::http::{HeaderMap, HeaderName};
use postrider_http::{
    Code, Problem,
    context::single,
    decode::{self, quoted},
    json,
    problem::Place,
};
use serde::Deserialize;
use utoipa::ToSchema;

static RECEIVER_ID: HeaderName = HeaderName::from_static("receiverid");

/// Longest id, in bytes.
pub const MAX_ID_BYTES: usize = 255;

/// A message to send. Additional fields are stored and delivered unchanged.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Message, examples(json!({"chatId": "c", "senderId": "ann", "receiverId": "bob", "content": "hello"})))]
pub struct Draft<'a> {
    /// Conversation id. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    chat_id: Cow<'a, str>,
    /// Sender id. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    sender_id: Cow<'a, str>,
    /// Receiver id. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    receiver_id: Cow<'a, str>,
    /// Message text. Not empty.
    #[serde(borrow, default)]
    #[schema(min_length = 1, required = true)]
    content: Cow<'a, str>,
}

/// The part of any producer's record that postrider needs.
#[derive(Debug, Deserialize)]
struct Addressed<'a> {
    #[serde(rename = "receiverId", borrow, default)]
    receiver_id: Cow<'a, str>,
}

/// Error of an invalid id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("`{0}` is missing or empty")]
    Missing(&'static str),
    #[error("`{0}` must not contain a null character")]
    Nul(&'static str),
    #[error("`{0}` must have at most {MAX_ID_BYTES} bytes (got {1})")]
    TooLong(&'static str, usize),
}

/// Error of a record of which the receiver cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unaddressed {
    /// It is not JSON, or not an object with a `receiverId` of the right type.
    #[error("{}", .0.detail)]
    Body(Problem),
    #[error(transparent)]
    Id(#[from] Flaw),
}

impl Flaw {
    /// Returns the problem, without the place of the id.
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::Missing(_) | Self::Nul(_) => Code::INVALID_REQUEST,
            Self::TooLong(..) => Code::INVALID_FIELD,
        };
        Problem::new(code, self.to_string())
    }
}

impl From<Flaw> for Problem {
    fn from(flaw: Flaw) -> Self {
        let (Flaw::Missing(field) | Flaw::Nul(field) | Flaw::TooLong(field, _)) = flaw;
        flaw.problem().at_field(field)
    }
}

/// A message that can be sent.
#[derive(Debug)]
pub struct Checked<'a> {
    pub sender_id: Cow<'a, str>,
    pub receiver_id: Cow<'a, str>,
    /// The body, with the fields named as consumers know them.
    pub text: Cow<'a, str>,
}

/// Checks the body of a message.
pub fn check(body: &[u8]) -> Result<Checked<'_>, Problem> {
    let (Draft { chat_id, sender_id, receiver_id, content }, text) = decode::object_with_text(body)?;
    for (name, id) in [("chatId", &chat_id), ("senderId", &sender_id), ("receiverId", &receiver_id)] {
        check_id(name, id)?;
    }
    match &*content {
        "" => Err(Flaw::Missing("content").into()),
        text if text.contains('\0') => Err(Flaw::Nul("content").into()),
        _ => Ok(Checked { sender_id, receiver_id, text }),
    }
}

/// Returns the receiver of a record of any producer.
pub fn receiver(value: &[u8]) -> Result<Cow<'_, str>, Unaddressed> {
    let Addressed { receiver_id } = json::parse_object(value).map_err(Unaddressed::Body)?;
    check_id("receiverId", &receiver_id)?;
    Ok(receiver_id)
}

/// Checks that a text can be an id: not empty, no null character, at most [`MAX_ID_BYTES`] bytes.
pub fn check_id(name: &'static str, id: &str) -> Result<(), Flaw> {
    match id.len() {
        0 => Err(Flaw::Missing(name)),
        _ if id.contains('\0') => Err(Flaw::Nul(name)),
        bytes if bytes > MAX_ID_BYTES => Err(Flaw::TooLong(name, bytes)),
        _ => Ok(()),
    }
}

/// Returns the receiver's id from the header or the query.
pub fn receiver_of_request(headers: &HeaderMap, query: Option<String>) -> Result<String, Problem> {
    let header = single(headers, &RECEIVER_ID, "ReceiverId")?.map(|value| String::from_utf8(value.as_bytes().to_vec()));
    let header = header.transpose().map_err(|_| invalid("`ReceiverId` is not UTF-8").at_header("ReceiverId"))?;
    let in_header = header.is_some();
    let receiver = header.or(query).filter(|id| !id.is_empty()).ok_or_else(missing_receiver)?;
    check_id("receiverId", &receiver).map_err(|flaw| match in_header {
        true => flaw.problem().at_header("ReceiverId"),
        false => flaw.problem().at_parameter("receiverId"),
    })?;
    Ok(receiver)
}

/// Returns the problem of a request without a receiver. Clients know its detail.
fn missing_receiver() -> Problem {
    let detail = "`receiverId` is missing: send the header `ReceiverId`, or the parameter `receiverId`";
    invalid("Missing data").at_with(Place::Parameter("receiverId".to_owned()), detail)
}

/// Returns the problem of a text in place of a cursor, without its place.
pub fn not_a_cursor(name: &str, text: &str) -> Problem {
    invalid(format!("`{name}` must be the `id` of a message or the `nextCursor` of a page (got {})", quoted(text)))
}

/// Returns the problem of a malformed request.
pub fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(Code::INVALID_REQUEST, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_or_unstorable_fields_are_rejected() {
        let with = |field: &str, value: &str| {
            let mut body = serde_json::json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "x"});
            body[field] = serde_json::from_str(value).unwrap();
            let checked = check(body.to_string().as_bytes()).map(|checked| checked.receiver_id.into_owned());
            checked.map_err(|problem| problem.code)
        };
        assert_eq!(with("more", "[1]"), Ok("r".to_owned()));
        assert_eq!(with("receiverId", r#""a\"\u00e4\ud83c\udf89""#), Ok("a\"ä🎉".to_owned()));
        for field in ["chatId", "senderId", "receiverId", "content"] {
            for bad in [r#""""#, r#""a\u0000""#, "null", "1", "{}"] {
                assert_eq!(with(field, bad), Err(Code::INVALID_REQUEST), "{field} {bad}");
            }
        }
        assert_eq!(with("receiverId", &format!("\"{}\"", "x".repeat(256))), Err(Code::INVALID_FIELD));
        let duplicate_field = br#"{"chatId":"c","senderId":"s","receiverId":"r","receiverId":"q","content":"x"}"#;
        assert_eq!(check(duplicate_field).unwrap_err().code, Code::INVALID_REQUEST, "duplicate fields are rejected");
        assert_eq!(check(b"[]").unwrap_err().code, Code::INVALID_REQUEST);
        assert_eq!(receiver(br#"{"receiverId":"r"}"#).unwrap(), "r");
    }
}
