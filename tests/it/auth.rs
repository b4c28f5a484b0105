//! API keys, tickets, and what they allow.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    harness::{
        Answer, App, World,
        proxy::{Mode, Proxy},
        socket::Socket,
        sse::Stream,
        until,
        wait::{seconds, until_now},
    },
    websocket::refused,
};

/// The bootstrap key of the processes in these tests.
pub const BOOTSTRAP: &str = "bootstrap-key-of-the-tests-0123456789";

/// Returns a world in which requests need credentials.
pub async fn locked_world() -> World {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_AUTH__MODE", "required");
    world.set("POSTRIDER_AUTH__BOOTSTRAP_KEY", BOOTSTRAP);
    world
}

/// Sends a request with a credential.
pub async fn with(app: &App, key: &str, method: Method, path: &str, body: &Value) -> Answer {
    let authorization = format!("Bearer {key}");
    let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    app.request(method, path, &headers, body).await
}

pub async fn get(app: &App, key: &str, path: &str) -> Answer {
    with(app, key, Method::GET, path, &Value::Null).await
}

async fn post(app: &App, key: &str, path: &str, body: &Value) -> Answer {
    with(app, key, Method::POST, path, body).await
}

/// Makes a key, and returns its id and the key.
pub async fn make(app: &App, grant: Value) -> (String, String) {
    let made = post(app, BOOTSTRAP, "/admin/keys", &grant).await.expect(201).json();
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("id"), text("key"))
}

#[tokio::test]
async fn a_key_allows_its_scopes_for_its_subject_and_nothing_else() {
    let world = locked_world().await;
    let topic = world.make_topic("acme.orders", 1).await;
    let app = world.app().start().await;
    let pattern = format!("topic:write:{}{{tenant}}.*", world.prefix);
    let scopes = json!(["kv:read", "comments:write", "messages:read", "messages:write", "feed:write", pattern]);
    let (_, key) = make(&app, json!({"scopes": scopes, "subject": "ann", "tenant": "acme"})).await;

    get(&app, &key, "/pull/nothing").await.problem(404, "key_not_found");
    let lacking = post(&app, &key, "/push", &json!({"key": "a", "value": 1})).await.problem(403, "forbidden");
    assert_eq!(lacking["scope"], "kv:write");
    post(&app, &key, "/produce", &json!({"topic": topic, "payload": 1})).await.expect(200);
    let other = world.topic("other.orders");
    let lacking = post(&app, &key, "/produce", &json!({"topic": other, "payload": 1})).await.problem(403, "forbidden");
    assert_eq!(lacking["scope"], format!("topic:write:{other}"));
    let records = json!({"topic": topic, "records": [{"payload": 1}, {"topic": other, "payload": 2}]});
    let batch = post(&app, &key, "/produce", &records).await.expect(207).json();
    assert_eq!([&batch["results"][0]["success"], &batch["results"][1]["success"]], [true, false]);
    assert_eq!(batch["results"][1]["code"], "forbidden", "{batch}");

    let message = |sender: &str| json!({"chatId": "c", "senderId": sender, "receiverId": "bob", "content": "hello"});
    let post_by = |author: &str| json!({"author_id": author, "content": "hello"});
    let follow = |follower: &str| json!({"follower_id": follower, "followee_id": "carol"});
    let comment = |author: &str| json!({"text": "hello", "author_id": author});
    for (path, own, foreign) in [
        ("/api/v1/message/action", message("ann"), message("bob")),
        ("/posts", post_by("ann"), post_by("bob")),
        ("/follow", follow("ann"), follow("bob")),
        ("/unfollow", follow("ann"), follow("bob")),
        ("/api/v1/comments", comment("ann"), comment("bob")),
    ] {
        let answer = post(&app, &key, path, &own).await;
        assert!((200..300).contains(&answer.status), "{path}: {answer:?}");
        let refused = post(&app, &key, path, &foreign).await.problem(403, "forbidden");
        assert_eq!(refused["scope"], "act-for-others", "{path}");
    }
    get(&app, &key, "/api/v1/messages?receiverId=ann").await.expect(200);
    for path in [
        "/api/v1/messages?receiverId=bob",
        "/api/v1/messages/unread?receiverId=ann&receiverId=bob",
        "/api/v1/messages/stream?receiverId=bob",
        "/api/v1/websocket/message?receiverId=bob",
    ] {
        assert_eq!(get(&app, &key, path).await.problem(403, "forbidden")["scope"], "act-for-others", "{path}");
    }
    let ack = json!({"receiverId": "bob", "ack": ""});
    post(&app, &key, "/api/v1/messages/ack", &ack).await.problem(403, "forbidden");

    // Posts and accounts of others stay, and `act-for-others` reaches them.
    let by_bob = post(&app, BOOTSTRAP, "/posts", &post_by("bob")).await.expect(202).json()["post_id"].clone();
    let path = format!("/posts/{by_bob}");
    with(&app, &key, Method::DELETE, &path, &Value::Null).await.problem(403, "forbidden");
    with(&app, &key, Method::DELETE, "/users/bob", &Value::Null).await.problem(403, "forbidden");
    get(&app, &key, "/feeds/ann").await.problem(403, "forbidden");
    get(&app, BOOTSTRAP, "/feeds/ann").await.expect(200);
    with(&app, BOOTSTRAP, Method::DELETE, &path, &Value::Null).await.expect(200);
    app.stop().await;
}

