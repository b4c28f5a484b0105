//! Every field and every number of the API, with every type that it does not have: each refusal
//! names the field or the parameter.

use serde_json::{Value, json};

use crate::errors::api;

/// JSON values, each with the kind that fields list if they accept it.
const VALUES: [(&str, &str); 9] = [
    ("integer", "5"),
    ("beyond", "1e99"),
    ("negative", "-1"),
    ("fraction", "1.5"),
    ("boolean", "true"),
    ("null", "null"),
    ("string", r#""text""#),
    ("array", "[1]"),
    ("object", r#"{"a":1}"#),
];
/// Values that are only wrong for some fields with numbers.
const NUMBERS: [&str; 2] = ["beyond", "negative"];

/// Fields, each with the kinds of values that it accepts.
type Fields = Vec<(&'static str, &'static str)>;

/// A route, a body that is valid or refused for another field, and the kinds that its fields accept.
fn bodies() -> Vec<(&'static str, Value, Fields)> {
    let message = json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "x"});
    let follow = json!({"follower_id": "a", "followee_id": "b"});
    let letters = json!({
        "topic": "none", "key": "k", "error": "e", "since": "1h", "limit": 5, "ids": ["a"], "all": false, "dry_run": true,
        "letters": "events",
    });
    let text = "string null";
    let selection = vec![
        ("topic", text),
        ("key", text),
        ("error", text),
        ("since", text),
        ("letters", text),
        ("limit", "integer null"),
        ("ids", "array"),
        ("all", "boolean"),
        ("dry_run", "boolean"),
    ];
    let strings = |fields: &[&'static str]| fields.iter().map(|field| (*field, "string")).collect::<Fields>();
    vec![
        (
            "/push",
            json!({"key": "k", "value": 1, "ttl_seconds": 5}),
            vec![("key", "string"), ("ttl_seconds", "integer null")],
        ),
        (
            "/produce",
            json!({
                "topic": "missing", "key": "k", "payload": 1, "headers": {"a": "b"}, "partition": 0,
                "timestamp": "2026-01-01T00:00:00Z",
            }),
            vec![
                ("topic", text),
                ("key", text),
                ("headers", "object null"),
                ("partition", "integer null negative"),
                ("timestamp", "integer string null"),
            ],
        ),
        (
            "/produce",
            json!({"topic": "missing", "key_base64": "aw==", "payload_base64": "aw=="}),
            vec![("key_base64", text), ("payload_base64", text)],
        ),
        ("/produce", json!({"records": [{"topic": "missing", "payload": 1}]}), vec![("records", "array null")]),
        (
            "/api/v1/comments",
            json!({"text": "a", "author_id": "a", "post_id": 1}),
            vec![("text", "string"), ("author_id", "string integer null"), ("post_id", "string integer null")],
        ),
        ("/api/v1/message/action", message, strings(&["chatId", "senderId", "receiverId", "content"])),
        ("/api/v1/messages/ack", json!({"receiverId": "r", "ack": "0"}), strings(&["receiverId", "ack"])),
        ("/posts", json!({"author_id": "a", "content": "c"}), strings(&["author_id", "content"])),
        ("/follow", follow.clone(), strings(&["follower_id", "followee_id"])),
        ("/unfollow", follow, strings(&["follower_id", "followee_id"])),
        (
            "/admin/dlq/purge",
            json!({"key_base64": "aw==", "dry_run": true}),
            vec![("key_base64", text), ("dry_run", "boolean")],
        ),
        ("/admin/dlq/purge", letters.clone(), selection.clone()),
        ("/admin/dlq/replay", letters, selection),
    ]
}

/// Returns the body with another value for the field, which may be a number that JSON types of Rust
/// cannot hold.
fn with(body: &Value, field: &str, value: &str) -> String {
    let fields = body.as_object().unwrap().iter().map(|(name, own)| {
        let own = own.to_string();
        format!("{}:{}", json!(name), if name == field { value } else { &own })
    });
    format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
}

#[tokio::test]
async fn every_field_of_every_body_refuses_every_other_type_and_is_named() {
    let (_world, app) = api().await;
    let mut tried = 0;
    for (path, body, fields) in bodies() {
        for (field, accepted) in fields {
            let accepts = |kind: &str| accepted.split(' ').any(|one| one == kind);
            for (kind, value) in VALUES {
                if accepts(kind) || (NUMBERS.contains(&kind) && !accepts("integer")) {
                    continue;
                }
                tried += 1;
                let answer = app.post(path, with(&body, field, value)).await;
                let problem = answer.json();
                let error = &problem["errors"][0];
                let (pointer, detail) = (error["pointer"].as_str(), error["detail"].as_str().unwrap_or_default());
                let is_named = pointer == Some(&*format!("#/{field}")) && detail.starts_with(&format!("`{field}"));
                let is_clear = detail.contains(" must ") || detail.ends_with("is required");
                assert!(
                    matches!(answer.status, 400 | 422) && is_named && is_clear,
                    "{path}, {field} = {value}: {} {problem}",
                    answer.status
                );
            }
        }
    }
    assert!(tried > 200, "{tried}");
    app.stop().await;
}

#[tokio::test]
async fn every_number_in_a_query_refuses_other_text_and_is_named() {
    let (_world, app) = api().await;
    let (texts, beyond) = (["x", "1.5", "", "0x10", "1e2", "%20", "1%002", "true"], ["-1", "99999999999999999999"]);
    // Out of range, the limit of a feed falls back to its default, and a negative offset counts as 0.
    for (path, parameter, has_range) in [
        ("/api/v1/comments", "limit", true),
        ("/api/v1/messages?receiverId=r", "limit", true),
        ("/users/u/followers", "limit", true),
        ("/users/u/following", "limit", true),
        ("/admin/dlq", "limit", true),
        ("/feeds/u", "limit", false),
        ("/feeds/u", "offset", false),
    ] {
        for value in texts.iter().chain(if has_range { &beyond[..] } else { &[] }) {
            let separator = if path.contains('?') { '&' } else { '?' };
            let answer = app.get(&format!("{path}{separator}{parameter}={value}")).await;
            let problem = answer.json();
            assert!(
                matches!(answer.status, 400 | 422) && problem["errors"][0]["parameter"] == parameter,
                "{path}, {parameter}={value}: {} {problem}",
                answer.status
            );
        }
    }
    app.stop().await;
}
