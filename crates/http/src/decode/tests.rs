use std::{borrow::Cow, collections::BTreeMap};

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::*;
use crate::Bounded;

#[derive(Debug, Deserialize)]
struct Push<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow)]
    value: &'a RawValue,
    ttl_seconds: Option<Bounded<1, 100>>,
    #[serde(borrow)]
    headers: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    #[serde(default)]
    ids: Vec<u16>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
struct Choice {
    topic: Option<String>,
    dry_run: bool,
}

fn push(body: &str) -> Push<'_> {
    object(body.as_bytes()).unwrap()
}

fn refused(body: &str) -> (u16, String, Value) {
    let problem = object::<Push<'_>>(body.as_bytes()).unwrap_err();
    let pointer = problem.extensions.get("errors").map_or(Value::Null, |errors| errors[0]["pointer"].clone());
    (problem.code.status.as_u16(), problem.detail, pointer)
}

fn warnings() -> Vec<String> {
    warning::take().iter().map(ToString::to_string).collect()
}

#[test]
fn an_error_has_a_pointer_what_was_found_and_what_is_wanted() {
    for (body, status, detail, pointer) in [
        (r#"{"value":1}"#, 400, "`key` is missing", json!("#/key")),
        (r#"{"key":"k"}"#, 400, "`value` is missing", json!("#/value")),
        (r#"{"key":5,"value":1}"#, 400, "`key` must be a string (got 5)", json!("#/key")),
        (r#"{"key":null,"value":1}"#, 400, "`key` must be a string (got null)", json!("#/key")),
        (r#"{"key":"k","value":1,"key":"l"}"#, 400, "`key` must be given only once", json!("#/key")),
        (
            r#"{"key":"k","value":1,"ttl_seconds":"5"}"#,
            400,
            r#"`ttl_seconds` must be a whole number from 1 to 100 (got the string "5")"#,
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"ttl_seconds":0}"#,
            422,
            "`ttl_seconds` must be a whole number from 1 to 100 (got 0)",
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"ttl_seconds":-7}"#,
            422,
            "`ttl_seconds` must be a whole number from 1 to 100 (got -7)",
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"ttl_seconds":99999999999999999999}"#,
            422,
            "`ttl_seconds` must be a whole number from 1 to 100 (got 99999999999999999999)",
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"ttl_seconds":1e999}"#,
            400,
            "`ttl_seconds` must be a whole number from 1 to 100 (got 1e999)",
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"ttl_seconds":[1]}"#,
            400,
            "`ttl_seconds` must be a whole number from 1 to 100 (got an array)",
            json!("#/ttl_seconds"),
        ),
        (
            r#"{"key":"k","value":1,"headers":{"a":"b","c/d":{}}}"#,
            400,
            "`headers.c/d` must be a string (got an object)",
            json!("#/headers/c~1d"),
        ),
        (
            r#"{"key":"k","value":1,"headers":[]}"#,
            400,
            "`headers` must be an object (got an array)",
            json!("#/headers"),
        ),
        (
            r#"{"key":"k","value":1,"ids":[1,70000]}"#,
            422,
            "`ids[1]` must be a whole number from 0 to 65535 (got 70000)",
            json!("#/ids/1"),
        ),
        (r#"{"key":"k","value":1,"ids":true}"#, 400, "`ids` must be an array (got true)", json!("#/ids")),
        ("[1]", 400, "the body must be a JSON object (got an array)", json!("#")),
        (" 7 ", 400, "the body must be a JSON object (got 7)", json!("#")),
        (r#""a""#, 400, r#"the body must be a JSON object (got the string "a")"#, json!("#")),
        ("", 400, "the body is empty; it must be JSON", json!(null)),
        (
            "hello",
            400,
            "the body must be a JSON object (got `hello`); it is not valid JSON: expected value at line 1 column 1",
            json!(null),
        ),
        (
            r#"{"key":"k","value":1,}"#,
            400,
            "the body is not valid JSON: trailing comma at line 1 column 22",
            json!(null),
        ),
        (r#"{"key":5,"value":}"#, 400, "the body is not valid JSON: expected value at line 1 column 18", json!(null)),
        (
            r#"{"key":"k","value":1} x"#,
            400,
            "the body is not valid JSON: trailing characters at line 1 column 23",
            json!(null),
        ),
    ] {
        assert_eq!(refused(body), (status, detail.to_owned(), pointer), "{body}");
    }
    warnings();
}

#[test]
fn no_error_has_a_name_of_a_type_or_a_column_unless_the_syntax_is_wrong() {
    let values = ["null", "true", "5", "-5", "5.5", r#""x""#, "[]", "{}", "[[1]]", r#"{"a":1}"#, "1e400"];
    for field in ["key", "ttl_seconds", "headers", "ids"] {
        for value in values {
            let body = format!(r#"{{"value":1,"{}":"k","{field}":{value}}}"#, if field == "key" { "x" } else { "key" });
            let Err(problem) = object::<Push<'_>>(body.as_bytes()) else { continue };
            assert!(problem.detail.starts_with(&format!("`{field}")), "{body}: {}", problem.detail);
            for word in ["line", "column", "struct", "u64", "u16", "Push", "Cow", "expected"] {
                assert!(!problem.detail.contains(word), "{body}: {}", problem.detail);
            }
        }
    }
    warnings();
}

#[test]
fn field_names_differ_in_case_and_an_exact_one_wins() {
    let pushed = push(r#"{"Key":"k","VALUE": { "a" : 1 },"Ttl_Seconds":5}"#);
    assert_eq!((&*pushed.key, pushed.value.get()), ("k", r#"{ "a" : 1 }"#));
    assert_eq!(pushed.ttl_seconds.unwrap().get(), 5);
    assert_eq!(push(r#"{"key":"k","value":1,"TTL_SECONDS":5}"#).ttl_seconds.unwrap().get(), 5);
    assert_eq!(push(r#"{"Key":"other","key":"k","KEY":"other","value":1}"#).key, "k");
    assert_eq!(push(r#"{"Key":"first","KEY":"last","value":1}"#).key, "last");
    let (status, detail, pointer) = refused(r#"{"key":"k","value":1,"TTL_Seconds":"5"}"#);
    assert_eq!((status, pointer), (400, json!("#/TTL_Seconds")));
    assert!(detail.starts_with("`TTL_Seconds` must be"), "{detail}");
    assert!(push(r#"{"k\u0065y":"a","value":1}"#).key == "a");
    let pushed = push(r#"{"KEY":"k","value":null,"headers":{"A":"b"},"ids":[1,2]}"#);
    assert_eq!((pushed.headers.unwrap().len(), pushed.ids), (1, vec![1, 2]));
    warnings();
}

#[test]
fn a_near_miss_is_warned_of_once_and_other_unknown_fields_are_not() {
    push(r#"{"key":"k","value":1}"#);
    assert_eq!(warnings(), [""; 0]);
    push(r#"{"key":"k","value":1,"tags":[1],"keys":2}"#);
    assert_eq!(warnings(), [""; 0], "`key` is there, so `keys` is another field");
    push(r#"{"key":"k","value":1,"ttlSeconds":5}"#);
    assert_eq!(warnings(), ["unknown field `ttlSeconds`; did you mean `ttl_seconds`?"]);
    let record = decode::<Push<'_>>(br#"{"key":"k","value":1,"ttlSeconds":5}"#, "value").ok().unwrap();
    assert_eq!((record.near_misses.len(), warnings().len()), (1, 0), "a record is part of no request");
    refused(r#"{"key":"k","valeu":1}"#);
    assert_eq!(warnings(), ["unknown field `valeu`; did you mean `value`?"]);
}

#[test]
fn a_text_is_respelt_only_if_a_name_differs() {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Message<'a> {
        #[serde(borrow)]
        receiver_id: Cow<'a, str>,
    }
    let text = |body: &'static str| {
        let (message, text) = object_with_text::<Message<'_>>(body.as_bytes()).unwrap();
        assert_eq!(message.receiver_id, "r");
        text
    };
    let plain = r#"{ "receiverId":"r", "sender":2 }"#;
    assert!(matches!(text(plain), Cow::Borrowed(same) if same == plain));
    for twice in [r#"{"receiverId":"r","ReceiverId":2}"#, r#"{"RECEIVERID":"x","receiverId":"r"}"#] {
        let problem = object_with_text::<Message<'_>>(twice.as_bytes()).err().unwrap();
        assert_eq!(problem.detail, "`receiverId` is given twice, in different spellings");
    }
    assert_eq!(text(r#"{ "More\n" : [1, 2.50], "RECEIVERID":"r" }"#), r#"{"More\n":[1, 2.50],"receiverId":"r"}"#);
    warnings();
}

#[test]
fn a_strict_struct_refuses_unknown_fields_and_names_the_ones_that_are_meant() {
    let parse = |body: &str| object::<Choice>(body.as_bytes()).map_err(|problem| problem.detail);
    assert_eq!(parse("{}"), Ok(Choice::default()));
    let full = Choice { topic: Some("t".to_owned()), dry_run: true };
    assert_eq!(parse(r#"{"topic":"t","DRY_RUN":true}"#), Ok(full), "case does not matter");
    for (body, detail) in [
        (r#"{"topic":"t","dryRun":true}"#, "unknown field `dryRun`; did you mean `dry_run`?"),
        (r#"{"topik":"t"}"#, "unknown field `topik`; did you mean `topic`?"),
        (r#"{"x":[{"y":1}]}"#, "unknown field `x`; the fields are `topic`, `dry_run`"),
        (
            r#"{"topik":"t","dry-run":true}"#,
            "unknown field `topik`; did you mean `topic`? unknown field `dry-run`; did you mean `dry_run`?",
        ),
        (r#"{"topic":"t","Topic":"u"}"#, "unknown field `Topic`; did you mean `topic`?"),
    ] {
        assert_eq!(parse(body), Err(detail.to_owned()));
    }
    let problem = object::<Choice>(br#"{"topik":"t","dry-run":true}"#).unwrap_err();
    assert_eq!(problem.extensions["errors"][1]["pointer"], "#/dry-run");
    for body in ["", "[]", "[null,true]", "\"dry_run\"", "{", r#"{"dry_run":"yes"}"#, r#"{"dry_run":true} x"#] {
        assert!(parse(body).is_err(), "{body}");
    }
}

#[test]
fn many_unknown_fields_are_looked_at_in_no_more_than_linear_time() {
    let fields: String = (0..100_000).map(|number| format!("\"ttl_second{number}\":1,")).collect();
    push(&format!(r#"{{{fields}"key":"k","value":1}}"#));
    assert_eq!(warnings().len(), 3);
    push(&format!(r#"{{"{}":1,"key":"k","value":1}}"#, "t".repeat(1 << 20)));
    assert_eq!(warnings(), [""; 0]);
}

#[test]
fn only_some_of_many_fields_are_kept_and_the_known_ones_are_found() {
    let many = format!(r#"{{{}"Key":"first",{0}"KEY":"last","value":1}}"#, r#""":0,"key_":0,"#.repeat(1_000));
    let known = fields::<Push<'_>>();
    let object = object::Object::parse(&many, known).unwrap();
    assert!(object.entries.len() < 40, "{}", object.entries.len());
    assert_eq!(push(&many).key, "last");
    let twice = format!(r#"{{"key":"k","value":1{}}}"#, r#","key":"l""#.repeat(1_000));
    assert_eq!(object::Object::parse(&twice, known).unwrap().entries.len(), 3);
    assert_eq!(refused(&twice).1, "`key` must be given only once");
    let spellings = format!(r#"{{{}"kEy":"last","value":1}}"#, r#""KEY":"k","#.repeat(1_000));
    assert!(object::Object::parse(&spellings, known).unwrap().entries.len() < 40);
    assert_eq!(push(&spellings).key, "last");
    warnings();
}

#[test]
fn a_map_keeps_every_field() {
    let fields: String = (0..100).map(|number| format!("\"f{number}\":1,")).collect();
    let problem = object::<BTreeMap<String, u16>>(format!(r#"{{{fields}"last":""}}"#).as_bytes()).unwrap_err();
    assert_eq!(problem.extensions["errors"][0]["pointer"], "#/last");
}

#[test]
fn an_ignored_value_is_not_taken_apart() {
    struct Count<'c>(&'c mut usize);
    impl<'de> Visitor<'de> for Count<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("nothing")
        }

        fn visit_unit<E>(self) -> Result<(), E> {
            *self.0 += 1;
            Ok(())
        }
    }
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let value = serde_json::from_str::<&RawValue>(&deep).unwrap();
    let mut visits = 0;
    located::Located(value).deserialize_ignored_any(Count(&mut visits)).unwrap();
    let fields = format!(r#"{{"a":{deep}}}"#);
    object::Object::parse(&fields, &["b"]).unwrap().deserialize_ignored_any(Count(&mut visits)).unwrap();
    assert_eq!(visits, 2);
}

#[test]
fn an_error_has_no_long_name() {
    let name = "\u{7f}".repeat(1 << 20);
    for body in [format!(r#"{{"{name}":1}}"#), format!(r#"{{"topic":{{"{name}":1}}}}"#)] {
        let problem = object::<Choice>(body.as_bytes()).unwrap_err();
        assert!(problem.to_json(None).to_string().len() < 2_000, "{}", problem.detail);
    }
    let (_, detail, pointer) = refused(&format!(r#"{{"key":"k","value":1,"headers":{{"{name}":1}}}}"#));
    assert!(detail.len() < 500 && pointer.to_string().len() < 500, "{detail}");
}
