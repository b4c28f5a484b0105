//! Presence queries and change events without faults, and the limit of connections per address.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    harness::{
        App, World,
        changes::{changes, faults, states},
        redis,
        socket::Socket,
        sse::Stream,
        until,
        wait::seconds,
    },
    websocket::refused,
};

const NONE: Vec<String> = Vec::new();

/// Returns a world with short presence intervals.
pub async fn quick() -> World {
    with_quick(World::new().await.with_postgres().await)
}

pub fn with_quick(mut world: World) -> World {
    for (name, value) in [("LEASE_MS", "3000"), ("HEARTBEAT_MS", "500"), ("LINGER_MS", "500")] {
        world.set(&format!("POSTRIDER_MESSAGES__PRESENCE__{name}"), value);
    }
    world
}

pub async fn ask(app: &App, receiver: &str) -> Value {
    app.get(&format!("/api/v1/presence/{receiver}")).await.expect(200).json()
}

/// Waits until a process reports this many connections of a receiver; `disconnected` if there are
/// none.
pub async fn await_connections(app: &App, receiver: &str, connections: u64) -> Value {
    let what = format!("{receiver} has {connections} connections at {}", app.api);
    until(&what, seconds(20), || async {
        let answer = app.get(&format!("/api/v1/presence/{receiver}")).await;
        let found = if answer.status == 200 { answer.json() } else { return None };
        let state = if connections > 0 { "connected" } else { "disconnected" };
        (found["connections"] == connections && found["state"] == state).then_some(found)
    })
    .await
}

/// Waits until presence in Redis was compared with its topic. Before that, new connections are not
/// announced.
pub async fn settled(world: &World) {
    let redis = world.redis_url.clone();
    until("presence was compared with its topic", seconds(20), || async {
        let heads: Vec<String> = redis::run(&redis, &["KEYS", &format!("{}:presence:*:head", world.prefix)]).await;
        for head in &heads {
            let times: [Option<String>; 2] = redis::run(&redis, &["HMGET", head, "born", "reconciled"]).await;
            if times[0].is_none() || times[0] != times[1] {
                return None;
            }
        }
        (heads.len() == 16).then_some(())
    })
    .await;
}

/// Waits until the topic ends with exactly these receivers connected.
pub async fn await_changes(world: &World, connected: &[&str]) {
    let mut last = NONE;
    let begun = Instant::now();
    while begun.elapsed() < seconds(20) {
        last = faults(&changes(world).await, connected);
        if last.is_empty() {
            return;
        }
    }
    panic!("{last:?}");
}

