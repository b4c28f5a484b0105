//! What others are told of messages that nobody has got in time.

use std::collections::{BTreeMap, BTreeSet};

use postrider::platform::{clock, kafka::partition_of};
use serde_json::{Value, json};
use sqlx::Executor;

use crate::{
    harness::{App, World, app::Builder, inbox::message, kafka::Stored, socket::Socket, until, wait::seconds},
    messages::{send, stored},
    messages_unread::counted,
};

const OWNER: &str = "postrider_messages_undelivered_owner";
const TOLD: &str = "postrider_messages_undelivered_total";
/// How many partitions were not looked through to their ends.
const LEFT: &str = "SELECT count(*) FROM messages_progress AS progress LEFT JOIN message_undelivered AS place
    USING (topic_epoch, partition) WHERE place.next IS DISTINCT FROM progress.next";

/// A process that waits for this long.
fn after(world: &World, role: &'static str, delay_ms: u64) -> Builder {
    world.app().role(role).env("POSTRIDER_MESSAGES__UNDELIVERED_AFTER_MS", &delay_ms.to_string())
}

/// All that others were told, once everything was looked through.
async fn told(world: &World) -> Vec<Stored> {
    until("all is looked through", seconds(60), || async { (world.number(LEFT).await == 0).then_some(()) }).await;
    world.kafka.read(&world.topic("message-events")).await
}

/// What each of them tells of, with the ids under which it is told.
fn ids(events: &[Stored]) -> BTreeMap<String, BTreeSet<String>> {
    let mut ids: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for event in events {
        let id = event.header("ce_id").unwrap().to_owned();
        ids.entry(event.json()["data"].to_string()).or_default().insert(id);
    }
    ids
}

/// Waits until one of them looks for messages; which.
async fn owner(apps: &[App]) -> usize {
    until("somebody looks for messages", seconds(30), || async {
        for (number, app) in apps.iter().enumerate() {
            if app.metric(OWNER).await == Some(1.0) {
                return Some(number);
            }
        }
        None
    })
    .await
}

#[tokio::test]
async fn what_nobody_got_in_time_is_told_once_and_what_arrived_is_not() {
    let world = World::new().await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let processors = [after(&world, "processor", 8_000).start().await, after(&world, "processor", 8_000).start().await];
    let (plain, mut cursors) = (Socket::plain(&api.api, "plain").await, Socket::cursors(&api.api, "cursors", "").await);
    for number in 0..10 {
        for receiver in ["plain", "cursors", "http", "away"] {
            send(&api, &message(receiver, "s", number)).await;
        }
    }
    plain.frames(10).await;
    let seen = cursors.frames(10).await;
    // The first ones only.
    cursors.say(&json!({"ack": seen.json()[6]["id"]}).to_string()).await;
    stored(&api, "http", 10).await;
    let last = api.get("/api/v1/messages/unread?receiverId=http").await.json()["last"].clone();
    api.post_json("/api/v1/messages/ack", &json!({"receiverId": "http", "ack": last})).await.expect(200);
    let events = told(&world).await;
    let expected: BTreeSet<String> = (0..10)
        .map(|number| message("away", "s", number))
        .chain((7..10).map(|number| message("cursors", "s", number)))
        .map(|message| message.to_string())
        .collect();
    let ids = ids(&events);
    assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(events.len(), 13, "one each");
    let page = api.get("/api/v1/messages?receiverId=away").await.json();
    for (number, event) in events.iter().filter(|event| event.key() == "away").enumerate() {
        let (value, listed) = (event.json(), &page["messages"][number]);
        assert_eq!(event.header("ce_type"), Some("postrider.message.undelivered"));
        let told = (&value["type"], &value["receiver_id"], &value["cursor"], &value["created_at"], &value["data"]);
        let kind = (json!("message.undelivered"), json!("away"));
        assert_eq!(told, (&kind.0, &kind.1, &listed["id"], &listed["created_at"], &listed["data"]));
        let origin = world.kafka.read(&world.topic("message")).await;
        let origin = origin
            .iter()
            .find(|record| value["partition"] == record.partition && value["offset"] == record.offset)
            .unwrap();
        assert_eq!((origin.json(), origin.header("ce_id")), (value["data"].clone(), value["event_id"].as_str()));
        let stored_ms = clock::parse_rfc3339(value["stored_at"].as_str().unwrap()).unwrap();
        assert!(event.timestamp_ms - stored_ms >= 8_000, "too early: {event:?}");
    }
    let counted = [processors[0].metric(TOLD).await, processors[1].metric(TOLD).await];
    assert_eq!(counted.iter().flatten().sum::<f64>(), 13.0);
    // Nothing is left to be told of, and nothing is told again.
    send(&api, &message("away", "s", 10)).await;
    until("the next one is told", seconds(30), || async { (told(&world).await.len() == 14).then_some(()) }).await;
    let marks = world.number("SELECT count(*) FROM message_marks").await;
    assert!(marks <= 2, "{marks} marks are kept for two partitions");
    for app in processors.into_iter().chain([api]) {
        app.stop().await;
    }
}

