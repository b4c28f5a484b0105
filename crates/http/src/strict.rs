//! Strict parsing of bodies: unknown fields are refused. For routes that delete or replay, where a
//! misspelt filter or dry run would change more than the caller wants.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, Visitor, value::Error},
    forward_to_deserialize_any,
};

use super::{code::Code, json, problem::Problem};

/// Maximum number of unknown fields that an error names.
const MAX_NAMED: usize = 3;

/// Like [`json::parse_object`], but refuses fields that `T` does not have, and suggests the one that
/// may be meant. `T` should have `#[serde(deny_unknown_fields)]`, for the API description.
pub fn parse_object<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    let sent: BTreeMap<Cow<'a, str>, IgnoredAny> = json::parse_object(body)?;
    let known = fields::<T>();
    debug_assert!(!known.is_empty(), "only structs without flattened fields can be parsed");
    let unknown: Vec<&str> = sent.keys().map(|field| &**field).filter(|field| !known.contains(field)).collect();
    match unknown.is_empty() {
        true => json::parse_object(body),
        false => Err(Problem::new(Code::INVALID_REQUEST, refusal(&unknown, &known))),
    }
}

fn refusal(unknown: &[&str], known: &[&str]) -> String {
    let refused =
        unknown.iter().take(MAX_NAMED).map(|field| match postrider_config::nearest(known.iter().copied(), field) {
            Some(meant) => format!("unknown field `{field}`; did you mean `{meant}`?"),
            None => format!("unknown field `{field}`; the fields are {}", quoted(known)),
        });
    refused.collect::<Vec<_>>().join(" ")
}

fn quoted(fields: &[&str]) -> String {
    fields.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", ")
}

/// Returns the names of the fields of a struct; nothing for other types.
fn fields<'a, T: Deserialize<'a>>() -> Vec<&'static str> {
    let mut found: &[&str] = &[];
    // Fails after it has seen the fields.
    let _ = T::deserialize(Fields(&mut found));
    found.to_vec()
}

/// A deserializer that only takes down which fields the type asks for.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        *self.0 = fields;
        Err(Error::custom("only the fields are wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Body {
        topic: Option<String>,
        dry_run: bool,
    }

    fn refused(body: &str) -> String {
        parse_object::<Body>(body.as_bytes()).unwrap_err().detail
    }

    #[test]
    fn known_fields_are_parsed() {
        let body = parse_object::<Body>(br#"{"topic":"t","dry_run":true}"#).unwrap();
        assert_eq!(body, Body { topic: Some("t".to_owned()), dry_run: true });
        assert_eq!(parse_object::<Body>(b"{}").unwrap(), Body::default());
    }

    #[test]
    fn an_unknown_field_is_refused_with_the_one_that_is_meant() {
        assert_eq!(refused(r#"{"topic":"t","dryRun":true}"#), "unknown field `dryRun`; did you mean `dry_run`?");
        assert_eq!(refused(r#"{"topik":"t"}"#), "unknown field `topik`; did you mean `topic`?");
        assert_eq!(refused(r#"{"x":[{"y":1}]}"#), "unknown field `x`; the fields are `topic`, `dry_run`");
        let both = "unknown field `Topic`; did you mean `topic`? unknown field `dry-run`; did you mean `dry_run`?";
        assert_eq!(refused(r#"{"Topic":"t","dry-run":true}"#), both);
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for body in ["", "[]", "[null,true]", "\"dry_run\"", "{", r#"{"dry_run":"yes"}"#, r#"{"dry_run":true} x"#] {
            assert!(parse_object::<Body>(body.as_bytes()).is_err(), "{body}");
        }
    }
}