#[tokio::test]
async fn a_receiver_is_connected_while_it_has_a_connection_anywhere() {
    let world = quick().await;
    let start = || world.app().role("api").start();
    let (one, two) = (start().await, start().await);
    let never = until("presence is complete", seconds(10), || async {
        let answer = two.get("/api/v1/presence/r").await;
        (answer.status == 200).then(|| answer.json())
    });
    let disconnected = json!({"receiverId": "r", "receiver_id": "r", "state": "disconnected", "connections": 0, "since": null, "lastSeen": null, "last_seen": null});
    assert_eq!(never.await, disconnected);

    settled(&world).await;
    let first = Socket::plain(&one.api, "r").await;
    // The process that holds the connection reports it at once; others follow soon.
    let found = ask(&one, "r").await;
    assert_eq!(
        (&found["state"], &found["connections"], &found["last_seen"]),
        (&json!("connected"), &json!(1), &json!(null))
    );
    let since = found["since"].as_str().unwrap().to_owned();
    assert_eq!(await_connections(&two, "r", 1).await, found);
    let second = Socket::cursors(&one.api, "r", "").await;
    let third = Stream::open(&two, "/api/v1/messages/stream?receiverId=r", "").await;
    assert_eq!(await_connections(&one, "r", 3).await["since"], *since);
    first.leave().await;
    drop(second);
    await_connections(&one, "r", 1).await;
    assert_eq!(states(&changes(&world).await, "r"), [true]);
    drop(third);
    let found = await_connections(&one, "r", 0).await;
    assert_eq!(found["since"], json!(null));
    assert!(found["last_seen"].as_str().unwrap() > &*since, "{found}");
    await_changes(&world, &[]).await;
    assert_eq!(states(&changes(&world).await, "r"), [true, false]);
    let again = Socket::plain(&two.api, "r").await;
    await_changes(&world, &["r"]).await;
    assert_eq!(states(&changes(&world).await, "r"), [true, false, true]);
    drop(again);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_receiver_that_reconnects_within_the_linger_stays_connected() {
    let mut world = quick().await;
    world.set("POSTRIDER_MESSAGES__PRESENCE__LINGER_MS", "3000");
    let start = || world.app().role("api").start();
    let (one, two) = (start().await, start().await);
    let mut socket = Socket::plain(&one.api, "r").await;
    let since = await_connections(&two, "r", 1).await["since"].clone();
    for turn in 0..6 {
        socket.leave().await;
        let found = until("no connection is left", seconds(2), || async {
            Some(ask(&one, "r").await).filter(|found| found["connections"] == 0)
        })
        .await;
        assert_eq!((&found["state"], &found["since"]), (&json!("connected"), &since));
        socket = Socket::plain(if turn % 2 == 0 { &two.api } else { &one.api }, "r").await;
    }
    assert_eq!(await_connections(&one, "r", 1).await["since"], since);
    // A process that stops hands over its receivers.
    let other = Socket::plain(&two.api, "q").await;
    await_connections(&one, "q", 1).await;
    two.stop().await;
    let other_again = Socket::plain(&one.api, "q").await;
    until("the other process's entries are taken over", seconds(10), || async {
        (one.metric("postrider_presence_takeovers_total").await == Some(1.0)).then_some(())
    })
    .await;
    assert_eq!(await_connections(&one, "q", 1).await["connections"], 1);
    await_changes(&world, &["q", "r"]).await;
    assert_eq!(states(&changes(&world).await, "r"), [true]);
    assert_eq!(states(&changes(&world).await, "q"), [true]);
    drop((socket, other, other_again));
    one.stop().await;
}

#[tokio::test]
async fn a_drained_process_leaves_no_connected_receivers_and_the_last_one_publishes_its_own_changes() {
    let world = quick().await;
    let start = || world.app().role("api").start();
    let (one, two) = (start().await, start().await);
    settled(&world).await;
    let sockets =
        [Socket::plain(&one.api, "a").await, Socket::plain(&one.api, "b").await, Socket::plain(&two.api, "b").await];
    let stream = Stream::open(&one, "/api/v1/messages/stream?receiverId=s", "").await;
    for (receiver, count) in [("a", 1), ("b", 2), ("s", 1)] {
        await_connections(&two, receiver, count).await;
    }
    one.stop().await;
    for (receiver, count) in [("a", 0), ("b", 1), ("s", 0)] {
        await_connections(&two, receiver, count).await;
    }
    await_changes(&world, &["b"]).await;
    two.stop().await;
    // No process is left to publish changes later.
    assert_eq!(faults(&changes(&world).await, &[]), NONE);
    let left: Vec<String> =
        redis::run(&world.redis_url, &["ZRANGE", &format!("{}:presence:processes", world.prefix), "0", "-1"]).await;
    assert_eq!(left, NONE);
    drop((sockets, stream));
}

#[tokio::test]
async fn an_unsent_event_is_sent_by_a_running_process_as_an_identical_duplicate() {
    let world = quick().await;
    let app = world.app().role("api").start().await;
    let socket = Socket::plain(&app.api, "r").await;
    await_changes(&world, &["r"]).await;
    let sent = changes(&world).await;
    // As if a process had died between Redis and Kafka, or after Kafka and before it could record
    // that.
    let key = format!("{}:presence:{{b{}}}:due", world.prefix, postrider_kafka::partition_of(b"r", 16));
    let version = sent[0].version;
    let (field, due) = (format!("{version} r"), format!("{version} connected {version} 1 r"));
    let _: i64 = redis::run(&world.redis_url, &["HSET", &key, &field, &due]).await;
    until("the event is sent again", seconds(10), || async { (changes(&world).await.len() > 1).then_some(()) }).await;
    until("the event is no longer due", seconds(10), || async {
        (redis::run::<i64>(&world.redis_url, &["HLEN", &key]).await == 0).then_some(())
    })
    .await;
    assert_eq!(changes(&world).await[1], sent[0]);
    drop(socket);
    app.stop().await;
}

#[tokio::test]
async fn invalid_receivers_are_refused_and_any_other_is_answered() {
    let world = quick().await;
    let app = world.app().role("api").start().await;
    let strange = "a/b {c}%\u{e9}";
    let path: String = strange.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let socket = Socket::try_open(&app.api, &format!("?receiverId={path}"), &[]).await.unwrap();
    assert_eq!(ask(&app, &path).await["receiver_id"], strange);
    await_changes(&world, &[strange]).await;
    app.get("/api/v1/presence/a%00").await.problem(400, "invalid_request");
    app.get("/api/v1/presence/%FF").await.problem(400, "invalid_request");
    app.get(&format!("/api/v1/presence/{}", "x".repeat(256))).await.problem(422, "invalid_field");
    app.get("/api/v1/presence/").await.problem(404, "not_found");
    let record = json!({"topic": world.topic("presence"), "payload": {}});
    app.post_json("/produce", &record).await.problem(403, "topic_forbidden");
    drop(socket);
    let off = world.app().role("api").env("POSTRIDER_MESSAGES__PRESENCE__ENABLED", "false").start().await;
    off.get("/api/v1/presence/r").await.problem(404, "not_found");
    off.post_json("/produce", &record).await.problem(403, "topic_forbidden");
    let socket = Socket::plain(&off.api, "quiet").await;
    assert_eq!(await_connections(&app, "quiet", 0).await["last_seen"], json!(null));
    drop(socket);
    app.stop().await;
    off.stop().await;
}

#[tokio::test]
async fn one_address_cannot_take_all_connections_whatever_x_forwarded_for_says() {
    let mut world = quick().await;
    world.set("POSTRIDER_MESSAGES__MAX_CONNECTIONS_PER_ADDRESS", "2");
    let direct = world.app().role("api").start().await;
    let behind = world.app().role("api").env("POSTRIDER_HTTP__TRUSTED_PROXIES", "10.0.0.0/8,127.0.0.0/8").start().await;
    // Without a trusted proxy, the header is ignored.
    let open = async |app: &App, number: usize, forwarded: &str| {
        Socket::try_open(&app.api, &format!("?receiverId=r{number}"), &[("X-Forwarded-For", forwarded)]).await
    };
    let mut sockets =
        vec![open(&direct, 0, "203.0.113.1").await.unwrap(), open(&direct, 1, "203.0.113.2").await.unwrap()];
    let (status, problem) = refused(open(&direct, 2, "203.0.113.3").await);
    assert_eq!((status, &problem["code"]), (429, &json!("too_many_connections")));
    direct.get("/api/v1/messages/stream?receiverId=r3").await.problem(429, "too_many_connections");
    // Behind a trusted proxy, the client's own entries stand before the one that the proxy
    // appended.
    sockets.push(open(&behind, 0, "203.0.113.1").await.unwrap());
    sockets.push(open(&behind, 1, "198.51.100.7, 203.0.113.1").await.unwrap());
    let (status, _) = refused(open(&behind, 2, "198.51.100.8, 203.0.113.1").await);
    assert_eq!(status, 429);
    sockets.push(open(&behind, 3, "203.0.113.2").await.unwrap());
    for (number, host) in ["1", "2"].iter().enumerate() {
        sockets.push(open(&behind, 4 + number, &format!("2001:db8:0:1::{host}")).await.unwrap());
    }
    assert_eq!(
        refused(open(&behind, 6, "2001:db8:0:1:ffff::9").await).0,
        429,
        "addresses of one /64 are counted separately"
    );
    sockets.push(open(&behind, 7, "2001:db8:0:2::1").await.unwrap());
    // A closed connection no longer counts.
    sockets.drain(..1);
    until("a connection is accepted", Duration::from_secs(5), || async { open(&direct, 9, "x").await.ok() }).await;
    drop(sockets);
    direct.stop().await;
    behind.stop().await;
}