#[tokio::test]
async fn when_processors_are_killed_others_go_on_and_nothing_is_left_out_or_told_under_two_ids() {
    let world = World::new().await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let mut processors =
        vec![after(&world, "processor", 1_000).start().await, after(&world, "processor", 1_000).start().await];
    // Confirmed by its pongs all the time, and what it got late is told of at most once as well.
    let here = Socket::plain(&api.api, "here").await;
    let mut sent = BTreeSet::new();
    let topic = world.topic("message-events");
    for round in 0..3 {
        for number in 0..120 {
            let message = message(&format!("away{}", number % 7), &format!("s{round}"), number);
            send(&api, &message).await;
            sent.insert(message.to_string());
        }
        send(&api, &message("here", "s", round)).await;
        let before = if round == 0 { 0 } else { world.kafka.read(&topic).await.len() };
        until("some are told", seconds(60), || async { (world.kafka.read(&topic).await.len() > before).then_some(()) })
            .await;
        let killed = owner(&processors).await;
        processors.swap_remove(killed).kill().await;
        // The other one alone, at first.
        assert_eq!(owner(&processors).await, 0);
        processors.push(after(&world, "processor", 1_000).start().await);
    }
    here.frames(3).await;
    stored(&api, "here", 3).await;
    until("all is stored", seconds(60), || async {
        (world.number("SELECT count(*) FROM message_ids").await == 363).then_some(())
    })
    .await;
    let mut ids = ids(&told(&world).await);
    ids.retain(|message, _| !message.contains("here"));
    assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), sent);
    assert!(ids.values().all(|ids| ids.len() == 1), "{ids:?}");
    for app in processors.into_iter().chain([api]) {
        app.stop().await;
    }
}

