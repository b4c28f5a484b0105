//! Messages sent over HTTP or by any Kafka producer, and read back as history.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{
    App, World,
    inbox::{Times, faults, message},
    socket::Socket,
    until,
    wait::seconds,
};

pub const PATH: &str = "/api/v1/message/action";

/// Sends one message and fails unless it is accepted.
pub async fn send(app: &App, message: &Value) {
    assert_eq!(app.post_json(PATH, message).await.expect(200).text(), "Message Sent");
}

/// Reads a receiver's whole history, page by page.
pub async fn history(app: &App, receiver: &str, limit: usize) -> Vec<Value> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/api/v1/messages?receiverId={receiver}&limit={limit}&after={after}");
        let page = app.get(&path).await.expect(200).json();
        let messages = page["messages"].as_array().unwrap();
        assert!(messages.len() <= limit && page["gap"] == false, "{page}");
        all.extend(messages.iter().map(|message| message["data"].clone()));
        match page["next_cursor"].as_str() {
            Some(next) => after = next.to_owned(),
            None => return all,
        }
    }
}

/// Waits until the history has this many messages. More of them are a failure.
pub async fn stored(app: &App, receiver: &str, count: usize) -> Vec<Value> {
    let found = until(&format!("{count} messages for {receiver}"), seconds(40), || async {
        Some(history(app, receiver, 100).await).filter(|found| found.len() >= count)
    })
    .await;
    assert_eq!(found.len(), count, "{found:?}");
    found
}

#[tokio::test]
async fn a_message_is_accepted_and_stored_in_the_topic_as_sent() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let health = app.get("/api/v1/websocket/health").await.expect(200);
    assert_eq!(health.text(), "WebSocket Route Operational");
    let body = "{ \"senderId\":\"s\", \"chatId\":\"c\",\n \"content\":\"h\\u00e9llo \\\"you\\\"\", \"receiverId\":\"r\", \"n\": 1.50 }";
    let answer = app.post(PATH, body).await.expect(200);
    assert_eq!((answer.text().as_str(), answer.header("content-type")), ("Message Sent", "text/plain; charset=utf-8"));
    for receiver in ["a", "b", "c", "d", "r"] {
        send(&app, &message(receiver, "s", 1)).await;
    }
    let log = world.kafka.read(&world.topic("message")).await;
    let minified = r#"{"senderId":"s","chatId":"c","content":"h\u00e9llo \"you\"","receiverId":"r","n":1.50}"#;
    let first = log.iter().find(|record| record.text() == minified).unwrap();
    assert_eq!(first.header("ce_type"), Some("postrider.message.sent"));
    assert!(log.len() == 6 && log.iter().all(|record| record.key() == "message.new"), "{log:?}");
    for record in &log {
        let receiver = record.json()["receiverId"].as_str().unwrap().to_owned();
        assert_eq!(record.partition, postrider_kafka::partition_of(receiver.as_bytes(), 2), "{receiver}");
    }
    assert!(log.iter().any(|record| record.partition != first.partition), "all messages are in one partition");
    assert_eq!(stored(&app, "r", 2).await[1], message("r", "s", 1));
    app.stop().await;
}

