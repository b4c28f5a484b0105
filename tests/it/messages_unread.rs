//! Unread counts, and the ways to acknowledge messages.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    harness::{
        App, World,
        inbox::message,
        socket::Socket,
        sse::Stream,
        until,
        wait::{seconds, until_now},
    },
    messages::{send, stored},
};

const ACK: &str = "/api/v1/messages/ack";

async fn unread(app: &App, receiver: &str) -> Value {
    app.get(&format!("/api/v1/messages/unread?receiverId={receiver}")).await.expect(200).json()
}

async fn await_unread(app: &App, receiver: &str, count: usize) -> Value {
    until(&format!("{count} are unread"), seconds(10), || async {
        Some(unread(app, receiver).await).filter(|answer| answer["unread"] == count)
    })
    .await
}

/// Returns a count of Postgres' statistics, once it has reached `at_least`.
pub async fn counted(world: &World, statistic: &str, at_least: i64) -> i64 {
    until("the statistics are updated", seconds(20), || async {
        Some(world.number(statistic).await).filter(|&count| count >= at_least)
    })
    .await
}

/// Sends messages `from` to `to` and waits until they are stored.
async fn send_more(app: &App, receiver: &str, from: usize, to: usize) {
    for number in from..to {
        send(app, &message(receiver, "s", number)).await;
    }
    stored(app, receiver, to).await;
}

/// Returns the `delivered` flag and the cursor of each message of the history.
async fn states(app: &App, receiver: &str) -> (Vec<bool>, Vec<String>) {
    let page = app.get(&format!("/api/v1/messages?receiverId={receiver}&limit=100")).await.expect(200).json();
    let messages = page["messages"].as_array().unwrap();
    let delivered = messages.iter().map(|message| message["delivered"].as_bool().unwrap()).collect();
    (delivered, messages.iter().map(|message| message["id"].as_str().unwrap().to_owned()).collect())
}

#[tokio::test]
async fn every_way_to_acknowledge_marks_messages_as_read() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let nothing = json!({"receiverId": "r", "receiver_id": "r", "unread": 0, "more": false, "oldest": null, "cursor": "0", "last": "0"});
    assert_eq!(unread(&app, "r").await, nothing);
    send_more(&app, "r", 0, 5).await;
    send_more(&app, "q", 0, 1).await;
    let before = unread(&app, "r").await;
    let (delivered, ids) = states(&app, "r").await;
    assert_eq!(delivered, [false; 5]);
    let first = app.get("/api/v1/messages?receiverId=r&limit=1").await.json();
    let expected = json!({
        "receiverId": "r", "receiver_id": "r", "unread": 5, "more": false, "oldest": first["messages"][0]["created_at"], "cursor": "0", "last": ids[4],
    });
    assert_eq!(before, expected);

    // Over the subprotocol.
    let mut socket = Socket::cursors(&app.api, "r", "").await;
    socket.frames(5).await;
    socket.say(&json!({"ack": ids[1]}).to_string()).await;
    let after = await_unread(&app, "r", 3).await;
    assert_eq!(after["cursor"], ids[1]);
    assert_eq!(states(&app, "r").await.0, [true, true, false, false, false]);
    socket.leave().await;
    // By a plain client's pongs.
    let plain = Socket::plain(&app.api, "r").await;
    plain.frames(3).await;
    let after = await_unread(&app, "r", 0).await;
    assert_eq!((&after["cursor"], &after["oldest"]), (&after["last"], &Value::Null));
    send(&app, &message("r", "s", 5)).await;
    plain.frames(4).await;
    await_unread(&app, "r", 0).await;
    plain.leave().await;
    // By a stream's client when it reconnects.
    send_more(&app, "r", 6, 9).await;
    await_unread(&app, "r", 3).await;
    let path = "/api/v1/messages/stream?receiverId=r";
    let stream = Stream::open(&app, path, "").await;
    until_now("all events have arrived", seconds(10), || (stream.count() == 3).then_some(())).await;
    let events = stream.seen().events;
    drop(stream);
    let stream = Stream::open(&app, path, &events[1].0).await;
    until_now("the last event arrives again", seconds(10), || (stream.count() == 1).then_some(())).await;
    await_unread(&app, "r", 1).await;
    // Over HTTP. The messages of `q` stay unread.
    let last = unread(&app, "r").await["last"].clone();
    let answer = app.post_json(ACK, &json!({"receiverId": "r", "ack": last})).await.expect(200).json();
    assert_eq!((&answer["unread"], &answer["cursor"]), (&json!(0), &last));
    assert_eq!(states(&app, "r").await.0, [true; 9]);
    assert_eq!(unread(&app, "q").await["unread"], 1);
    app.stop().await;
}

