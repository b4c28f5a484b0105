//! The key-value capability: push, pull, delete, TTL, positions and audit.

use std::collections::BTreeSet;

use futures_util::{StreamExt, stream};
use postrider_time::clock::now_ms;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Answer, App, World, kafka::latest, until, wait::seconds};

/// Pushes a value, and returns the position to wait for.
pub async fn push(app: &App, key: &str, value: &Value) -> String {
    let answer = app.post_json("/push", &json!({"key": key, "value": value})).await.expect(202);
    answer.header("postrider-position").to_owned()
}

/// Pulls a key from a view that has the write at this position. Waits while the view is being
/// built.
pub async fn pull_after(app: &App, key: &str, position: &str) -> Answer {
    let path = format!("/pull/{key}");
    until(&format!("{key} can be read after {position}"), seconds(20), || async {
        let answer = app.request(Method::GET, &path, &[("postrider-after", position)], "").await;
        (!matches!(answer.status, 503 | 504)).then_some(answer)
    })
    .await
}

/// Starts a process with all roles, and waits until its view is complete.
pub async fn running(world: &World) -> App {
    let app = world.app().start().await;
    await_complete(&app).await;
    app
}

/// Waits until a miss is answered 404 in every partition of the view.
pub async fn await_complete(app: &App) {
    // Keys on both partitions of a test's topic.
    for number in 0..8 {
        until("the view is complete", seconds(30), || async {
            (app.get(&format!("/pull/none{number}")).await.status == 404).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_pushed_value_is_accepted_stored_in_the_topic_and_pulled_back() {
    let world = World::new().await;
    let app = running(&world).await;
    let answer = app.post_json("/push", &json!({"key": "user123", "value": "Hello"})).await.expect(202);
    assert_eq!(answer.json(), json!({"status": "accepted"}));
    let position = answer.header("postrider-position").to_owned();
    let pulled = pull_after(&app, "user123", &position).await.expect(200);
    assert_eq!(pulled.text(), r#"{"key":"user123","value":"Hello"}"#);
    assert_eq!(pulled.header("content-type"), "application/json");
    let log = world.kafka.read(&world.topic("messages")).await;
    assert_eq!((log.len(), log[0].key(), log[0].text()), (1, "user123", r#""Hello""#));
    assert_eq!(position, format!("{}/{}@{}", world.topic("messages"), log[0].partition, log[0].offset));
    assert_eq!(log[0].header("ce_type"), Some("postrider.kv.pushed"));
    assert!(log[0].header("traceparent").is_some());
    app.stop().await;
}

#[tokio::test]
async fn values_of_any_json_type_and_keys_of_any_characters_come_back_as_written() {
    let world = World::new().await;
    let app = running(&world).await;
    let values = ["null", "true", "0", "-1.50e3", "\"\"", "\"\\u0000\"", "[]", "{\"b\":1,\"a\":[{}]}", "1e400"];
    for (number, value) in values.iter().enumerate() {
        let key = format!("type{number}");
        let answer = app.post("/push", format!(r#"{{"key":"{key}","value": {value} }}"#)).await.expect(202);
        let pulled = pull_after(&app, &key, answer.header("postrider-position")).await.expect(200);
        assert_eq!(pulled.text(), format!(r#"{{"key":"{key}","value":{value}}}"#));
    }
    for (key, path) in
        [("a/b ?#%", "a%2Fb%20%3F%23%25"), ("grüße 🎉", "gr%C3%BC%C3%9Fe%20%F0%9F%8E%89"), ("\"\n", "%22%0A")]
    {
        let position = push(&app, key, &json!(1)).await;
        let pulled = pull_after(&app, path, &position).await.expect(200);
        assert_eq!(pulled.json(), json!({"key": key, "value": 1}));
    }
    let large = "x".repeat(900_000);
    let position = push(&app, "large", &json!(large)).await;
    assert_eq!(pull_after(&app, "large", &position).await.expect(200).json()["value"], large);
}

#[tokio::test]
async fn a_deleted_key_is_404_has_a_tombstone_and_can_be_pushed_again() {
    let world = World::new().await;
    let app = running(&world).await;
    push(&app, "k", &json!(1)).await;
    let answer = app.request(Method::DELETE, "/pull/k", &[], "").await.expect(202);
    assert_eq!(answer.json(), json!({"status": "accepted"}));
    pull_after(&app, "k", answer.header("postrider-position")).await.problem(404, "key_not_found");
    let log = world.kafka.read(&world.topic("messages")).await;
    assert_eq!(log.last().unwrap().value, None);
    let position = push(&app, "k", &json!(2)).await;
    assert_eq!(pull_after(&app, "k", &position).await.json()["value"], 2);
}

#[tokio::test]
async fn invalid_requests_are_rejected_and_not_stored() {
    let world = World::new().await;
    let app = running(&world).await;
    for (body, status, code) in [
        (json!({"key": "", "value": 1}), 400, "invalid_request"),
        (json!({"value": 1}), 400, "invalid_request"),
        (json!({"key": "k"}), 400, "invalid_request"),
        (json!({"key": 1, "value": 1}), 400, "invalid_request"),
        (json!({"key": "k", "value": 1, "ttl_seconds": 0}), 422, "invalid_field"),
        (json!({"key": "k", "value": 1, "ttl_seconds": -1}), 422, "invalid_field"),
        (json!({"key": "k", "value": 1, "ttl_seconds": "5"}), 400, "invalid_request"),
        (json!({"key": "x".repeat(40_000), "value": 1}), 422, "invalid_field"),
    ] {
        app.post_json("/push", &body).await.problem(status, code);
    }
    app.request(Method::GET, "/pull/k", &[("postrider-after", "nonsense")], "").await.problem(400, "invalid_request");
    let foreign = format!("{}/7@0", world.topic("messages"));
    app.request(Method::GET, "/pull/k", &[("postrider-after", &foreign)], "").await.problem(400, "invalid_request");
    assert_eq!(world.kafka.read(&world.topic("messages")).await, []);
}

#[tokio::test]
async fn an_expired_value_is_404_at_once_and_gets_a_tombstone_soon() {
    let world = World::new().await;
    let (app, processor) = (world.app().role("api").start().await, world.app().role("processor").start().await);
    await_complete(&app).await;
    let before_ms = now_ms();
    let answer = app.post_json("/push", &json!({"key": "k", "value": 1, "ttl_seconds": 1})).await.expect(202);
    let after_ms = now_ms();
    let pulled = pull_after(&app, "k", answer.header("postrider-position")).await;
    assert!(pulled.status == 200 || now_ms() - before_ms > 1_000, "{pulled:?}");
    // Readers do not wait for the processor, which writes the tombstone.
    processor.signal(Signal::STOP);
    until("the value expires", seconds(20), || async { (app.get("/pull/k").await.status == 404).then_some(()) }).await;
    processor.signal(Signal::CONT);
    let log = until("the topic has a tombstone", seconds(20), || async {
        Some(world.kafka.read(&world.topic("messages")).await).filter(|log| log.len() > 1)
    })
    .await;
    assert_eq!((log[1].key(), &log[1].value), ("k", &None));
    let expires_at_ms: i64 = log[0].header("postrider-expires-at").unwrap().parse().unwrap();
    assert!((before_ms..=after_ms).contains(&(expires_at_ms - 1_000)), "{log:?}");
    app.get("/pull/k").await.problem(404, "key_not_found");
}

#[tokio::test]
async fn a_mass_expiry_is_spread_over_rounds_and_leaves_no_value_without_a_tombstone() {
    // More than a round of one partition takes; the bound keeps the records of the partition from
    // waiting long.
    const KEYS: usize = 6_000;
    let mut world = World::new().await;
    world.set("POSTRIDER_KV__PARTITIONS", "1");
    let (app, processor) = (world.app().role("api").start().await, world.app().role("processor").start().await);
    await_complete(&app).await;
    // All values have expired when the processor resumes.
    processor.signal(Signal::STOP);
    let push = |key: usize| {
        let app = &app;
        async move {
            let body = json!({"key": format!("k{key}"), "value": key, "ttl_seconds": 1});
            app.post_json("/push", &body).await.expect(202);
        }
    };
    stream::iter(0..KEYS).map(push).buffer_unordered(64).collect::<Vec<()>>().await;
    until("all values have expired", seconds(20), || async { (app.get("/pull/k0").await.status == 404).then_some(()) })
        .await;
    processor.signal(Signal::CONT);
    let expired = "postrider_kv_expired_records_total";
    until("all expired values are counted", seconds(60), || async {
        (processor.metric(expired).await == Some(KEYS as f64)).then_some(())
    })
    .await;
    let log = world.kafka.read(&world.topic("messages")).await;
    let tombstones: BTreeSet<&str> =
        log.iter().filter(|record| record.value.is_none()).map(|record| record.key()).collect();
    assert_eq!((tombstones.len(), log.len()), (KEYS, 2 * KEYS), "each key has one tombstone");
}

#[tokio::test]
async fn an_expiry_never_deletes_a_newer_write() {
    let world = World::new().await;
    let app = running(&world).await;
    let mut newest = std::collections::BTreeMap::new();
    // Every key expires around the time when it is written again, some before and some after.
    let keys: Vec<String> = (0..40).map(|number| format!("k{number}")).collect();
    for key in &keys {
        app.post_json("/push", &json!({"key": key, "value": "old", "ttl_seconds": 1})).await.expect(202);
    }
    until("the first tombstone", seconds(8), || async {
        world.kafka.read(&world.topic("messages")).await.iter().any(|record| record.value.is_none()).then_some(())
    })
    .await;
    for key in &keys {
        newest.insert(key, push(&app, key, &json!("new")).await);
    }
    until("all values have expired", seconds(8), || async {
        let log = world.kafka.read(&world.topic("messages")).await;
        let is_settled = |key: &String| {
            let of_key: Vec<_> = log.iter().filter(|record| record.key() == key).collect();
            of_key.iter().any(|record| record.value.is_none()) || of_key.len() == 2
        };
        keys.iter().all(is_settled).then_some(())
    })
    .await;
    for (key, position) in newest {
        assert_eq!(pull_after(&app, key, &position).await.expect(200).json()["value"], "new", "{key}");
        let last = || async { latest(&world.kafka.read(&world.topic("messages")).await)[key].clone() };
        let what = format!("the last record of {key} in the topic is the new value");
        until(&what, seconds(8), || async { (last().await == Some(json!("new"))).then_some(()) }).await;
    }
}

#[tokio::test]
async fn without_a_processor_a_read_of_a_new_write_is_504_and_a_miss_is_503() {
    let world = World::new().await;
    let api = world.app().role("api").env("POSTRIDER_KV__VISIBILITY_TIMEOUT_MS", "300").start().await;
    let position = push(&api, "k", &json!(1)).await;
    let started_ms = now_ms();
    let answer = api.request(Method::GET, "/pull/k", &[("postrider-after", &position)], "").await;
    answer.problem(504, "not_yet_visible");
    assert!(now_ms() - started_ms >= 250, "the request did not wait");
    for key in ["k", "unknown"] {
        api.get(&format!("/pull/{key}")).await.problem(503, "rebuilding");
    }
    let processor = world.app().role("processor").start().await;
    assert_eq!(pull_after(&api, "k", &position).await.expect(200).json()["value"], 1);
    processor.stop().await;
    assert_eq!(api.get("/pull/k").await.expect(200).json()["value"], 1, "a complete view outlives its processor");
    api.get("/pull/unknown").await.problem(404, "key_not_found");
}

#[tokio::test]
async fn reads_are_audited_unless_audit_is_off() {
    for (mode, expected) in [("async", 2), ("required", 2), ("off", 0)] {
        let world = World::new().await;
        let app = world.app().env("POSTRIDER_KV__AUDIT", mode).start().await;
        let position = push(&app, "k", &json!(1)).await;
        await_complete_unaudited(&app).await;
        let headers = [("x-request-id", "req-1"), ("postrider-after", position.as_str())];
        app.request(Method::GET, "/pull/k", &headers, "").await.expect(200);
        app.request(Method::GET, "/pull/absent", &[("x-request-id", "req-2")], "").await.expect(404);
        // Events of earlier pulls may still arrive.
        let ours = |event: &Value| event["request_id"].as_str().is_some_and(|id| id.starts_with("req-"));
        let mut events: Vec<Value> = until("as many events as reads", seconds(10), || async {
            let log = world.kafka.read(&world.topic("audit")).await;
            let events: Vec<Value> = log.iter().map(|record| record.json()).filter(ours).collect();
            (events.len() >= expected).then_some(events)
        })
        .await;
        events.sort_by_key(|event| event["request_id"].to_string());
        assert_eq!(events.len(), expected, "{mode}");
        for (event, (key, found, request)) in events.iter().zip([("k", true, "req-1"), ("absent", false, "req-2")]) {
            assert_eq!((&event["key"], &event["found"]), (&json!(key), &json!(found)), "{mode}");
            assert_eq!(event["request_id"], request);
        }
        app.stop().await;
    }
}

/// Waits until the view is complete. Checks readiness instead of pulling, because pulls would be
/// audited.
async fn await_complete_unaudited(app: &App) {
    until("both partitions have their marker", seconds(20), || async {
        app.failing("kv view").await.is_none().then_some(())
    })
    .await;
    for number in 0..4 {
        let position = push(app, &format!("warm{number}"), &json!(0)).await;
        pull_after(app, &format!("warm{number}"), &position).await.expect(200);
    }
}

#[tokio::test]
async fn two_installations_with_different_prefixes_share_the_servers() {
    let (one, two) = (World::new().await, World::new().await);
    let (first, second) = (running(&one).await, running(&two).await);
    let position = push(&first, "k", &json!("one")).await;
    pull_after(&first, "k", &position).await.expect(200);
    second.get("/pull/k").await.problem(404, "key_not_found");
    let position = push(&second, "k", &json!("two")).await;
    assert_eq!(pull_after(&second, "k", &position).await.json()["value"], "two");
    assert_eq!(first.get("/pull/k").await.json()["value"], "one");
}
