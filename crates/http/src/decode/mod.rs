//! Decodes the bodies of requests: JSON objects, whose errors name the field, say what was found
//! and what is wanted.
//!
//! A body that is right is decoded once, by serde, and nothing else is done. Only a body that is
//! refused, or that has an unknown field, is looked at again: fields whose names differ only in
//! case are taken for the known ones, as Go's `encoding/json` does; other names that are near a
//! known one become a [warning](crate::warning).
//!
//! A struct with `#[serde(deny_unknown_fields)]` refuses unknown fields. Routes that delete or
//! replay use it, because a misspelt filter or dry run would change more than the caller wants.

mod fault;
mod located;
mod object;
mod watch;

use std::borrow::Cow;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, Visitor, value::Error as Probed},
    forward_to_deserialize_any,
};

pub use self::{
    fault::{Fault, Flaw, Step, one_of, quoted, segment, shortened},
    located::is_too_large,
};
use self::{
    located::{Located, described_text},
    object::{Object, each_field},
    watch::Watch,
};
use super::{
    code::Code,
    json,
    problem::{Place, Problem},
    warning::{self, NearMiss, Source},
};

/// Maximum number of unknown fields that an error names.
const MAX_NAMED: usize = 3;

/// A decoded body.
pub struct Decoded<T> {
    pub value: T,
    /// True if a field was taken under another name than the one in the body.
    pub renamed: bool,
    /// A field that was given in two spellings; its own name counts.
    pub doubled: Option<&'static str>,
    pub near_misses: Vec<NearMiss>,
}

/// Validates a body that must be an object, and decodes it, borrowing from it. Warns of near misses
/// in the answer to the current request.
pub fn object<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    noted(decode(body, "body")).map(|decoded| decoded.value)
}

/// Like [`object`], and returns also the body with the fields named as `T` names them.
pub fn object_with_text<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<(T, Cow<'a, str>), Problem> {
    let decoded = noted(decode::<T>(body, "body"))?;
    if let Some(name) = decoded.doubled {
        // Consumers that do not heed case would take the other one.
        let detail = format!("`{name}` is given twice, in different spellings");
        return Err(Problem::new(Code::INVALID_REQUEST, detail).at_field(name));
    }
    let text = std::str::from_utf8(body).map_err(|error| Problem::new(Code::INVALID_JSON, error.to_string()))?;
    let text = if decoded.renamed { respelt(text, fields::<T>()) } else { text.into() };
    Ok((decoded.value, text))
}

/// Like [`object`], but refuses unknown fields whatever `T` says.
pub fn strict<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    noted(decode_with(body, "body", true)).map(|decoded| decoded.value)
}

/// A refused body, and what may have been meant.
pub struct Refused {
    pub problem: Problem,
    pub near_misses: Vec<NearMiss>,
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self { problem, near_misses: Vec::new() }
    }
}

/// Notes the near misses of a body for the answer to the current request.
pub fn noted<T>(decoded: Result<Decoded<T>, Box<Refused>>) -> Result<Decoded<T>, Problem> {
    match decoded {
        Ok(mut decoded) => {
            warning::note(&mut decoded.near_misses);
            Ok(decoded)
        }
        Err(mut refused) => {
            warning::note(&mut refused.near_misses);
            Err(refused.problem)
        }
    }
}

/// Like [`object`], but returns the near misses, for records that have results of their own. Errors
/// call it by `what`, such as `record`.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8], what: &str) -> Result<Decoded<T>, Box<Refused>> {
    decode_with(body, what, false)
}

fn decode_with<'a, T: Deserialize<'a>>(body: &'a [u8], what: &str, strict: bool) -> Result<Decoded<T>, Box<Refused>> {
    let text = json::check(body).map_err(|fault| Box::new(json::refused(&fault, what).into()))?;
    if !text.trim_ascii_start().starts_with('{') {
        return Err(Box::new(not_an_object(text, what).into()));
    }
    let mut unknown = 0;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let decoded = T::deserialize(Watch { inner: &mut deserializer, unknown: &mut unknown });
    match decoded.ok().filter(|_| deserializer.end().is_ok()) {
        Some(value) if unknown == 0 => Ok(Decoded { value, renamed: false, doubled: None, near_misses: Vec::new() }),
        value => look_again(text, value, what, strict),
    }
}

/// Returns the error of a text that is not an object.
pub(super) fn not_an_object(text: &str, what: &str) -> Problem {
    let (wanted, found) = (format!("the {what} must be a JSON object"), text.trim_ascii());
    match serde_json::from_str::<IgnoredAny>(text) {
        Err(error) => {
            let detail = format!("{wanted} (got {}); it is not valid JSON: {error}", quoted(found));
            Problem::new(Code::INVALID_JSON, detail)
        }
        Ok(_) => {
            let detail = format!("{wanted} (got {})", described_text(found));
            Problem::new(Code::INVALID_REQUEST, detail).at(Place::Pointer("#".to_owned()))
        }
    }
}