#[tokio::test]
async fn an_acknowledgement_over_http_is_capped_at_the_last_stored_message_and_never_moves_back() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    send_more(&app, "r", 0, 4).await;
    let (_, ids) = states(&app, "r").await;
    let ack = async |cursor: &str| {
        let answer = app.post_json(ACK, &json!({"receiverId": "r", "ack": cursor})).await.expect(200).json();
        (answer["unread"].as_i64().unwrap(), answer["cursor"].as_str().unwrap().to_owned())
    };
    assert_eq!(ack("0").await, (4, "0".to_owned()));
    assert_eq!(ack(&ids[2]).await, (1, ids[2].clone()));
    assert_eq!(ack(&ids[0]).await, (1, ids[2].clone()), "the cursor moved back");
    let (partition, _) = ids[0].rsplit_once('.').unwrap();
    assert_eq!(
        ack(&format!("{partition}.999999")).await,
        (0, ids[3].clone()),
        "the cursor is past the last stored message"
    );
    assert_eq!(ack("7.49.1").await, (0, ids[3].clone()), "an unknown partition changed the cursor");
    // The same for a made-up `Last-Event-ID`.
    send_more(&app, "r", 4, 5).await;
    drop(Stream::open(&app, "/api/v1/messages/stream?receiverId=r", &format!("{partition}.999999")).await);
    await_unread(&app, "r", 0).await;
    send_more(&app, "r", 5, 6).await;
    assert_eq!(unread(&app, "r").await["unread"], 1);
    // A new connection gets the unread message.
    assert_eq!(Socket::plain(&app.api, "r").await.frames(1).await.json(), [message("r", "s", 5)]);
    app.stop().await;
}

#[tokio::test]
async fn several_receivers_are_counted_in_one_request_and_invalid_requests_are_refused() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    // One receiver has messages in both partitions.
    let topic = world.topic("message");
    for partition in 0..2 {
        let values: Vec<Vec<u8>> = (0..3).map(|number| message("r", "s", number).to_string().into_bytes()).collect();
        world.kafka.write_in(&topic, partition, &values).await;
    }
    stored(&app, "r", 6).await;
    send_more(&app, "ä b", 0, 2).await;
    let path = "/api/v1/messages/unread?receiverId=nobody&receiverId=r&receiverId=%C3%A4%20b&receiverId=r";
    let answer = app.get(path).await.expect(200).json();
    let counts: Vec<(&str, i64)> = answer["receivers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["receiver_id"].as_str().unwrap(), one["unread"].as_i64().unwrap()))
        .collect();
    assert_eq!(counts, [("nobody", 0), ("r", 6), ("ä b", 2), ("r", 6)]);
    // An acknowledgement in one partition does not affect the other.
    let (_, ids) = states(&app, "r").await;
    let read = app.post_json(ACK, &json!({"receiverId": "r", "ack": ids[2]})).await.expect(200).json();
    assert_eq!((&read["unread"], &read["cursor"]), (&json!(3), &json!(ids[2])));
    assert_eq!(states(&app, "r").await.0, [true, true, true, false, false, false]);
    let header = app.request(Method::GET, "/api/v1/messages/unread", &[("receiverid", "r")], "").await;
    assert_eq!(header.expect(200).json()["unread"], 3);

    let many = "receiverId=r&".repeat(101);
    let long = "x".repeat(256);
    for (query, status, code) in [
        (String::new(), 400, "invalid_request"),
        ("receiverId=".to_owned(), 400, "invalid_request"),
        ("receiverId=r&receiverId=".to_owned(), 400, "invalid_request"),
        (many, 400, "invalid_request"),
        (format!("receiverId={long}"), 422, "invalid_field"),
    ] {
        app.get(&format!("/api/v1/messages/unread?{query}")).await.problem(status, code);
    }
    for (body, status, code) in [
        (json!({"ack": "0"}), 400, "invalid_request"),
        (json!({"receiverId": "r"}), 400, "invalid_request"),
        (json!({"receiverId": "r", "ack": 1}), 400, "invalid_request"),
        (json!({"receiverId": "r", "ack": "1.x"}), 400, "invalid_request"),
        (json!({"receiverId": "", "ack": "0"}), 400, "invalid_request"),
        (json!({"receiverId": long, "ack": "0"}), 422, "invalid_field"),
        (json!([]), 400, "invalid_request"),
    ] {
        app.post_json(ACK, &body).await.problem(status, code);
    }
    app.stop().await;
}

