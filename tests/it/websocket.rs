//! Message delivery to plain WebSocket clients, clients of `postrider.v1` and event streams.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error;

use crate::{
    harness::{
        App, World,
        inbox::{Times, faults, message},
        socket::Socket,
        sse::Stream,
        until,
        wait::{seconds, until_now},
    },
    messages::{send, stored},
};

/// Returns status and body of a refused handshake.
pub fn refused(result: Result<Socket, Error>) -> (u16, Value) {
    match result {
        Err(Error::Http(answer)) => {
            let body = answer.body().as_deref().unwrap_or_default();
            (answer.status().as_u16(), serde_json::from_slice(body).unwrap())
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("the handshake was accepted"),
    }
}

/// Waits until the deliveries to this receiver are recorded up to the last message.
pub async fn noted(app: &App, world: &World, receiver: &str) {
    let rows = format!(
        "DO $$ BEGIN IF EXISTS (SELECT FROM message_receivers LEFT JOIN message_cursors USING (receiver_id, topic_epoch, partition)
         WHERE receiver_id = '{receiver}' AND delivered IS DISTINCT FROM last) THEN RAISE 'not yet'; END IF; END $$"
    );
    until("deliveries are recorded", seconds(10), || async { world.try_sql(&rows).await.is_ok().then_some(()) }).await;
    assert!(app.is_ready().await);
}

#[tokio::test]
async fn a_plain_client_gets_the_messages_sent_while_it_was_disconnected_and_then_new_ones() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let missing = refused(Socket::try_open(&app.api, "", &[]).await);
    assert_eq!((missing.0, &missing.1["detail"]), (400, &json!("Missing data")));
    let answer = app.get("/api/v1/websocket/message").await;
    assert_eq!(answer.problem(400, "invalid_request")["detail"], "Missing data");
    app.get("/api/v1/websocket/message?receiverId=r").await.problem(400, "invalid_request");

    let body = r#"{"senderId":"s","chatId":"c","content":"h\u00e9llo","receiverId":"r","n":1.50}"#;
    app.post("/api/v1/message/action", body).await.expect(200);
    send(&app, &message("q", "s", 1)).await;
    stored(&app, "r", 1).await;
    let first = Socket::plain(&app.api, "r").await;
    assert_eq!(first.protocol, None);
    assert_eq!(first.frames(1).await.frames, [body]);
    let second = Socket::try_open(&app.api, "?receiverId=r", &[]).await.unwrap();
    send(&app, &message("r", "s", 2)).await;
    // Both devices get the message long before the sweep for unannounced messages (every 15 s).
    until_now("both devices have the message", seconds(10), || {
        (first.count() >= 2 && second.count() >= 1).then_some(())
    })
    .await;
    noted(&app, &world, "r").await;
    first.leave().await;
    drop(second);
    until("both connections are closed", seconds(5), || async {
        (app.metric("postrider_messages_open_connections").await == Some(0.0)).then_some(())
    })
    .await;
    for number in 3..200 {
        send(&app, &message("r", "s", number)).await;
    }
    stored(&app, "r", 199).await;
    let again = Socket::plain(&app.api, "r").await;
    let seen = again.frames(197).await;
    let sent: Vec<Value> = (3..200).map(|number| message("r", "s", number)).collect();
    assert_eq!(faults("r", &sent, &seen.json(), Times::Once), Vec::<String>::new());
    noted(&app, &world, "r").await;
    app.stop().await;
    assert_eq!(again.closed().await.0, 1001);
    let app = world.app().start().await;
    let last = Socket::plain(&app.api, "r").await;
    send(&app, &message("r", "s", 200)).await;
    assert_eq!(last.frames(1).await.json(), [message("r", "s", 200)], "an old message was delivered again");
    app.stop().await;
}

#[tokio::test]
async fn the_subprotocol_resumes_after_the_clients_cursor_and_acknowledges() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    for number in 0..10 {
        send(&app, &message("r", "s", number)).await;
    }
    stored(&app, "r", 10).await;
    let mut socket = Socket::cursors(&app.api, "r", "").await;
    assert_eq!(socket.protocol.as_deref(), Some("postrider.v1"));
    let seen = socket.frames(10).await;
    let sent: Vec<Value> = (0..10).map(|number| message("r", "s", number)).collect();
    assert_eq!(seen.data(), sent);
    let ids: Vec<String> = seen.json().iter().map(|frame| frame["id"].as_str().unwrap().to_owned()).collect();
    for at in [0, 4, 9] {
        let resumed = Socket::cursors(&app.api, "r", &ids[at]).await;
        assert_eq!(resumed.frames(9 - at).await.data(), sent[at + 1..]);
    }
    // They are not acknowledged, so a client without a cursor gets them again.
    assert_eq!(Socket::cursors(&app.api, "r", "").await.frames(10).await.data(), sent);
    // An acknowledgement past the last sent message is capped at that message.
    socket.say(&json!({"ack": ids[2]}).to_string()).await;
    until("the acknowledgement is recorded", seconds(5), || async {
        let again = Socket::cursors(&app.api, "r", "").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        (again.count() == 7).then_some(())
    })
    .await;
    let (partition, _) = ids[9].rsplit_once('.').unwrap();
    socket.say(&json!({"ack": format!("{partition}.999999")}).to_string()).await;
    noted(&app, &world, "r").await;
    socket.say("{\"later\":1}").await;
    send(&app, &message("r", "s", 10)).await;
    assert_eq!(socket.frames(11).await.data()[10], message("r", "s", 10));
    let (status, problem) = refused(Socket::try_cursors(&app.api, "r", "nonsense").await);
    assert_eq!((status, problem["code"].as_str()), (400, Some("invalid_request")));
    socket.say("nonsense").await;
    assert_eq!(socket.closed().await.0, 1007);
    app.stop().await;
}

