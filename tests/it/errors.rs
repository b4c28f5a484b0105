//! Refusals of malformed requests, on every route: each names what is wrong.

use reqwest::{Method, redirect::Policy};
use serde_json::{Value, json};

use crate::{
    gateway::gateway,
    harness::{App, World},
};

/// Names that no error may have: they belong to Rust.
const INTERNAL: [&str; 10] = ["line ", "column", "struct", "u64", "u16", "i64", "usize", "Cow", "Option", "expected"];

pub async fn api() -> (World, App) {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_GATEWAY__SIMULATOR__ENABLED", "true").start().await;
    (world, app)
}

/// Checks that an answer is the problem that names this place, and that its detail begins so.
fn names(problem: &Value, kind: &str, place: &str, detail: &str) {
    let error = &problem["errors"][0];
    assert_eq!(error[kind], place, "{problem}");
    let detailed = error["detail"].as_str().unwrap();
    assert!(detailed.starts_with(detail), "{detailed} is not {detail}");
    for word in INTERNAL {
        assert!(!problem["detail"].as_str().unwrap().contains(word), "`{word}` in {problem}");
    }
}

#[tokio::test]
async fn an_error_in_a_body_points_to_the_field() {
    let (_world, app) = api().await;
    let long = "x".repeat(256);
    let message = |field: &str, value: &str| {
        let mut fields = json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "x"});
        fields[field] = serde_json::from_str(value).unwrap();
        fields.to_string()
    };
    let (messages, comments) = ("/api/v1/message/action", "/api/v1/comments");
    let cases: Vec<(&str, String, u16, &str, &str)> = vec![
        ("/push", "{}".into(), 400, "#/key", "`key` is missing"),
        ("/push", r#"{"key":"k"}"#.into(), 400, "#/value", "`value` is missing"),
        ("/push", r#"{"key":5,"value":1}"#.into(), 400, "#/key", "`key` must be a string (got 5)"),
        ("/push", r#"{"key":"","value":1}"#.into(), 400, "#/key", "`key` must not be empty"),
        ("/push", r#"{"key":"k","value":1,"key":"l"}"#.into(), 400, "#/key", "`key` must be given only once"),
        (
            "/push",
            r#"{"key":"k","value":1,"ttl_seconds":"5"}"#.into(),
            400,
            "#/ttl_seconds",
            r#"`ttl_seconds` must be a whole number from 1 to 315360000 (got the string "5")"#,
        ),
        (
            "/push",
            r#"{"key":"k","value":1,"ttl_seconds":0}"#.into(),
            422,
            "#/ttl_seconds",
            "`ttl_seconds` must be a whole number from 1 to 315360000 (got 0)",
        ),
        (
            "/push",
            r#"{"key":"k","value":1,"ttl_seconds":-1}"#.into(),
            422,
            "#/ttl_seconds",
            "`ttl_seconds` must be a whole number from 1 to 315360000 (got -1)",
        ),
        (
            "/push",
            r#"{"key":"k","value":1,"TTL_seconds":1.5}"#.into(),
            400,
            "#/TTL_seconds",
            "`TTL_seconds` must be a whole number from 1 to 315360000 (got 1.5)",
        ),
        ("/produce", "{}".into(), 400, "#/topic", "`topic` is required"),
        ("/produce", r#"{"topic":"t"}"#.into(), 400, "#/payload", "`payload` or `payload_base64` is required"),
        (
            "/produce",
            r#"{"topic":["t"],"payload":1}"#.into(),
            400,
            "#/topic",
            "`topic` must be a string (got an array)",
        ),
        ("/produce", r#"{"topic":"a b","payload":1}"#.into(), 400, "#/topic", "`topic` may contain only"),
        (
            "/produce",
            r#"{"topic":"t","payload":1,"partition":3000000000}"#.into(),
            400,
            "#/partition",
            "`partition` must be a whole number from -2147483648 to 2147483647 (got 3000000000)",
        ),
        (
            "/produce",
            r#"{"topic":"t","payload":1,"headers":{"a/b":1}}"#.into(),
            400,
            "#/headers/a~1b",
            "`headers.a/b` must be a string (got 1)",
        ),
        (
            "/produce",
            r#"{"topic":"t","payload":1,"timestamp":true}"#.into(),
            400,
            "#/timestamp",
            "`timestamp` must be a whole number of milliseconds since 1970, or an RFC 3339 time (got true)",
        ),
        ("/produce", r#"{"records":{}}"#.into(), 400, "#/records", "`records` must be an array (got an object)"),
        (comments, r#"{"text":7}"#.into(), 400, "#/text", "`text` must be a string (got 7)"),
        (comments, "{}".into(), 400, "#/text", "`text` must not be missing, empty or blank"),
        (
            comments,
            r#"{"text":"a","post_id":-1}"#.into(),
            400,
            "#/post_id",
            "`post_id` must be a string or a whole number from 0 to 2^53 - 1 (got -1)",
        ),
        (comments, json!({"text": "a", "author_id": long}).to_string(), 422, "#/author_id", "`author_id` must have at"),
        (messages, message("receiverId", "7"), 400, "#/receiverId", "`receiverId` must be a string (got 7)"),
        (messages, message("chatId", r#""""#), 400, "#/chatId", "`chatId` is missing or empty"),
        (messages, message("content", "null"), 400, "#/content", "`content` must be a string (got null)"),
        ("/api/v1/messages/ack", r#"{"receiverId":"r"}"#.into(), 400, "#/ack", "`ack` is missing"),
        (
            "/api/v1/messages/ack",
            r#"{"receiverId":"r","ack":"?"}"#.into(),
            400,
            "#/ack",
            "`ack` must be the `id` of a message or the `nextCursor` of a page (got `?`)",
        ),
        (
            "/produce",
            r#"{"topic":"t","payload":1,"timestamp":"noon"}"#.into(),
            400,
            "#/timestamp",
            "`timestamp` must be milliseconds or an RFC 3339 time such as 2026-01-31T12:00:00Z, not before 1970 (got `noon`)",
        ),
        (
            "/produce",
            r#"{"topic":"t","payload":1,"headers":{"ce_id":"x"}}"#.into(),
            400,
            "#/headers/ce_id",
            "`headers` must not have `ce_id`",
        ),
        ("/posts", r#"{"content":"c"}"#.into(), 400, "#/author_id", "`author_id` must not be missing or empty"),
        ("/posts", r#"{"author_id":"a","content":[]}"#.into(), 400, "#/content", "`content` must be a string (got an"),
        ("/follow", r#"{"follower_id":"a","followee_id":"a"}"#.into(), 400, "#/followee_id", "`follower_id` and"),
        (
            "/unfollow",
            r#"{"follower_id":"a","followeeId":"b"}"#.into(),
            400,
            "#/followeeId",
            "unknown field `followeeId`",
        ),
        (
            "/admin/dlq/purge",
            r#"{"all":"yes"}"#.into(),
            400,
            "#/all",
            "`all` must be `true` or `false` (got the string",
        ),
        ("/admin/dlq/purge", r#"{"ids":["a",1]}"#.into(), 400, "#/ids/1", "`ids[1]` must be a string (got 1)"),
        (
            "/admin/dlq/replay",
            r#"{"limit":10001,"all":true}"#.into(),
            422,
            "#/limit",
            "`limit` must be a whole number from 1",
        ),
        (
            "/admin/dlq/replay",
            r#"{"letters":"all","all":true}"#.into(),
            400,
            "#/letters",
            "`letters` must be `events` or `deliveries` (got the string \"all\")",
        ),
        ("/admin/dlq/replay", r#"{"since":"soon"}"#.into(), 422, "#/since", "`since` must be a time such as"),
    ];
    for (path, body, status, pointer, detail) in cases {
        let code = if status == 422 { "invalid_field" } else { "invalid_request" };
        let headers = [("content-type", "application/json")];
        let problem = app.request(Method::POST, path, &headers, body).await.problem(status, code);
        names(&problem, "pointer", pointer, detail);
    }
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let problem = app.request(Method::POST, comments, &form, "text=a&text=b").await.problem(400, "invalid_request");
    names(&problem, "pointer", "#/text", "`text` must be given only once");
    let description = app.get("/openapi.json").await.expect(200).json();
    let described = &description["components"]["schemas"]["ProblemItem"]["properties"]["pointer"];
    assert_eq!(described["type"], "string", "the description has the member");
    // What is not JSON has no pointer, but a place.
    for path in ["/push", "/produce", comments, messages, "/posts", "/follow", "/api/v1/messages/ack"] {
        let problem = app.post(path, "{\n \"key\": }").await.problem(400, "invalid_json");
        assert_eq!(
            (&problem["detail"], &problem["errors"]),
            (&json!("the body is not valid JSON: expected value at line 2 column 9"), &Value::Null)
        );
        let problem = app.post(path, "[1]").await.problem(400, "invalid_request");
        names(&problem, "pointer", "#", "the body must be a JSON object (got an array)");
        let problem = app.post(path, "hello").await.problem(400, "invalid_json");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.starts_with("the body must be a JSON object (got `hello`); it is not valid JSON"), "{detail}");
        let problem = app.post(path, "").await.problem(400, "invalid_json");
        assert_eq!(problem["detail"], "the body is empty; it must be JSON", "{path}");
    }
    app.stop().await;
}

#[tokio::test]
async fn an_error_in_a_query_a_path_or_a_header_names_the_one_that_is_wrong() {
    let (_world, app) = api().await;
    let long = "x".repeat(256);
    let limit = "`limit` must be a whole number from 1 to 100 (got `";
    let cases: Vec<(&str, String, u16, &str, &str)> = vec![
        ("GET", "/api/v1/comments?limit=0".into(), 422, "limit", limit),
        ("GET", "/api/v1/comments?limit=101&cursor=x".into(), 422, "limit", limit),
        ("GET", "/api/v1/comments?limit=99999999999999999999".into(), 422, "limit", limit),
        ("GET", "/api/v1/comments?limit=ten".into(), 400, "limit", limit),
        ("GET", "/api/v1/comments?limit=1&cursor=x".into(), 400, "cursor", "`cursor` must be the"),
        (
            "GET",
            "/api/v1/comments?limit=1&cursor=%".into(),
            400,
            "cursor",
            "`cursor` has the broken percent-encoding `%`",
        ),
        (
            "GET",
            "/pull/100%".into(),
            400,
            "key",
            "`key` has the broken percent-encoding `%`; write a `%` itself as `%25`",
        ),
        ("DELETE", "/pull/a%2".into(), 400, "key", "`key` has the broken percent-encoding `%2`"),
        ("GET", "/users/a%zzb/following".into(), 400, "user_id", "`user_id` has the broken percent-encoding `%zz`"),
        ("GET", "/feeds/u%?limit=1".into(), 400, "user_id", "`user_id` has the broken percent-encoding `%`"),
        ("GET", "/api/v1/messages?receiverId=%".into(), 400, "receiverId", "`receiverId` has the broken"),
        ("GET", "/api/v1/comments?limit=1&limit=2".into(), 400, "limit", "`limit` must be given only once"),
        ("GET", "/api/v1/comments?post_id=%00".into(), 400, "post_id", "`post_id` must not contain a null"),
        ("GET", "/api/v1/comments/stream?after=x".into(), 400, "after", "`after` must be the `id` of an event"),
        ("GET", "/api/v1/messages?receiverId=r&limit=0".into(), 422, "limit", limit),
        ("GET", "/api/v1/messages?receiverId=r&limit=x".into(), 400, "limit", limit),
        ("GET", "/api/v1/messages?receiverId=r&after=x".into(), 400, "after", "`after` must be the `id` of a message"),
        ("GET", "/api/v1/messages?receiverId=r&cursor=x".into(), 400, "cursor", "`cursor` must be the `id` of a"),
        ("GET", "/api/v1/messages?receiverId=r&cursor=0&after=0".into(), 400, "cursor", "`cursor` is another name"),
        ("GET", format!("/api/v1/messages?receiverId={long}"), 422, "receiverId", "`receiverId` must have at most 255"),
        ("GET", "/api/v1/messages".into(), 400, "receiverId", "`receiverId` is missing: send the header `ReceiverId`"),
        ("GET", "/api/v1/messages/unread".into(), 400, "receiverId", "`receiverId` is missing"),
        ("GET", "/api/v1/messages/stream?after=0".into(), 400, "receiverId", "`receiverId` is missing"),
        ("GET", "/api/v1/messages/stream?receiverId=r&after=x".into(), 400, "after", "`after` must be the `id`"),
        ("GET", "/api/v1/websocket/message".into(), 400, "receiverId", "`receiverId` is missing"),
        (
            "GET",
            "/api/v1/messages/unread?receiverId=a&receiverId=".into(),
            400,
            "receiverId",
            "`receiverId` is missing",
        ),
        ("GET", format!("/api/v1/presence/{long}"), 422, "id", "`id` must have at most 255 bytes"),
        ("GET", "/api/v1/presence/%ff".into(), 400, "id", "`id` must be UTF-8"),
        ("GET", "/feeds/u?limit=ten".into(), 400, "limit", "`limit` must be a whole number (got `ten`)"),
        ("GET", "/feeds/u?offset=10001".into(), 422, "offset", "`offset` must be at most 10000"),
        (
            "GET",
            "/feeds/u?cursor=x&limit=5".into(),
            400,
            "cursor",
            "`cursor` must be the `next_cursor` of a page (got `x`)",
        ),
        ("GET", "/feeds/u?expand=authors".into(), 400, "expand", "`expand` must be `posts`"),
        ("GET", format!("/feeds/{long}"), 422, "user_id", "`user_id` must have at most 255 bytes"),
        ("GET", "/users/u/followers?limit=0".into(), 422, "limit", limit),
        ("GET", "/users/u/following?limit=101".into(), 422, "limit", limit),
        ("GET", "/users/u/following?cursor=%25".into(), 400, "cursor", "`cursor` must be the `next_cursor`"),
        ("GET", "/posts/abc".into(), 400, "id", "`id` must be a whole number (got `abc`)"),
        ("GET", "/pull/%ff".into(), 400, "key", "`key` must be UTF-8"),
        ("GET", "/admin/dlq?limit=1001".into(), 422, "limit", "`limit` must be a whole number from 1 to 1000"),
        (
            "GET",
            "/admin/dlq?letters=all".into(),
            400,
            "letters",
            "`letters` must be `events` or `deliveries` (got `all`)",
        ),
        ("GET", "/admin/dlq?since=soon".into(), 422, "since", "`since` must be a time such as"),
        ("GET", "/admin/dlq?topik=t".into(), 400, "topik", "unknown parameter `topik`; did you mean `topic`?"),
        ("POST", "/produce?topic=a%20b".into(), 400, "topic", "`topic` may contain only"),
        ("POST", "/webhook-simulator?rate_500=101".into(), 422, "rate_500", "`rate_500` must be from 0 to 100"),
        ("POST", "/webhook-simulator?rate_400=x".into(), 400, "rate_400", "`rate_400` must be a number (got `x`)"),
        ("POST", "/webhook-simulator?max_delay_ms=60001".into(), 422, "max_delay_ms", "`max_delay_ms` must be a whole"),
    ];
    for (method, path, status, parameter, detail) in cases {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let code = if status == 422 { "invalid_field" } else { "invalid_request" };
        let headers = [("content-type", "application/json")];
        let problem = app.request(method, &path, &headers, r#"{"payload":1}"#).await.problem(status, code);
        names(&problem, "parameter", parameter, detail);
        if detail.starts_with("`receiverId` is missing") && !path.contains("unread?") {
            assert_eq!(problem["detail"], "Missing data", "clients know the detail");
        }
    }
    for (path, name, value, detail) in [
        ("/api/v1/comments/stream?after=0.0-0-0", "Last-Event-ID", "x", "`Last-Event-ID` must be the `id` of an"),
        ("/api/v1/messages/stream?receiverId=r", "Last-Event-ID", "x", "`Last-Event-ID` must be the `id` of a message"),
        ("/pull/k", "Postrider-After", "x", "`Postrider-After` must be a position such as `messages/3@1234` (got `x`)"),
    ] {
        let answer = app.request(Method::GET, path, &[(name, value)], "").await;
        names(&answer.problem(400, "invalid_request"), "header", name, detail);
    }
    let answer = app.request(Method::GET, "/api/v1/messages", &[("receiverid", &*long)], "").await;
    names(&answer.problem(422, "invalid_field"), "header", "ReceiverId", "`receiverId` must have at most 255 bytes");
    let answer = app.post_with("/push", &[("idempotency-key", "")], &json!({"key": "k", "value": 1})).await;
    names(&answer.problem(400, "invalid_request"), "header", "Idempotency-Key", "`Idempotency-Key` must have 1 to 255");
    for (method, path, name) in [
        (Method::POST, "/push", "Idempotency-Key"),
        (Method::POST, "/produce", "Idempotency-Key"),
        (Method::POST, "/api/v1/comments", "Idempotency-Key"),
        (Method::DELETE, "/pull/k", "Idempotency-Key"),
        (Method::GET, "/pull/k", "Postrider-After"),
        (Method::GET, "/api/v1/messages", "ReceiverId"),
        (Method::GET, "/api/v1/messages/unread", "ReceiverId"),
        (Method::GET, "/api/v1/messages/stream?receiverId=r", "Last-Event-ID"),
        (Method::GET, "/api/v1/comments/stream", "Last-Event-ID"),
    ] {
        let body = r#"{"topic":"t","payload":1,"key":"k","value":1,"text":"x"}"#;
        let body = if method == Method::POST { body } else { "" };
        let headers = [("content-type", "application/json"), (name, "0.1.2"), (name, "0.1.2")];
        let problem = app.request(method, path, &headers, body).await.problem(400, "invalid_request");
        names(&problem, "header", name, &format!("`{name}` must be given only once"));
    }
    let problem = app.get("/no/route/%").await.problem(400, "invalid_request");
    assert!(problem["detail"].as_str().unwrap().starts_with("the path has the broken percent-encoding"), "{problem}");
    // The range of this limit is an older contract: out of it, the default applies. Without
    // Postgres, the feed cannot be read.
    for limit in ["0", "-1", "101", "99999999999999999999"] {
        app.get(&format!("/feeds/u?limit={limit}")).await.problem(503, "postgres_unavailable");
    }
    app.stop().await;
}

#[tokio::test]
async fn records_of_a_batch_and_of_a_stream_have_errors_and_warnings_of_their_own() {
    let (_world, app, topic) = gateway().await;
    let records = json!([{"payload": 1}, {"payload": 1, "partition": "0"}, {"payload": 1, "Key": "k", "header": {}}]);
    let batch = json!({"topic": topic, "records": records});
    let results = app.post_json("/produce", &batch).await.expect(207).json()["results"].clone();
    assert_eq!(results[0].get("errors").or(results[0].get("warnings")), None, "{results}");
    let error = &results[1]["errors"][0];
    assert_eq!(error["pointer"], "#/records/1/partition", "{results}");
    assert!(error["detail"].as_str().unwrap().ends_with("(got the string \"0\")"), "{results}");
    assert_eq!(results[2]["warnings"], json!(["unknown field `header`; did you mean `headers`?"]));
    let wrong = app.post_json("/produce", &json!({"topic": topic, "records": [[1]]})).await.expect(207).json();
    let error = &wrong["results"][0]["errors"][0];
    assert_eq!(
        (&error["pointer"], &error["detail"]),
        (&json!("#/records/0"), &json!("the record must be a JSON object (got an array)"))
    );
    let lines = records.as_array().unwrap().iter().map(|record| format!("{record}\n")).collect::<String>();
    let headers = [("content-type", "application/jsonl")];
    let answer = app.request(Method::POST, &format!("/produce?topic={topic}"), &headers, lines).await.expect(200);
    assert_eq!(answer.header("content-type"), "application/jsonl");
    let results: Vec<Value> = answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results[1]["errors"][0]["pointer"], "#/partition");
    assert_eq!((results[2]["success"].as_bool(), results[2]["warnings"].as_array().unwrap().len()), (Some(true), 1));
    let counted = app.metric("postrider_http_near_misses_total{http_route=\"/produce\",in=\"field\"}").await;
    assert_eq!(counted, Some(2.0));
    app.stop().await;
}

#[tokio::test]
async fn a_trailing_slash_redirects_and_a_misspelt_path_names_the_route() {
    let (_world, app) = api().await;
    let client = reqwest::Client::builder().redirect(Policy::none()).build().unwrap();
    for (method, path, location) in [
        (Method::POST, "/push/", "/push"),
        (Method::POST, "/produce/?topic=t&x=%2F", "/produce?topic=t&x=%2F"),
        (Method::GET, "/users/a%2Fb/following/", "/users/a%2Fb/following"),
        (Method::GET, "/api/v1/comments/", "/api/v1/comments"),
        (Method::GET, "/metrics/", "/metrics"),
    ] {
        let answer = client.request(method, format!("{}{path}", app.api)).body("{}").send().await.unwrap();
        assert_eq!(answer.status(), 308, "{path}");
        assert_eq!(answer.headers()["location"], location);
        assert_eq!(answer.headers()["cache-control"], "no-store");
    }
    // A client that follows redirects does not notice.
    app.post_json("/push/", &json!({"key": "k", "value": 1})).await.expect(202);
    for (method, path, hint) in [
        (Method::GET, "/pull/dir/", "did you mean `/pull/dir`?"),
        (Method::DELETE, "/pull/k/", "did you mean `/pull/k`?"),
        (Method::POST, "/pusch", "did you mean `/push`?"),
        (Method::GET, "/feed/u1", "did you mean `/feeds/{user_id}`?"),
    ] {
        let problem = app.request(method, path, &[], "").await.problem(404, "not_found");
        assert!(problem["detail"].as_str().unwrap().contains(hint), "{problem}");
    }
    let problem = app.get("/no/such/route/").await.problem(404, "not_found");
    assert_eq!(problem["detail"], "there is no route /no/such/route/");
    app.stop().await;
}