#[tokio::test]
async fn counting_stops_at_a_thousand_and_reads_no_whole_table() {
    let mut world = World::new().await.with_postgres().await;
    // To measure this limit, the process reads all of a small table.
    world.set("POSTRIDER_MESSAGES__MAX_RECEIVERS", "0");
    let app = world.app().start().await;
    app.await_log("created a day's partition of messages", seconds(20)).await;
    world
        .sql(
            r#"INSERT INTO messages (receiver_id, topic_epoch, partition, "offset", prev, event_id, value, created_at)
               SELECT CASE WHEN n <= 1500 THEN 'r' ELSE 'x' || n END, 0, 0, n, n - 1, gen_random_uuid(), '{}', now()
               FROM generate_series(1, 60000) AS n;
               INSERT INTO message_receivers SELECT receiver_id, 0, 0, max("offset") FROM messages GROUP BY 1;
               INSERT INTO message_cursors SELECT receiver_id, 0, 0, CASE receiver_id WHEN 'r' THEN 0 ELSE last END FROM message_receivers;
               ANALYZE messages, message_receivers, message_cursors"#,
        )
        .await;
    let scans = "SELECT sum(seq_tup_read)::bigint FROM pg_stat_user_tables WHERE schemaname = current_schema() AND relname SIMILAR TO 'message_(receivers|cursors)|messages_d[0-9]+'";
    let lookups = "SELECT sum(idx_scan)::bigint FROM pg_stat_user_tables WHERE schemaname = current_schema() AND relname = 'message_receivers'";
    let scans_before = counted(&world, scans, 60_000).await;
    let lookups_before = world.number(lookups).await;
    for _ in 0..20 {
        let answer = unread(&app, "r").await;
        assert_eq!((&answer["unread"], &answer["more"]), (&json!(1_000), &json!(true)));
        assert_eq!(unread(&app, "x2000").await["unread"], 0);
    }
    counted(&world, lookups, lookups_before + 40).await;
    assert_eq!(world.number(scans).await, scans_before);
    let last = unread(&app, "r").await["last"].clone();
    let answer = app.post_json(ACK, &json!({"receiverId": "r", "ack": "0.0.500"})).await.expect(200).json();
    assert_eq!((&answer["unread"], &answer["more"]), (&json!(1_000), &json!(false)));
    let answer = app.post_json(ACK, &json!({"receiverId": "r", "ack": last})).await.expect(200).json();
    assert_eq!((&answer["unread"], &answer["cursor"]), (&json!(0), &json!("0.0.1500")));
    app.stop().await;
}