#[tokio::test]
async fn what_is_committed_late_is_not_left_out() {
    let world = World::new().await.with_postgres().await;
    let app = after(&world, "all", 1_000).start().await;
    let in_partition = |partition| {
        let mut names = (0..).map(|number| format!("r{number}"));
        names.find(|name| partition_of(name.as_bytes(), 2) == partition).unwrap()
    };
    let (slow, other) = (in_partition(0), in_partition(1));
    send(&app, &message(&slow, "s", 0)).await;
    until("the first is told", seconds(30), || async { (told(&world).await.len() == 1).then_some(()) }).await;
    // The statement that stores the next one waits, with the time at which it began.
    let mut holder = world.connect().await.unwrap();
    holder.execute("BEGIN; SELECT FROM message_receivers FOR UPDATE").await.unwrap();
    send(&app, &message(&slow, "s", 1)).await;
    let waits =
        "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation JOIN pg_locks AS wanted USING (pid)
        WHERE NOT wanted.granted AND relnamespace = current_schema()::regnamespace AND relname = 'message_receivers'";
    until("it waits", seconds(10), || async { (world.number(waits).await > 0).then_some(()) }).await;
    // Meanwhile time goes on elsewhere.
    send(&app, &message(&other, "s", 0)).await;
    until("the other partition's is told", seconds(30), || async {
        (world.kafka.read(&world.topic("message-events")).await.len() == 2).then_some(())
    })
    .await;
    holder.execute("COMMIT").await.unwrap();
    stored(&app, &slow, 2).await;
    let late = message(&slow, "s", 1);
    until("the late one is told", seconds(30), || async {
        told(&world).await.iter().any(|event| event.json()["data"] == late).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn turned_off_it_makes_no_topic_and_turned_on_it_begins_with_what_comes() {
    let world = World::new().await.with_postgres().await;
    let app = after(&world, "all", 0).start().await;
    send(&app, &message("r", "s", 0)).await;
    stored(&app, "r", 1).await;
    // Ours, whether it is there or not.
    let foreign = json!({"topic": world.topic("message-events"), "payload": 1});
    app.post_json("/produce", &foreign).await.problem(403, "topic_forbidden");
    assert!(world.kafka.partitions(&world.topic("message-events")).await.is_none());
    app.stop().await;
    // It may not have looked since the message was stored.
    world.sql("DELETE FROM message_marks").await;
    let app = after(&world, "all", 1_000).start().await;
    owner(std::slice::from_ref(&app)).await;
    until("it has begun", seconds(30), || async { (world.number(LEFT).await == 0).then_some(()) }).await;
    send(&app, &message("r", "s", 1)).await;
    stored(&app, "r", 2).await;
    let events = told(&world).await;
    assert_eq!(events.iter().map(|event| event.json()["data"].clone()).collect::<Vec<_>>(), [message("r", "s", 1)]);
    app.stop().await;
}

#[tokio::test]
async fn what_is_too_large_is_told_without_its_content_and_what_is_past_its_time_not_at_all() {
    let world = World::new().await.with_postgres().await;
    world.kafka.create_with(&world.topic("message-events"), 2, &[("max.message.bytes", "2000")]).await;
    let app = after(&world, "all", 1_000).start().await;
    let mut large = message("r", "s", 1);
    // Noise, because what is compressed may be small enough.
    let noise: String = (0..4_000).map(|_| char::from(b'a' + fastrand::u8(0..26))).collect();
    large["noise"] = json!(noise);
    send(&app, &large).await;
    send(&app, &message("r", "s", 2)).await;
    stored(&app, "r", 2).await;
    let events =
        until("both are told", seconds(30), || async { Some(told(&world).await).filter(|told| told.len() == 2) });
    let mut data: Vec<Value> = events.await.iter().map(|event| event.json()["data"].clone()).collect();
    data.sort_by_key(Value::is_null);
    assert_eq!(data, [message("r", "s", 2), Value::Null]);
    app.stop().await;
    // As after a month without this process.
    world.sql("UPDATE message_undelivered SET next = 0; DELETE FROM message_marks; DELETE FROM messages").await;
    let app = after(&world, "all", 1_000).start().await;
    app.await_log("skipping messages past their retention", seconds(30)).await;
    send(&app, &message("r", "s", 3)).await;
    until("the next one is told", seconds(30), || async { (told(&world).await.len() == 3).then_some(()) }).await;
    app.stop().await;
}

#[tokio::test]
async fn a_second_is_looked_through_without_reading_whole_tables() {
    let mut world = World::new().await.with_postgres().await;
    // The bound is measured by reading all of a small table.
    world.set("POSTRIDER_MESSAGES__MAX_RECEIVERS", "0");
    let app = after(&world, "all", 1_000).start().await;
    app.await_log("created a day's partition of messages", seconds(20)).await;
    world
        .sql(
            r#"INSERT INTO messages (receiver_id, topic_epoch, partition, "offset", prev, event_id, value, created_at, stored_at)
               SELECT 'x' || n, 7, 0, n, n - 1, gen_random_uuid(), '{}', now(), now() - interval '1 hour' FROM generate_series(1, 60000) AS n;
               INSERT INTO message_ids SELECT event_id, receiver_id, stored_at FROM messages;
               INSERT INTO message_receivers SELECT receiver_id, 7, 0, "offset" FROM messages;
               INSERT INTO message_cursors SELECT receiver_id, 7, 0, last FROM message_receivers;
               ANALYZE messages, message_ids, message_receivers, message_cursors"#,
        )
        .await;
    let of = |what: &str, tables: &str| {
        format!(
            "SELECT sum({what})::bigint FROM pg_stat_user_tables WHERE schemaname = current_schema() AND relname SIMILAR TO '{tables}'"
        )
    };
    let scans = of("seq_tup_read", "message_(ids|receivers|cursors)|messages_d[0-9]+");
    let (scans_before, looks) = (counted(&world, &scans, 60_000).await, of("idx_scan", "message_ids"));
    for number in 0..8 {
        let looks_before = world.number(&looks).await;
        send(&app, &message("r", "s", number)).await;
        until("it is told", seconds(30), || async { (told(&world).await.len() > number).then_some(()) }).await;
        counted(&world, &looks, looks_before + 1).await;
    }
    // A whole table would be 60,000 rows. The partition of a day that has just begun has a few, and is read as it is.
    let scanned = world.number(&scans).await - scans_before;
    assert!(scanned < 10_000, "{scanned} rows were read");
    app.stop().await;
}