#[tokio::test]
async fn invalid_messages_are_refused() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").start().await;
    for field in ["chatId", "senderId", "receiverId", "content"] {
        for bad in [json!(""), json!(null), json!(1), json!("a\u{0}")] {
            let mut body = message("r", "s", 1);
            body[field] = bad;
            app.post_json(PATH, &body).await.problem(400, "invalid_request");
            body.as_object_mut().unwrap().remove(field);
            app.post_json(PATH, &body).await.problem(400, "invalid_request");
        }
    }
    app.post(PATH, "[]").await.problem(400, "invalid_request");
    app.post(PATH, "{").await.problem(400, "invalid_json");
    app.post(PATH, r#"{"chatId":"c","senderId":"s","receiverId":"r","receiverId":"q","content":"x"}"#)
        .await
        .problem(400, "invalid_request");
    app.post_json(PATH, &message(&"x".repeat(256), "s", 1)).await.problem(422, "invalid_field");
    let text = [("content-type", "text/plain")];
    app.request(Method::POST, PATH, &text, message("r", "s", 1).to_string())
        .await
        .problem(415, "unsupported_media_type");
    assert!(world.kafka.read(&world.topic("message")).await.is_empty());
    for query in ["", "?receiverId="] {
        let problem = app.get(&format!("/api/v1/messages{query}")).await.problem(400, "invalid_request");
        assert_eq!(problem["detail"], "Missing data");
    }
    app.get("/api/v1/messages?receiverId=r&limit=0").await.problem(422, "invalid_field");
    app.get("/api/v1/messages?receiverId=r&after=1.x.2").await.problem(400, "invalid_request");
    assert_eq!(history(&app, "nobody", 10).await, Vec::<Value>::new());
    app.stop().await;
}

#[tokio::test]
async fn a_message_that_is_resent_with_its_idempotency_key_is_stored_once() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    for _ in 0..5 {
        app.post_with(PATH, &[("idempotency-key", "k")], &message("r", "s", 1)).await.expect(200);
    }
    // The same key with another receiver is a different message.
    app.post_with(PATH, &[("idempotency-key", "k")], &message("q", "s", 1)).await.expect(200);
    send(&app, &message("r", "s", 2)).await;
    assert_eq!(stored(&app, "r", 2).await, [message("r", "s", 1), message("r", "s", 2)]);
    stored(&app, "q", 1).await;
    assert_eq!(world.kafka.read(&world.topic("message")).await.len(), 7);
    app.stop().await;
}

#[tokio::test]
async fn a_compacted_topic_is_refused_with_the_command_that_fixes_it() {
    let world = World::new().await.with_postgres().await;
    world.kafka.create_with(&world.topic("message"), 2, &[("cleanup.policy", "compact")]).await;
    let app = world.app().role("api").even_if_not_ready().start().await;
    let detail = app.await_failing("topics", seconds(20)).await;
    let detail = if detail.contains("cleanup.policy") {
        detail
    } else {
        until("the topic is refused", seconds(20), || async {
            app.failing("topics").await.filter(|detail| detail.contains("cleanup.policy"))
        })
        .await
    };
    assert!(detail.contains("kafka-configs.sh"), "{detail}");
    app.post_json(PATH, &message("r", "s", 1)).await.problem(503, "kafka_unavailable");
    app.stop().await;
}