/// Returns the error of a value that is valid JSON and that `T` refuses; `None` if it does not.
#[cold]
pub(super) fn of_value<'a, T: Deserialize<'a>>(text: &'a str) -> Option<Problem> {
    let value = serde_json::from_str(text).ok()?;
    T::deserialize(Located(value)).err().map(|fault| explain(&fault))
}

/// Decodes a body again that has unknown fields, or was refused.
#[cold]
fn look_again<'a, T: Deserialize<'a>>(
    text: &'a str,
    decoded: Option<T>,
    what: &str,
    strict: bool,
) -> Result<Decoded<T>, Box<Refused>> {
    let known = fields::<T>();
    let object = Object::parse(text, known).map_err(|error| Box::new(json::malformed(&error, what).into()))?;
    let (renamed, doubled) = (object.is_renamed(), object.doubled);
    let unknown: Vec<Cow<'_, str>> = unknown_names(&object, known).cloned().collect();
    if strict && !unknown.is_empty() {
        return Err(Box::new(refusal(&unknown, known).into()));
    }
    let given = |name: &str| object.entries.iter().any(|entry| entry.meant.unwrap_or(&entry.name) == name);
    let absent: Vec<&'static str> = known.iter().copied().filter(|name| !given(name)).collect();
    let near_misses = warning::near_misses(Source::Field, unknown.iter().map(|name| &**name), &absent);
    let value = match decoded {
        Some(value) if !renamed => Ok(value),
        _ => T::deserialize(object),
    };
    match value {
        Ok(value) => Ok(Decoded { value, renamed, doubled, near_misses }),
        Err(fault) if fault.flaw == Flaw::Unknown => Err(Box::new(refusal(&unknown, known).into())),
        Err(fault) => Err(Box::new(Refused { problem: explain(&fault), near_misses })),
    }
}

fn unknown_names<'e, 'a>(object: &'e Object<'a>, known: &[&str]) -> impl Iterator<Item = &'e Cow<'a, str>> {
    let unnamed = object.entries.iter().filter(|entry| entry.meant.is_none()).map(|entry| &entry.name);
    unnamed.filter(|name| !known.contains(&&***name))
}

/// Returns the text of an object with the names of its fields as they are known.
fn respelt(text: &str, known: &'static [&'static str]) -> Cow<'static, str> {
    let mut out = Vec::with_capacity(text.len());
    let written = Object::parse(text, known).and_then(|object| {
        each_field(text, |name, value| {
            let entry = object.entries.iter().find(|entry| std::ptr::eq(entry.value, value));
            out.push(if out.is_empty() { b'{' } else { b',' });
            json::write_string(&mut out, entry.and_then(|entry| entry.meant).unwrap_or(&name));
            out.push(b':');
            out.extend_from_slice(value.get().as_bytes());
        })
    });
    if written.is_err() {
        return text.to_owned().into();
    }
    out.push(b'}');
    String::from_utf8(out).unwrap_or_default().into()
}

/// Returns the error of a value in a body.
pub fn explain(fault: &Fault) -> Problem {
    Problem::new(code(fault), fault.to_string()).at(Place::Pointer(fault.pointer()))
}

/// Returns the code of an error: a value out of range is well-formed.
pub fn code(fault: &Fault) -> Code {
    if matches!(fault.flaw, Flaw::Value { .. }) { Code::INVALID_FIELD } else { Code::INVALID_REQUEST }
}

/// Returns the error of fields that are unknown where unknown fields are refused.
fn refusal(unknown: &[Cow<'_, str>], known: &[&'static str]) -> Problem {
    let details: Vec<(&str, String)> =
        unknown.iter().take(MAX_NAMED).map(|name| (&**name, unknown_name("field", name, known))).collect();
    let detail = details.iter().map(|(_, detail)| detail.as_str()).collect::<Vec<_>>().join(" ");
    details.iter().fold(Problem::new(Code::INVALID_REQUEST, detail), |problem, (name, detail)| {
        problem.at_with(Place::Pointer(format!("#{}", segment(name))), detail)
    })
}

/// Says that a field or parameter is unknown, and which one may be meant.
pub fn unknown_name(kind: &str, name: &str, known: &[&'static str]) -> String {
    let (meant, name) = (warning::nearest(known, name), shortened(name));
    match meant {
        Some(meant) => format!("unknown {kind} `{name}`; did you mean `{meant}`?"),
        None if known.is_empty() => format!("unknown {kind} `{name}`; this route takes none"),
        None => {
            let known = known.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", ");
            format!("unknown {kind} `{name}`; the {kind}s are {known}")
        }
    }
}

/// Returns the names of the fields of a struct; nothing for other types.
pub fn fields<'a, T: Deserialize<'a>>() -> &'static [&'static str] {
    let mut found: &'static [&'static str] = &[];
    // Fails after it has seen the fields.
    let _ = T::deserialize(Fields(&mut found));
    found
}

/// A deserializer that only takes down which fields the type asks for.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = Probed;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Probed> {
        *self.0 = fields;
        Err(Probed::custom("only the fields are wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Probed> {
        Err(Probed::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests;
