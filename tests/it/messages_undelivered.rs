//! `message.undelivered` events, published for messages that were not acknowledged in time.

use std::collections::{BTreeMap, BTreeSet};

use postrider_kafka::partition_of;
use postrider_time::clock;
use serde_json::{Value, json};
use sqlx::Executor;

use crate::{
    harness::{App, World, app::Builder, inbox::message, kafka::Stored, socket::Socket, until, wait::seconds},
    messages::{send, stored},
    messages_unread::counted,
};

const OWNER: &str = "postrider_messages_undelivered_owner";
const PUBLISHED: &str = "postrider_messages_undelivered_total";
/// Counts the partitions that were not scanned to their ends.
const UNSCANNED: &str = "SELECT count(*) FROM projection_progress AS progress LEFT JOIN message_undelivered AS place
    USING (topic_epoch, partition) WHERE projection = 'messages' AND place.next IS DISTINCT FROM progress.next";

/// A process that reports messages as undelivered after this delay.
fn after(world: &World, role: &'static str, delay_ms: u64) -> Builder {
    world.app().role(role).env("POSTRIDER_MESSAGES__UNDELIVERED_AFTER_MS", &delay_ms.to_string())
}

/// Returns all published events, once every partition was scanned to its end.
async fn published(world: &World) -> Vec<Stored> {
    until("all partitions are scanned", seconds(60), || async { (world.number(UNSCANNED).await == 0).then_some(()) })
        .await;
    world.kafka.read(&world.topic("message-events")).await
}

/// Returns the messages that the events report, each with the ids of its events.
fn ids(events: &[Stored]) -> BTreeMap<String, BTreeSet<String>> {
    let mut ids: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for event in events {
        let id = event.header("ce_id").unwrap().to_owned();
        ids.entry(event.json()["data"].to_string()).or_default().insert(id);
    }
    ids
}

/// Waits until one process scans for undelivered messages, and returns its index.
async fn owner(apps: &[App]) -> usize {
    until("a process scans for messages", seconds(30), || async {
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
async fn an_undelivered_message_is_reported_once_and_a_delivered_one_never() {
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
    // Acknowledges the first seven only.
    cursors.say(&json!({"ack": seen.json()[6]["id"]}).to_string()).await;
    stored(&api, "http", 10).await;
    let last = api.get("/api/v1/messages/unread?receiverId=http").await.json()["last"].clone();
    api.post_json("/api/v1/messages/ack", &json!({"receiverId": "http", "ack": last})).await.expect(200);
    let events = published(&world).await;
    let expected: BTreeSet<String> = (0..10)
        .map(|number| message("away", "s", number))
        .chain((7..10).map(|number| message("cursors", "s", number)))
        .map(|message| message.to_string())
        .collect();
    let ids = ids(&events);
    assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(events.len(), 13, "one event for each message");
    let page = api.get("/api/v1/messages?receiverId=away").await.json();
    for (number, event) in events.iter().filter(|event| event.key() == "away").enumerate() {
        let (value, listed) = (event.json(), &page["messages"][number]);
        assert_eq!(event.header("ce_type"), Some("postrider.message.undelivered"));
        let fields = (&value["type"], &value["receiver_id"], &value["cursor"], &value["created_at"], &value["data"]);
        let kind = (json!("message.undelivered"), json!("away"));
        assert_eq!(fields, (&kind.0, &kind.1, &listed["id"], &listed["created_at"], &listed["data"]));
        let origin = world.kafka.read(&world.topic("message")).await;
        let origin = origin
            .iter()
            .find(|record| value["partition"] == record.partition && value["offset"] == record.offset)
            .unwrap();
        assert_eq!((origin.json(), origin.header("ce_id")), (value["data"].clone(), value["event_id"].as_str()));
        let stored_ms = clock::parse_rfc3339(value["stored_at"].as_str().unwrap()).unwrap();
        assert!(event.timestamp_ms - stored_ms >= 8_000, "too early: {event:?}");
    }
    let counted = [processors[0].metric(PUBLISHED).await, processors[1].metric(PUBLISHED).await];
    assert_eq!(counted.iter().flatten().sum::<f64>(), 13.0);
    // No message is left to report, and none is reported again.
    send(&api, &message("away", "s", 10)).await;
    until("the next message is reported", seconds(30), || async {
        (published(&world).await.len() == 14).then_some(())
    })
    .await;
    let marks = world.number("SELECT count(*) FROM message_marks").await;
    assert!(marks <= 2, "{marks} marks are kept for two partitions");
    for app in processors.into_iter().chain([api]) {
        app.stop().await;
    }
}

#[tokio::test]
async fn when_processors_are_killed_others_take_over_and_report_each_message_under_one_id() {
    let world = World::new().await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let mut processors =
        vec![after(&world, "processor", 1_000).start().await, after(&world, "processor", 1_000).start().await];
    // This client acknowledges with its pongs. A message that it got late is reported at most once.
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
        until("some messages are reported", seconds(60), || async {
            (world.kafka.read(&topic).await.len() > before).then_some(())
        })
        .await;
        let killed = owner(&processors).await;
        processors.swap_remove(killed).kill().await;
        // At first, the other processor is alone.
        assert_eq!(owner(&processors).await, 0);
        processors.push(after(&world, "processor", 1_000).start().await);
    }
    here.frames(3).await;
    stored(&api, "here", 3).await;
    until("all messages are stored", seconds(60), || async {
        (world.number("SELECT count(*) FROM message_ids").await == 363).then_some(())
    })
    .await;
    let mut ids = ids(&published(&world).await);
    ids.retain(|message, _| !message.contains("here"));
    assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), sent);
    assert!(ids.values().all(|ids| ids.len() == 1), "{ids:?}");
    for app in processors.into_iter().chain([api]) {
        app.stop().await;
    }
}