#[tokio::test]
async fn records_of_other_producers_are_accepted_and_invalid_ones_are_dead_lettered() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let topic = world.topic("message");
    let value = |text: &str| Some(text.as_bytes().to_vec());
    let mut values = vec![
        None,
        value("not JSON"),
        value("[]"),
        value(r#"{"note":"for nobody"}"#),
        value(r#"{"receiverId":""}"#),
        value(r#"{"receiverId":7}"#),
        value(r#"{"receiverId":"a\u0000"}"#),
        Some(json!({"receiverId": "x".repeat(300)}).to_string().into_bytes()),
    ];
    let spaced = "{\"receiverId\": \"r\",\n \"content\": \"a\\u0000b\"}";
    values.push(value(spaced));
    world.kafka.write(&topic, &values, &[]).await;
    let socket = Socket::cursors(&app.api, "r", "").await;
    // Records of one receiver may be in any partition, and keep their order within it.
    for partition in 0..2 {
        let own = |number| message("r", &format!("s{partition}"), number).to_string().into_bytes();
        world.kafka.write_in(&topic, partition, &(0..20).map(own).collect::<Vec<_>>()).await;
    }
    let seen = socket.frames(41).await;
    let sent: Vec<Value> = (0..40).map(|number| message("r", &format!("s{}", number / 20), number % 20)).collect();
    assert_eq!(faults("r", &sent, &seen.data(), Times::Once), Vec::<String>::new());
    // The cursor holds a position in each of the two partitions, and resuming is still exact.
    let ids: Vec<Value> = seen.json().iter().map(|frame| frame["id"].clone()).collect();
    assert!(ids[40].as_str().unwrap().contains('_'), "{ids:?}");
    for at in [0, 10, 30] {
        let resumed = Socket::cursors(&app.api, "r", ids[at].as_str().unwrap()).await;
        resumed.frames(40 - at).await;
    }
    let found = stored(&app, "r", 41).await;
    assert_eq!(history(&app, "r", 7).await.len(), 41);
    assert!(found.contains(&serde_json::from_str(spaced).unwrap()));
    let letters = until("dead letters", seconds(20), || async {
        Some(world.kafka.read(&world.topic("dead-letter-events")).await).filter(|letters| letters.len() >= 8)
    })
    .await;
    let mut classes: Vec<&str> = letters.iter().map(|letter| letter.header("error-class").unwrap()).collect();
    classes.sort_unstable();
    let expected = [
        "no_receiver",
        "no_receiver",
        "no_value",
        "not_json",
        "null_character",
        "receiver_too_long",
        "wrong_type",
        "wrong_type",
    ];
    assert_eq!(classes, expected);
    app.stop().await;
}

#[tokio::test]
async fn messages_that_postgres_refuses_are_dead_lettered_and_block_no_receiver() {
    let world = World::new().await.with_postgres().await;
    // Refuses 13, 23 and 33.
    world.sql(r#"ALTER TABLE messages ADD CHECK (value NOT LIKE '%"content":"_3"%')"#).await;
    let api = world.app().role("api").start().await;
    let socket = Socket::cursors(&api.api, "r", "").await;
    let other_socket = Socket::cursors(&api.api, "q", "").await;
    let to = |receiver| (0..40).map(move |number| message(receiver, "s", number * 2)).collect::<Vec<Value>>();
    let bytes = |sent: &[Value]| sent.iter().map(|message| message.to_string().into_bytes()).collect::<Vec<_>>();
    let sent: Vec<Value> = (0..40).map(|number| message("r", "s", number)).collect();
    world.kafka.write_in(&world.topic("message"), 0, &bytes(&sent)).await;
    world.kafka.write_in(&world.topic("message"), 1, &bytes(&to("q"))).await;
    // One receiver's messages are one batch, and batches of both partitions may share a statement.
    let processor = world.app().role("processor").start().await;
    let taken: Vec<Value> =
        sent.into_iter().filter(|message| !["13", "23", "33"].map(Value::from).contains(&message["content"])).collect();
    assert_eq!(socket.frames(37).await.data(), taken);
    assert_eq!(other_socket.frames(40).await.data(), to("q"));
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), 3).await;
    let mut refused: Vec<_> =
        letters.iter().map(|letter| (letter.header("error-class"), letter.json()["content"].clone())).collect();
    refused.sort_by_key(|(_, content)| content.to_string());
    assert_eq!(refused, ["13", "23", "33"].map(|content| (Some("refused"), Value::from(content))));
    send(&api, &message("r", "s", 40)).await;
    assert_eq!(stored(&api, "r", 38).await[..37], taken);
    processor.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn idle_receivers_are_deleted_and_a_client_with_an_old_cursor_gets_a_gap() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let mut cursors = Vec::new();
    for receiver in ["old", "new"] {
        let mut socket = Socket::cursors(&app.api, receiver, "").await;
        for number in 0..3 {
            send(&app, &message(receiver, "s", number)).await;
        }
        let cursor = socket.frames(3).await.cursor().unwrap();
        socket.say(&json!({"ack": cursor}).to_string()).await;
        cursors.push(cursor);
    }
    let rows = |receiver, count| {
        format!(
            "DO $$ BEGIN ASSERT (SELECT count(*) FROM message_receivers WHERE receiver_id = '{receiver}') = {count}
                 AND (SELECT count(*) FROM message_cursors WHERE receiver_id = '{receiver}') = {count}; END $$"
        )
    };
    until("both receivers and cursors are stored", seconds(10), || async {
        let both = [rows("old", 1), rows("new", 1)].join(";");
        world.try_sql(&both).await.ok()
    })
    .await;
    app.stop().await;
    world
        .sql(
            "DELETE FROM messages WHERE receiver_id = 'old';
             UPDATE message_receivers SET last_stored_at = now() - interval '62 days' WHERE receiver_id = 'old'",
        )
        .await;
    let app = world.app().start().await;
    let deleted = app.await_log("deleted idle receivers", seconds(20)).await;
    assert_eq!(deleted["receivers"], 1);
    world.sql(&[rows("old", 0), rows("new", 1)].join(";")).await;
    let gap = json!({"type": "gap"});
    // A client whose cursor predates the deletion cannot know whether it has missed anything.
    let early = Socket::cursors(&app.api, "old", &cursors[0]).await;
    assert_eq!(early.frames(1).await.json(), std::slice::from_ref(&gap));
    let page = app.get(&format!("/api/v1/messages?receiverId=old&after={}", cursors[0])).await.expect(200).json();
    assert_eq!(page, json!({"messages": [], "nextCursor": null, "next_cursor": null, "gap": true}));
    send(&app, &message("old", "s", 3)).await;
    assert_eq!(early.frames(2).await.data(), [message("old", "s", 3)]);
    let late = Socket::cursors(&app.api, "old", &cursors[0]).await.frames(2).await;
    assert_eq!((&late.json()[0], late.data()), (&gap, vec![message("old", "s", 3)]));
    // A client gets the gap once, and a client that starts from the beginning gets none.
    let resumed = Socket::cursors(&app.api, "old", &early.seen().cursor().unwrap()).await;
    let fresh = Socket::cursors(&app.api, "old", "0").await;
    let untouched = Socket::cursors(&app.api, "new", &cursors[1]).await;
    send(&app, &message("old", "s", 4)).await;
    send(&app, &message("new", "s", 3)).await;
    assert_eq!(resumed.frames(1).await.data(), [message("old", "s", 4)]);
    assert_eq!(fresh.frames(2).await.data(), [message("old", "s", 3), message("old", "s", 4)]);
    assert_eq!(untouched.frames(1).await.data(), [message("new", "s", 3)]);
    app.stop().await;
}

#[tokio::test]
async fn daily_partitions_are_created_ahead_and_dropped_when_old_and_clients_that_are_behind_get_a_gap() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let created = app.await_log("created a day's partition of messages", seconds(20)).await;
    assert!(created["table"].as_str().unwrap().starts_with("messages_d20"), "{created}");
    for number in 0..3 {
        send(&app, &message("r", "s", number)).await;
    }
    stored(&app, "r", 3).await;
    app.stop().await;
    // As if the messages had been stored long ago.
    world
        .sql(
            "CREATE TABLE messages_d20200101 PARTITION OF messages FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00');
             UPDATE messages SET stored_at = '2020-01-01 12:00+00'",
        )
        .await;
    let app = world.app().start().await;
    let dropped = app.await_log("dropped a day's partition of messages", seconds(20)).await;
    assert_eq!(dropped["table"], "messages_d20200101");
    let page = app.get("/api/v1/messages?receiverId=r").await.expect(200).json();
    assert_eq!(page, json!({"messages": [], "nextCursor": null, "next_cursor": null, "gap": true}));
    let mut socket = Socket::cursors(&app.api, "r", "").await;
    assert_eq!(socket.frames(1).await.json()[0], json!({"type": "gap"}));
    send(&app, &message("r", "s", 3)).await;
    let seen = socket.frames(2).await;
    assert_eq!(seen.data(), [message("r", "s", 3)]);
    socket.say(&json!({"ack": seen.cursor().unwrap()}).to_string()).await;
    let page = app.get("/api/v1/messages?receiverId=r&after=0").await.expect(200).json();
    assert_eq!((&page["gap"], &page["messages"][0]["data"]), (&json!(true), &message("r", "s", 3)));
    app.stop().await;
}
