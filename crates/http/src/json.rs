//! JSON as clients wrote it: strict validation of a body, and minifying that preserves key order
//! and the spelling of numbers.

use std::borrow::Cow;

use serde::Deserialize;

use super::{code::Code, decode, problem::Problem};

/// Maximum number of levels of nesting (contracts.md).
pub const MAX_DEPTH: usize = 128;

/// Reasons to refuse a body before it is parsed. The texts continue a sentence that begins with
/// what it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("is empty; it must be JSON")]
    Empty,
    #[error("is not UTF-8 at byte {0}")]
    NotUtf8(usize),
    #[error("has a lone surrogate in the string at byte {0}")]
    LoneSurrogate(usize),
    #[error("has more than {MAX_DEPTH} levels at byte {0}")]
    TooDeep(usize),
}

/// Checks what serde_json does not check in values that it skips: UTF-8, surrogate pairs, depth.
/// serde_json checks the grammar.
pub fn check(body: &[u8]) -> Result<&str, Fault> {
    let text = std::str::from_utf8(body).map_err(|error| Fault::NotUtf8(error.valid_up_to()))?;
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => at = check_string(body, at + 1)?,
            b'{' | b'[' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(Fault::TooDeep(at));
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    if text.trim_ascii().is_empty() { Err(Fault::Empty) } else { Ok(text) }
}

/// Returns the position of the closing quote, or of the end of the body if there is none.
fn check_string(body: &[u8], mut at: usize) -> Result<usize, Fault> {
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => break,
            b'\\' => {
                if body.get(at + 1) == Some(&b'u') {
                    match code_unit(body, at) {
                        Some(0xD800..0xDC00) => match code_unit(body, at + 6) {
                            Some(0xDC00..0xE000) => at += 6,
                            _ => return Err(Fault::LoneSurrogate(at)),
                        },
                        Some(0xDC00..0xE000) => return Err(Fault::LoneSurrogate(at)),
                        _ => {}
                    }
                }
                at += 2;
            }
            _ => at += 1,
        }
    }
    Ok(at)
}

/// Returns the value of the `\uXXXX` at this position, if there is one.
fn code_unit(body: &[u8], at: usize) -> Option<u32> {
    let digits = body.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Name of the value of a record in errors.
const VALUE: &str = "value";

/// Validates and deserializes the value of a record in one step, borrowing from it. Unlike
/// [`decode`](crate::decode), it takes field names only as they are, and warns of nothing.
pub fn parse<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, Problem> {
    let text = check(value).map_err(|fault| refused(&fault, VALUE))?;
    serde_json::from_str(text).map_err(|error| match error.is_data() {
        true => decode::of_value::<T>(text).unwrap_or_else(|| Problem::new(Code::INVALID_REQUEST, error.to_string())),
        false => malformed(&error, VALUE),
    })
}

pub(super) fn refused(fault: &Fault, what: &str) -> Problem {
    Problem::new(Code::INVALID_JSON, format!("the {what} {fault}"))
}

/// Returns the error of a text that is not JSON, which says where.
pub(super) fn malformed(error: &serde_json::Error, what: &str) -> Problem {
    Problem::new(Code::INVALID_JSON, format!("the {what} is not valid JSON: {error}"))
}

/// Like [`parse`], for a value that must be an object: serde also accepts an array for a struct,
/// with its elements as the fields in order.
pub fn parse_object<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, Problem> {
    match value.trim_ascii_start().first() {
        None | Some(b'{') => parse(value),
        Some(_) => {
            let text = check(value).map_err(|fault| refused(&fault, VALUE))?;
            Err(decode::not_an_object(text, VALUE))
        }
    }
}

/// Removes insignificant whitespace from a value, which must be valid JSON.
pub fn minify(value: &str) -> Cow<'_, str> {
    let bytes = value.as_bytes();
    let Some(first) = next_whitespace(bytes, 0) else { return Cow::Borrowed(value) };
    let mut kept = String::with_capacity(value.len());
    let (mut from, mut space) = (0, Some(first));
    while let Some(at) = space {
        kept.push_str(&value[from..at]);
        from = at + 1;
        space = next_whitespace(bytes, from);
    }
    kept.push_str(&value[from..]);
    Cow::Owned(kept)
}