#[tokio::test]
async fn a_message_that_commits_late_is_reported() {
    let world = World::new().await.with_postgres().await;
    let app = after(&world, "all", 1_000).start().await;
    let in_partition = |partition| {
        let mut names = (0..).map(|number| format!("r{number}"));
        names.find(|name| partition_of(name.as_bytes(), 2) == partition).unwrap()
    };
    let (slow, other) = (in_partition(0), in_partition(1));
    send(&app, &message(&slow, "s", 0)).await;
    until("the first message is reported", seconds(30), || async {
        (published(&world).await.len() == 1).then_some(())
    })
    .await;
    // The statement that stores the next message waits for the lock, with the time at which it began.
    let mut holder = world.connect().await.unwrap();
    holder.execute("BEGIN; SELECT FROM message_receivers FOR UPDATE").await.unwrap();
    send(&app, &message(&slow, "s", 1)).await;
    let waits =
        "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation JOIN pg_locks AS wanted USING (pid)
        WHERE NOT wanted.granted AND relnamespace = current_schema()::regnamespace AND relname = 'message_receivers'";
    until("the statement waits", seconds(10), || async { (world.number(waits).await > 0).then_some(()) }).await;
    // Meanwhile the other partition advances.
    send(&app, &message(&other, "s", 0)).await;
    until("the other partition's message is reported", seconds(30), || async {
        (world.kafka.read(&world.topic("message-events")).await.len() == 2).then_some(())
    })
    .await;
    holder.execute("COMMIT").await.unwrap();
    stored(&app, &slow, 2).await;
    let late = message(&slow, "s", 1);
    until("the late message is reported", seconds(30), || async {
        published(&world).await.iter().any(|event| event.json()["data"] == late).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn turned_off_it_creates_no_topic_and_turned_on_it_reports_only_later_messages() {
    let world = World::new().await.with_postgres().await;
    let app = after(&world, "all", 0).start().await;
    send(&app, &message("r", "s", 0)).await;
    stored(&app, "r", 1).await;
    // The topic belongs to postrider whether it exists or not.
    let foreign = json!({"topic": world.topic("message-events"), "payload": 1});
    app.post_json("/produce", &foreign).await.problem(403, "topic_forbidden");
    assert!(world.kafka.partitions(&world.topic("message-events")).await.is_none());
    app.stop().await;
    // The process may not have scanned since the message was stored.
    world.sql("DELETE FROM message_marks").await;
    let app = after(&world, "all", 1_000).start().await;
    owner(std::slice::from_ref(&app)).await;
    until("the first scan is done", seconds(30), || async { (world.number(UNSCANNED).await == 0).then_some(()) }).await;
    send(&app, &message("r", "s", 1)).await;
    stored(&app, "r", 2).await;
    let events = published(&world).await;
    assert_eq!(events.iter().map(|event| event.json()["data"].clone()).collect::<Vec<_>>(), [message("r", "s", 1)]);
    app.stop().await;
}

#[tokio::test]
async fn an_oversized_message_is_reported_without_its_content_and_an_expired_one_not_at_all() {
    let world = World::new().await.with_postgres().await;
    world.kafka.create_with(&world.topic("message-events"), 2, &[("max.message.bytes", "2000")]).await;
    let app = after(&world, "all", 1_000).start().await;
    let mut large = message("r", "s", 1);
    // Random text: compressed repetitions could be below the limit.
    let noise: String = (0..4_000).map(|_| char::from(b'a' + fastrand::u8(0..26))).collect();
    large["noise"] = json!(noise);
    send(&app, &large).await;
    send(&app, &message("r", "s", 2)).await;
    stored(&app, "r", 2).await;
    let events = until("both are reported", seconds(30), || async {
        Some(published(&world).await).filter(|all| all.len() == 2)
    });
    let mut data: Vec<Value> = events.await.iter().map(|event| event.json()["data"].clone()).collect();
    data.sort_by_key(Value::is_null);
    assert_eq!(data, [message("r", "s", 2), Value::Null]);
    app.stop().await;
    // As after a month in which this process did not run.
    world.sql("UPDATE message_undelivered SET next = 0; DELETE FROM message_marks; DELETE FROM messages").await;
    let app = after(&world, "all", 1_000).start().await;
    app.await_log("skipping messages past their retention", seconds(30)).await;
    send(&app, &message("r", "s", 3)).await;
    until("the next message is reported", seconds(30), || async { (published(&world).await.len() == 3).then_some(()) })
        .await;
    app.stop().await;
}

#[tokio::test]
async fn a_scan_reads_no_whole_table() {
    let mut world = World::new().await.with_postgres().await;
    // To measure this limit, the process reads all of a small table.
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
    let (scans_before, lookups) = (counted(&world, &scans, 60_000).await, of("idx_scan", "message_ids"));
    for number in 0..8 {
        let lookups_before = world.number(&lookups).await;
        send(&app, &message("r", "s", number)).await;
        until("the message is reported", seconds(30), || async {
            (published(&world).await.len() > number).then_some(())
        })
        .await;
        counted(&world, &lookups, lookups_before + 1).await;
    }
    // A whole table would be 60,000 rows. The new day's partition has a few rows and is read sequentially.
    let scanned = world.number(&scans).await - scans_before;
    assert!(scanned < 10_000, "{scanned} rows were read");
    app.stop().await;
}
