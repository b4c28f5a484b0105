//! Events of posts and follows as consumers of the topic read them, in the formats of this version
//! and of earlier ones.

use serde_json::json;

use crate::{
    feed_writes::follow,
    harness::{
        World,
        kafka::Stored,
        produce::{Write, keyed, produce},
        until,
        wait::seconds,
    },
    outbox_quarantine::quarantine,
};

/// Returns the event with its UUID in the value, as an earlier version wrote it.
fn earlier(record: &Stored) -> Write {
    let mut value = record.json();
    value["event_id"] = json!(record.header("ce_id").unwrap());
    Write { value: Some(value.to_string().into_bytes()), ..unchanged(record) }
}

fn unchanged(record: &Stored) -> Write {
    let headers = [("ce_id", record.header("ce_id").unwrap().to_owned())];
    Write {
        partition: Some(record.partition),
        key: record.key.clone(),
        value: record.value.clone(),
        headers: headers.into(),
        timestamp_ms: None,
    }
}

#[tokio::test]
async fn an_event_counts_once_in_whichever_formats_it_arrives() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    for follower in ["bob", "cid", "dan", "eve"] {
        follow(&app, follower, "ann").await;
    }
    let log = world.kafka.read_at_least(&world.topic("post-events"), 4).await;
    app.stop().await;
    // A new installation receives each event in several formats, in one batch and in several.
    let world = World::new().await.with_postgres().await;
    let bare = |record: &Stored| Write { headers: Vec::new(), ..unchanged(record) };
    let formats: [[Write; 3]; 4] = [
        [earlier(&log[0]), unchanged(&log[0]), bare(&log[0])],
        [unchanged(&log[1]), earlier(&log[1]), bare(&log[1])],
        [bare(&log[2]), earlier(&log[2]), unchanged(&log[2])],
        [unchanged(&log[3]), earlier(&log[3]), unchanged(&log[3])],
    ];
    // An earlier version has already recorded the last event.
    let recorded = log[3].header("ce_id").unwrap();
    world.sql(&format!("INSERT INTO processed_events (event_id) VALUES ('{recorded}')")).await;
    let processor = world.app().role("processor").start().await;
    let topic = world.topic("post-events");
    let produced = |records: Vec<Write>| produce(&world.kafka.brokers, &topic, records);
    let events = |count: f64| {
        let processor = &processor;
        async move {
            until(&format!("{count} events are processed"), seconds(30), || async {
                (processor.metric("postrider_feed_events_total").await? >= count).then_some(())
            })
            .await;
        }
    };
    let followers = "SELECT coalesce(sum(followers), 0)::bigint FROM feed_authors WHERE author_id = 'ann'";
    produced(formats.iter().map(|records| records[0].clone()).collect()).await;
    events(4.0).await;
    assert_eq!(world.number(followers).await, 3, "all events count but the recorded one");
    produced(formats.iter().flat_map(|records| records[1..].to_vec()).collect()).await;
    events(12.0).await;
    produced(formats.iter().flatten().cloned().collect()).await;
    events(24.0).await;
    assert_eq!(world.number(followers).await, 3);
    assert_eq!(world.kafka.read(&world.topic("dead-letter-events")).await, []);
    processor.stop().await;
}

#[tokio::test]
async fn records_whose_event_id_is_neither_a_number_nor_a_uuid_are_dead_lettered() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let topic = world.topic("post-events");
    let bad = ["0", "-1", "1.5", "9223372036854775808", "\"7\"", "\"\"", "null", "true", "[1]"];
    let record = |id: &str| {
        let value = format!(
            r#"{{"event_id":{id},"type":"USER_FOLLOWED","actor_id":"bob","payload":{{"followee_id":"ann"}},"timestamp":1}}"#
        );
        Write { partition: Some(0), ..keyed("ann", value) }
    };
    let good = ["9223372036854775807", "1", "\"0195e6d2-7c00-7a3f-8a51-6f1d2c3b4a59\""];
    produce(&world.kafka.brokers, &topic, bad.iter().chain(&good).map(|id| record(id)).collect()).await;
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), bad.len()).await;
    assert_eq!(letters.len(), bad.len());
    for letter in &letters {
        assert!(letter.header("error").unwrap().contains("event_id"), "{letter:?}");
    }
    until("all valid events are counted", seconds(20), || async {
        (world.number("SELECT coalesce(sum(followers), 0)::bigint FROM feed_authors").await == 3).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn outbox_rows_of_an_earlier_version_are_sent_with_a_number_as_event_id() {
    let world = World::new().await.with_postgres().await;
    let id = "0195e6d2-7c00-7a3f-8a51-6f1d2c3b4a59";
    let rust = format!(
        r#"{{"event_id":"{id}","type":"USER_FOLLOWED","actor_id":"bob","payload":{{"followee_id":"ann"}},"timestamp":1}}"#
    );
    let postgres = format!(
        r#"{{"type": "POST_DELETED", "payload": {{"post_id": 5}}, "actor_id": "ann", "event_id": "{id}", "timestamp": 1}}"#
    );
    for value in [&rust, &postgres] {
        world
            .sql(&format!(
                "INSERT INTO outbox (topic, key, event_id, kind, source, value)
                 VALUES ('post-events', 'ann', '{id}', 'test', '/test', '{value}');
                 INSERT INTO outbox_quarantine (id, topic, key, event_id, kind, source, value, created_at, reason)
                 VALUES (nextval('outbox_ids'), 'post-events', 'cid', '{id}', 'test', '/test', '{value}', now(), 'test')"
            ))
            .await;
    }
    let relay = world.app().role("relay").start().await;
    let released = quarantine(&world, &["release", "--key", "cid"]).await.unwrap();
    assert_eq!(released["rows"], 2);
    let log = world.kafka.read_at_least(&world.topic("post-events"), 4).await;
    let number = format!("{}", 2_810_684_355_343_029_551_i64);
    for record in &log {
        assert_eq!(record.header("ce_id"), Some(id));
        let quoted = format!("\"{id}\"");
        assert!(
            [&rust, &postgres].iter().any(|earlier| earlier.replace(&quoted, &number) == record.text()),
            "{record:?}"
        );
    }
    assert_eq!(log.len(), 4);
    relay.stop().await;
}