#[tokio::test]
async fn a_revoked_key_is_refused_by_every_process_and_its_connections_end() {
    let world = locked_world().await;
    let (app, other) = tokio::join!(world.app().start(), world.app().role("api").start());
    let (id, key) = make(&app, json!({"scopes": ["messages:read", "comments:read"], "subject": "r"})).await;
    // A process that did not make the key accepts it at once.
    get(&other, &key, "/api/v1/messages?receiverId=r").await.expect(200);
    let authorization = format!("Bearer {key}");
    let headers = [("authorization", authorization.as_str())];
    let socket = Socket::try_open(&other.api, "?receiverId=r", &headers).await.unwrap();
    let client = reqwest::Client::builder()
        .default_headers([(reqwest::header::AUTHORIZATION, authorization.parse().unwrap())].into_iter().collect())
        .build()
        .unwrap();
    let mut streams = Vec::new();
    for path in ["/api/v1/messages/stream?receiverId=r", "/api/v1/comments/stream"] {
        streams.push(Stream::try_open(&client, &other.api, path, "").await.unwrap());
    }

    let started = std::time::Instant::now();
    let answer = with(&app, BOOTSTRAP, Method::DELETE, &format!("/admin/keys/{id}"), &Value::Null).await;
    assert!(answer.expect(200).json()["revoked_at"].is_string());
    get(&app, &key, "/api/v1/messages?receiverId=r").await.problem(401, "unauthenticated");
    until("the other process refuses the key", seconds(5), || async {
        let answer = get(&other, &key, "/api/v1/messages?receiverId=r").await;
        (answer.status == 401).then_some(())
    })
    .await;
    assert!(started.elapsed() < seconds(5));
    let (code, reason) = socket.closed().await;
    assert_eq!((code, reason.as_str()), (4401, "the credential has expired or was revoked"));
    for stream in streams {
        let ended = until_now("the stream ends with an error", seconds(5), || {
            let seen = stream.seen();
            seen.events.iter().map(|(_, data)| data.to_string()).find(|data| data.contains("unauthenticated"))
        })
        .await;
        assert!(ended.contains("the credential has expired or was revoked"), "{ended}");
    }
    // A change by hand counts too.
    let (id, key) = make(&app, json!({"scopes": ["messages:read"], "subject": "r"})).await;
    get(&other, &key, "/api/v1/messages?receiverId=r").await.expect(200);
    world.sql(&format!("UPDATE api_keys SET revoked_at = now() WHERE id = '{id}'")).await;
    until("the key is refused", seconds(5), || async {
        (get(&other, &key, "/api/v1/messages?receiverId=r").await.status == 401).then_some(())
    })
    .await;
    with(&app, BOOTSTRAP, Method::DELETE, &format!("/admin/keys/{id}"), &Value::Null).await.expect(200);
    with(&app, BOOTSTRAP, Method::DELETE, "/admin/keys/nothing", &Value::Null).await.problem(404, "key_unknown");
    app.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn keys_are_made_listed_and_revoked_by_the_command_line() {
    let world = locked_world().await;
    let app = world.app().start().await;
    let run = |words: &[&str]| {
        let output = world.command().arg("keys").args(words).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let (made, key, note) = run(&["create", "--scope", "kv:read", "--subject", "shop", "--expires", "1h"]);
    assert!(made, "{note}");
    let key = key.trim();
    get(&app, key, "/pull/nothing").await.problem(404, "key_not_found");
    let (_, listed, _) = run(&["list", "--output", "json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!([&listed[0]["subject"], &listed[0]["scopes"][0]], ["shop", "kv:read"]);
    assert!(!listed.to_string().contains(key.rsplit('_').next().unwrap()), "the list shows the secret");
    let id = listed[0]["id"].as_str().unwrap();
    assert!(key.starts_with(&format!("pr_live_{id}_")) && note.contains(id), "{note}");
    for (words, error) in [
        (&["create", "--scope", "kv"][..], "`kv` is not a scope; there are kv:read, "),
        (&["create", "--scope", "topic:read"], "needs a pattern of topics, such as `topic:read:orders.*`"),
        (&["create", "--scope", "kv:read", "--expires", "soon"], "`expires` must be a time such as"),
        (&["create", "--scope", "kv:read", "--subject", ""], "`subject` must have 1 to 255 bytes (got 0)"),
        (&["create"], "--scope"),
        (&["revoke", "nothing"], "there is no API key nothing"),
    ] {
        let (success, _, stderr) = run(words);
        assert!(!success && stderr.contains(error), "{words:?}: {stderr}");
    }
    assert!(run(&["revoke", id]).0);
    until("the key is refused", seconds(5), || async {
        (get(&app, key, "/pull/nothing").await.status == 401).then_some(())
    })
    .await;
    let (_, live, _) = run(&["list"]);
    assert_eq!(live, "no API keys\n");
    assert!(run(&["list", "--all"]).1.contains("revoked"));
    app.stop().await;
}

#[tokio::test]
async fn an_expired_key_is_refused_and_ends_its_connections() {
    let world = locked_world().await;
    let app = world.app().role("api").start().await;
    let grant = json!({"scopes": ["messages:read"], "subject": "r", "expires": "3s"});
    let (_, key) = make(&app, grant).await;
    let headers = [("authorization", format!("Bearer {key}"))];
    let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
    let socket = Socket::try_open(&app.api, "?receiverId=r", &headers).await.unwrap();
    assert_eq!(socket.closed().await.0, 4401);
    let refused = get(&app, &key, "/api/v1/messages?receiverId=r").await.problem(401, "unauthenticated");
    assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("expired")), "{refused}");
    app.stop().await;
}

#[tokio::test]
async fn a_ticket_opens_one_connection_with_the_rights_of_its_key() {
    let world = locked_world().await;
    let (app, other) = tokio::join!(world.app().start(), world.app().role("api").start());
    let (id, key) = make(&app, json!({"scopes": ["messages:read"], "subject": "r"})).await;
    let ticket = async || {
        let answer = post(&app, &key, "/auth/ticket", &Value::Null).await.expect(200).json();
        assert_eq!(answer["expires_in"], 30);
        answer["ticket"].as_str().unwrap().to_owned()
    };
    app.post("/auth/ticket", "").await.problem(401, "unauthenticated");
    let one = ticket().await;
    let query = format!("?receiverId=r&ticket={one}");
    let socket = Socket::try_open(&other.api, &query, &[]).await.unwrap();
    for process in [&app, &other] {
        let (status, problem) = refused(Socket::try_open(&process.api, &query, &[]).await);
        assert_eq!((status, &problem["code"]), (401, &json!("unauthenticated")), "it was accepted twice");
    }
    // It is a credential for connections only, and has the rights of its key.
    let two = ticket().await;
    app.get(&format!("/api/v1/messages?receiverId=r&ticket={two}")).await.problem(401, "unauthenticated");
    let foreign = app.get(&format!("/api/v1/messages/stream?receiverId=bob&ticket={two}")).await;
    foreign.problem(403, "forbidden");
    let three = ticket().await;
    app.get(&format!("/api/v1/comments/stream?ticket={three}")).await.problem(403, "forbidden");
    let four = ticket().await;
    let path = format!("/api/v1/messages/stream?receiverId=r&ticket={four}");
    let stream = Stream::try_open(&app.client, &app.api, &path, "").await.unwrap();
    let message = json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "hello"});
    post(&app, BOOTSTRAP, "/api/v1/message/action", &message).await.expect(200);
    until_now("the stream has the message", seconds(10), || (stream.count() > 0).then_some(())).await;

    // The connections end with the key, wherever their tickets came from.
    with(&app, BOOTSTRAP, Method::DELETE, &format!("/admin/keys/{id}"), &Value::Null).await.expect(200);
    assert_eq!(socket.closed().await.0, 4401);
    for secret in [&one, &two, &key] {
        let logs = [app.log(), other.log()].concat();
        assert!(!logs.contains(secret.as_str()), "the log has a credential");
    }
    app.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn keys_that_are_known_are_accepted_while_postgres_is_away_and_no_longer_than_configured() {
    let mut world = locked_world().await;
    let (redis, postgres) = (Proxy::start().await, Proxy::start().await);
    world.reach_through(&redis, &postgres);
    world.set("POSTRIDER_AUTH__KEYS_STALE_SECONDS", "6");
    let app = world.app().start().await;
    let (_, key) = make(&app, json!({"scopes": ["kv:read"]})).await;
    get(&app, &key, "/pull/nothing").await.problem(404, "key_not_found");
    postgres.set(Mode::Down);
    get(&app, &key, "/pull/nothing").await.problem(404, "key_not_found");
    until("the key cannot be checked any more", seconds(30), || async {
        (get(&app, &key, "/pull/nothing").await.status == 503).then_some(())
    })
    .await;
    let problem = get(&app, &key, "/pull/nothing").await.problem(503, "authentication_unavailable");
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("Postgres")), "{problem}");
    get(&app, BOOTSTRAP, "/pull/nothing").await.problem(404, "key_not_found");
    postgres.set(Mode::Pass);
    until("the key is accepted again", seconds(30), || async {
        (get(&app, &key, "/pull/nothing").await.status == 404).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn the_commands_send_the_key_in_the_variable() {
    let world = locked_world().await;
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().start().await;
    let run = |key: Option<&str>| {
        let mut command = world.command();
        command.args(["produce", &topic, "hello", "--api", &app.api]);
        if let Some(key) = key {
            command.env("API_KEY", key);
        }
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (success, stderr) = run(None);
    assert!(!success && stderr.contains("send `Authorization: Bearer`"), "{stderr}");
    let (success, stderr) = run(Some(BOOTSTRAP));
    assert!(success, "{stderr}");
    app.stop().await;
}

#[tokio::test]
async fn a_stream_of_records_ends_with_its_key() {
    let world = locked_world().await;
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().role("api").start().await;
    let (id, key) = make(&app, json!({"scopes": ["topic:write:*"]})).await;
    let (lines, mut sent) = tokio::sync::mpsc::channel::<Result<String, std::io::Error>>(1);
    let body = reqwest::Body::wrap_stream(futures_util::stream::poll_fn(move |cx| sent.poll_recv(cx)));
    let request = app.client.post(format!("{}/produce?topic={topic}", app.api)).body(body);
    let request = request.header("content-type", "application/x-ndjson").bearer_auth(&key);
    lines.send(Ok("{\"payload\":1}\n".to_owned())).await.unwrap();
    let mut answer = request.send().await.unwrap();
    let mut text = String::new();
    while !text.ends_with('\n') {
        text.push_str(std::str::from_utf8(&answer.chunk().await.unwrap().unwrap()).unwrap());
    }
    assert!(text.contains(r#""success":true"#), "{text}");
    with(&app, BOOTSTRAP, Method::DELETE, &format!("/admin/keys/{id}"), &Value::Null).await.expect(200);
    // It ends although the client goes on.
    let rest = answer.text().await.unwrap();
    let last: Value = serde_json::from_str(rest.trim()).unwrap();
    assert_eq!([&last["success"], &last["code"]], [&json!(false), &json!("unauthenticated")]);
    app.stop().await;
}

#[tokio::test]
async fn a_field_in_two_spellings_does_not_hide_another_sender() {
    let world = locked_world().await;
    let app = world.app().role("api").start().await;
    let (_, key) = make(&app, json!({"scopes": ["messages:write"], "subject": "ann"})).await;
    let message = json!({"chatId": "c", "senderId": "ann", "receiverId": "r", "content": "hello"});
    post(&app, &key, "/api/v1/message/action", &message).await.expect(200);
    for name in ["SENDERID", "senderid", "\u{17f}enderId"] {
        let mut message = message.clone();
        message[name] = json!("bob");
        let problem = post(&app, &key, "/api/v1/message/action", &message).await.problem(400, "invalid_request");
        assert_eq!(problem["errors"][0]["pointer"], "#/senderId", "{name}: {problem}");
        message.as_object_mut().unwrap().remove("senderId");
        post(&app, &key, "/api/v1/message/action", &message).await.problem(403, "forbidden");
    }
    app.stop().await;
}