/// Returns the next whitespace outside a string; `at` itself must be outside one.
fn next_whitespace(bytes: &[u8], mut at: usize) -> Option<usize> {
    let mut inside = false;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' if inside => at += 1,
            b'"' => inside = !inside,
            b' ' | b'\n' | b'\t' | b'\r' if !inside => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Appends `text` as a JSON string, quotes included.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut from = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape: Option<&[u8]> = match byte {
            b'"' => Some(b"\\\""),
            b'\\' => Some(b"\\\\"),
            b'\n' => Some(b"\\n"),
            b'\r' => Some(b"\\r"),
            b'\t' => Some(b"\\t"),
            0..0x20 => None,
            _ => continue,
        };
        out.extend_from_slice(&text.as_bytes()[from..at]);
        match escape {
            Some(escape) => out.extend_from_slice(escape),
            None => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
        }
        from = at + 1;
    }
    out.extend_from_slice(&text.as_bytes()[from..]);
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn lone_surrogates_are_refused_and_pairs_are_not() {
        assert!(check(br#"{"a":"\ud83d\ude00 ok \\ud83d"}"#).is_ok());
        for bad in [r#""\ud83d""#, r#""\ude00""#, r#""\ud83d\u0041""#, r#"{"\udfff":1}"#, r#""\uD83Dx""#] {
            assert!(matches!(check(bad.as_bytes()), Err(Fault::LoneSurrogate(_))), "{bad}");
        }
    }

    #[test]
    fn depth_is_counted_outside_strings() {
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(check(nested(MAX_DEPTH).as_bytes()).is_ok());
        assert_eq!(check(nested(MAX_DEPTH + 1).as_bytes()), Err(Fault::TooDeep(MAX_DEPTH)));
        assert!(check(format!("\"{}\"", nested(20_000)).as_bytes()).is_ok());
    }

    #[test]
    fn raw_control_characters_are_refused() {
        for bad in [&b"\"a\0b\""[..], b"\"a\x1fb\"", b"{\"a\0\":1}"] {
            assert_eq!(parse::<Value>(bad).unwrap_err().code, Code::INVALID_JSON);
        }
    }

    #[test]
    fn number_spelling_and_key_order_are_kept() {
        let text = "{ \"b\" : 1.50e+3 ,\n \"a\":[ 1 , 2.0 ], \"s\":\" a \\\" b \" }";
        assert_eq!(minify(text), r#"{"b":1.50e+3,"a":[1,2.0],"s":" a \" b "}"#);
    }

    #[test]
    fn parse_object_accepts_objects_only() {
        #[derive(Debug, Deserialize)]
        struct Pair {
            a: u8,
        }
        assert_eq!(parse_object::<Pair>(b" \n{\"a\":1}").unwrap().a, 1);
        for (body, code) in [
            (&b"[1]"[..], Code::INVALID_REQUEST),
            (b" [1]", Code::INVALID_REQUEST),
            (b"7", Code::INVALID_REQUEST),
            (b"[1", Code::INVALID_JSON),
            (b"", Code::INVALID_JSON),
            (b"{", Code::INVALID_JSON),
        ] {
            assert_eq!(parse_object::<Pair>(body).unwrap_err().code, code, "{body:?}");
        }
    }

    #[test]
    fn the_error_of_a_value_names_the_field_what_was_found_and_what_is_wanted() {
        #[derive(Debug, Deserialize)]
        struct Outer {
            #[serde(rename = "payload")]
            _payload: std::collections::BTreeMap<String, u8>,
        }
        for (value, detail) in [
            (r#"{"payload":{"a":"x"}}"#, r#"`payload.a` must be a whole number from 0 to 255 (got the string "x")"#),
            (r#"{"Payload":{}}"#, "`payload` is missing"),
            (r#"[{}]"#, "the value must be a JSON object (got an array)"),
            (r#"{"payload""#, "the value is not valid JSON: EOF while parsing an object at line 1 column 10"),
            ("", "the value is empty; it must be JSON"),
        ] {
            assert_eq!(parse_object::<Outer>(value.as_bytes()).unwrap_err().detail, detail);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 50, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((".*", inner), 0..6).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn minifying_a_pretty_value_gives_the_compact_one(value in any_json()) {
            let pretty = serde_json::to_string_pretty(&value).unwrap();
            let compact = value.to_string();
            prop_assert_eq!(minify(&pretty), compact.as_str());
            prop_assert_eq!(minify(&compact), compact.as_str());
        }

        #[test]
        fn a_written_string_reads_back(text in ".*") {
            let mut out = Vec::new();
            write_string(&mut out, &text);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }

        #[test]
        fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse::<Value>(&bytes);
        }
    }
}