#[tokio::test]
async fn event_streams_deliver_the_same_messages_and_resume() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_MESSAGES__PING_INTERVAL_MS", "100").start().await;
    let path = "/api/v1/messages/stream?receiverId=r";
    app.get("/api/v1/messages/stream").await.problem(400, "invalid_request");
    send(&app, &message("r", "s", 0)).await;
    send(&app, &message("q", "s", 0)).await;
    let stream = Stream::open(&app, path, "").await;
    for number in 1..5 {
        send(&app, &message("r", "s", number)).await;
    }
    // A message of another producer, over several lines.
    let spaced = b"{\"receiverId\": \"r\",\n \"content\": \"5\"}".to_vec();
    world.kafka.write(&world.topic("message"), &[Some(spaced)], &[]).await;
    let seen = until("all messages have arrived", seconds(20), || async {
        Some(stream.seen()).filter(|seen| seen.events.len() >= 6 && seen.heartbeats >= 2)
    })
    .await;
    assert_eq!(seen.events.len(), 6);
    let ours: Vec<&Value> = seen.events.iter().map(|(_, data)| data).filter(|data| data["senderId"] == "s").collect();
    assert_eq!(ours, (0..5).map(|number| message("r", "s", number)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
    let resumed = Stream::open(&app, path, &seen.events[2].0).await;
    let rest = until("the remaining messages have arrived", seconds(10), || async {
        Some(resumed.seen()).filter(|seen| seen.events.len() >= 3)
    })
    .await;
    assert_eq!(rest.events.len(), 3, "{rest:?}");
    app.stop().await;
    until_now("both streams have ended", seconds(2), || (stream.seen().ended && resumed.seen().ended).then_some(()))
        .await;
}

#[tokio::test]
async fn connections_are_limited_per_receiver_and_in_total_and_other_origins_are_refused() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__MAX_CONNECTIONS", "3");
    world.set("POSTRIDER_MESSAGES__MAX_CONNECTIONS_PER_RECEIVER", "2");
    world.set("POSTRIDER_HTTP__CORS__ORIGINS", "https://a.example,https://b.example");
    let app = world.app().role("api").start().await;
    let (one, _two) = (Socket::plain(&app.api, "r").await, Socket::plain(&app.api, "r").await);
    let (status, problem) = refused(Socket::try_open(&app.api, "?receiverId=r", &[]).await);
    assert_eq!((status, &problem["code"]), (429, &json!("too_many_connections")));
    let from = |origin: &'static str| {
        let api = app.api.clone();
        async move { Socket::try_open(&api, "?receiverId=q", &[("Origin", origin)]).await }
    };
    let (status, problem) = refused(from("https://c.example").await);
    assert_eq!((status, &problem["code"]), (403, &json!("origin_forbidden")));
    let _three = from("https://b.example").await.unwrap();
    let (status, problem) = refused(Socket::try_open(&app.api, "?receiverId=p", &[]).await);
    assert_eq!((status, &problem["code"]), (503, &json!("too_many_streams")));
    one.leave().await;
    until("a connection is accepted again", seconds(5), || async {
        Socket::try_open(&app.api, "?receiverId=r", &[]).await.ok()
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn a_shutdown_closes_connections_gradually_with_1001_and_a_retry_time() {
    let world = World::new().await.with_postgres().await;
    let mut app = world.app().role("api").env("POSTRIDER_MESSAGES__CLOSE_JITTER_MS", "1500").start().await;
    let mut sockets = Vec::new();
    for number in 0..40 {
        sockets.push(Socket::plain(&app.api, &format!("r{number}")).await);
    }
    let api = app.api.clone();
    app.sigterm();
    until_now("the first is closed", seconds(5), || sockets.iter().any(|socket| socket.seen().ended).then_some(()))
        .await;
    assert!(sockets.iter().any(|socket| !socket.seen().ended), "all connections were closed at once");
    for socket in &sockets {
        let (code, reason) = socket.closed().await;
        assert!(code == 1001 && reason.starts_with("retry_after_ms="), "{code} {reason}");
    }
    // The grace period for clients that do not leave would be 15 s.
    assert!(app.exit(seconds(10)).await.success());
    assert!(Socket::try_open(&api, "?receiverId=r", &[]).await.is_err());
}

#[tokio::test]
async fn idle_connections_cost_little_memory() {
    const COUNT: usize = 1_000;
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").start().await;
    // Warm up: some memory grows only once.
    for number in 0..50 {
        Socket::plain(&app.api, &format!("w{number}")).await.leave().await;
    }
    let before = app.rss_kib();
    let mut sockets = Vec::new();
    for number in 0..COUNT {
        sockets.push(Socket::plain(&app.api, &format!("r{number}")).await);
    }
    let each = (app.rss_kib().saturating_sub(before)) as f64 / COUNT as f64;
    eprintln!("{each:.1} KiB per idle connection");
    assert!(each < 30.0, "{each} KiB per connection");
    app.stop().await;
}
