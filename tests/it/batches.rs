//! `POST /produce` with several records: `{"records":[…]}`.

use serde_json::{Value, json};

use crate::{gateway::gateway, harness::World};

#[tokio::test]
async fn a_batch_answer_has_one_result_per_record_in_order() {
    let (world, app, topic) = gateway().await;
    let records: Vec<Value> = (0..500).map(|n| json!({"key": format!("k{}", n % 7), "payload": n})).collect();
    let answer = app.post_json("/produce", &json!({"topic": topic, "records": records})).await.expect(200).json();
    assert_eq!(answer["success"], true);
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 500);
    let log = world.kafka.read(&topic).await;
    for (n, result) in results.iter().enumerate() {
        assert_eq!((&result["success"], &result["topic"]), (&json!(true), &json!(topic)));
        let position = (result["partition"].as_i64().unwrap(), result["offset"].as_i64().unwrap());
        let record = log.iter().find(|record| (i64::from(record.partition), record.offset) == position).unwrap();
        assert_eq!(record.json(), json!(n));
        assert_eq!(record.key(), format!("k{}", n % 7));
    }
    let ordered: Vec<_> = log.iter().filter(|record| record.key() == "k3").map(|record| record.json()).collect();
    assert!(ordered.windows(2).all(|pair| pair[0].as_i64() < pair[1].as_i64()), "{ordered:?}");
}

#[tokio::test]
async fn a_batch_with_invalid_records_is_207_and_stores_the_valid_ones() {
    let (world, app, topic) = gateway().await;
    let records = json!([
        {"payload": 0},
        {"topic": world.topic("nowhere"), "payload": 1},
        {"payload": 2, "partition": -3},
        7,
        {"topic": world.topic("messages"), "payload": 4},
        {"payload": 5},
        {"payload": 6, "partition": 99},
    ]);
    let answer = app.post_json("/produce", &json!({"topic": topic, "records": records})).await.expect(207).json();
    assert_eq!(answer["success"], false);
    let codes: Vec<&str> =
        answer["results"].as_array().unwrap().iter().map(|result| result["code"].as_str().unwrap_or("")).collect();
    let malformed = "invalid_request";
    assert_eq!(codes, ["", "unknown_topic", malformed, malformed, "topic_forbidden", "", malformed]);
    assert!(answer["results"][1]["error"].as_str().is_some_and(|text| !text.is_empty()));
    let mut stored: Vec<i64> = world.kafka.read(&topic).await.iter().map(|r| r.json().as_i64().unwrap()).collect();
    stored.sort_unstable();
    assert_eq!(stored, [0, 5]);
}

#[tokio::test]
async fn an_empty_batch_succeeds_and_one_over_the_limit_is_rejected_as_a_whole() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().role("api").env("POSTRIDER_GATEWAY__MAX_BATCH_RECORDS", "3").start().await;
    let batch = |count: usize| json!({"topic": topic, "records": vec![json!({"payload": 1}); count]});
    assert_eq!(app.post_json("/produce", &batch(0)).await.expect(200).json(), json!({"success": true, "results": []}));
    app.post_json("/produce", &batch(4)).await.problem(400, "invalid_request");
    assert_eq!(world.kafka.read(&topic).await, []);
}

#[tokio::test]
async fn retrying_a_batch_with_an_idempotency_key_reuses_the_event_ids() {
    let (world, app, topic) = gateway().await;
    let batch = json!({"topic": topic, "records": [{"key": "k", "payload": 0}, {"key": "k", "payload": 1}]});
    for _ in 0..2 {
        app.post_with("/produce", &[("idempotency-key", "b1")], &batch).await.expect(200);
    }
    let log = world.kafka.read(&topic).await;
    let ids: Vec<&str> = log.iter().map(|record| record.header("ce_id").unwrap()).collect();
    assert_eq!((ids[0], ids[1]), (ids[2], ids[3]));
    assert_ne!(ids[0], ids[1]);
}
