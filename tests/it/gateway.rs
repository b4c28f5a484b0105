//! `POST /produce` with single records, and the gateway's other routes.

use serde_json::json;

use crate::harness::{
    App, World,
    check::{disordered, lost},
    load::{Load, Target},
};

/// Starts a process that serves only the API, and creates a topic `orders` with three partitions.
pub async fn gateway() -> (World, App, String) {
    let world = World::new().await;
    let topic = world.make_topic("orders", 3).await;
    let app = world.app().role("api").start().await;
    (world, app, topic)
}

#[tokio::test]
async fn a_produced_record_is_answered_as_older_clients_expect_and_is_in_kafka() {
    let (world, app, topic) = gateway().await;
    let body = json!({"topic": topic, "key": "k1", "payload": {"message": "Hello Kafka!"}});
    let answer = app.post_json("/produce", &body).await.expect(200);
    assert_eq!(answer.header("content-type"), "application/json");
    let (partition, offset) = (answer.json()["partition"].clone(), answer.json()["offset"].clone());
    let message = format!("Message delivered to topic {topic}, partition {partition}, offset {offset}");
    let expected =
        json!({"success": true, "message": message, "topic": topic, "partition": partition, "offset": offset});
    assert_eq!(answer.json(), expected);
    let records = world.kafka.read(&topic).await;
    assert_eq!(records.len(), 1);
    assert_eq!((json!(records[0].partition), json!(records[0].offset)), (partition, offset));
    assert_eq!(records[0].key(), "k1");
    assert_eq!(records[0].text(), r#"{"message":"Hello Kafka!"}"#);
}

#[tokio::test]
async fn a_payload_of_any_type_is_stored_minified_but_otherwise_as_written() {
    let (world, app, topic) = gateway().await;
    let cases = [
        (r#"{ "b" : 1.0, "a":[1e3 , 0.10,  -0], "a": 2 }"#, r#"{"b":1.0,"a":[1e3,0.10,-0],"a":2}"#),
        ("12345678901234567890123", "12345678901234567890123"),
        (r#"" two  spaces and \u00e9 \n""#, r#"" two  spaces and \u00e9 \n""#),
        (r#""\u0000""#, r#""\u0000""#),
        ("true", "true"),
        ("null", "null"),
        ("[ ]", "[]"),
    ];
    for (payload, _) in cases {
        app.post("/produce", format!(r#"{{"topic":"{topic}","key":"one","payload": {payload} }}"#)).await.expect(200);
    }
    let records = world.kafka.read(&topic).await;
    let stored: Vec<&str> = records.iter().map(|record| record.text()).collect();
    assert_eq!(stored, cases.map(|(_, stored)| stored));
}

#[tokio::test]
async fn headers_partition_timestamp_and_binary_parts_reach_the_record() {
    let (world, app, _) = gateway().await;
    let topic = world.topic("for-ever");
    world.kafka.create_with(&topic, 3, &[("retention.ms", "-1")]).await;
    let body = json!({
        "topic": topic, "key_base64": "AP8=", "payload_base64": "AQID", "partition": 2,
        "headers": {"tenant": "acme", "empty": ""}, "timestamp": 1_700_000_000_123_i64,
    });
    let answer = app.post_json("/produce", &body).await.expect(200).json();
    assert_eq!(answer["partition"], 2);
    let text_time = json!({"topic": topic, "payload": 1, "partition": 2, "timestamp": "2023-01-01T12:00:00.5Z"});
    app.post_json("/produce", &text_time).await.expect(200);
    let records = world.kafka.read(&topic).await;
    assert_eq!(records[0].key.as_deref(), Some(&[0, 255][..]));
    assert_eq!(records[0].value.as_deref(), Some(&[1, 2, 3][..]));
    assert_eq!(records[0].header("tenant"), Some("acme"));
    assert_eq!(records[0].header("empty"), Some(""));
    assert_eq!(records[0].timestamp_ms, 1_700_000_000_123);
    assert_eq!((records[1].timestamp_ms, &records[1].key), (1_672_574_400_500, &None));
}

#[tokio::test]
async fn a_record_that_retention_would_delete_at_once_is_refused() {
    let (world, app, _) = gateway().await;
    let topic = world.topic("an-hour");
    world.kafka.create_with(&topic, 1, &[("retention.ms", "3600000")]).await;
    let now_ms = postrider_time::clock::now_ms();
    let body = |ms: i64| json!({"topic": topic, "payload": 1, "timestamp": ms});
    let old = app.post_json("/produce", &body(now_ms - 3_700_000)).await.problem(422, "invalid_field");
    let detail = old["detail"].as_str().unwrap();
    assert!(detail.contains("at most 3600000 ms before now (`retention.ms`"), "{detail}");
    assert_eq!(old["success"], false);
    app.post_json("/produce", &body(now_ms / 1_000)).await.problem(422, "invalid_field");
    let batch =
        json!({"topic": topic, "records": [{"payload": 1, "timestamp": "2020-01-01T00:00:00Z"}, {"payload": 2}]});
    let results = app.post_json("/produce", &batch).await.expect(207).json();
    assert_eq!(results["results"][0]["code"], "invalid_field", "{results}");
    app.post_json("/produce", &body(now_ms - 3_000_000)).await.expect(200);
    assert_eq!(world.kafka.read(&topic).await.len(), 2);
}

#[tokio::test]
async fn every_record_is_a_cloud_event_in_the_callers_trace() {
    let (world, app, topic) = gateway().await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let traceparent = format!("00-{trace}-b7ad6b7169203331-00");
    let answer =
        app.post_with("/produce", &[("traceparent", &traceparent)], &json!({"topic": topic, "payload": 1})).await;
    assert!(answer.header("traceparent").starts_with(&format!("00-{trace}-")), "{answer:?}");
    let record = &world.kafka.read(&topic).await[0];
    assert_eq!(record.header("ce_specversion"), Some("1.0"));
    let id = record.header("ce_id").unwrap().parse::<uuid::Uuid>().unwrap();
    assert_eq!(id.get_version_num(), 7);
    assert_eq!(record.header("ce_type"), Some("postrider.gateway.record"));
    assert!(record.header("ce_source").is_some() && record.header("ce_time").unwrap().ends_with('Z'));
    assert_eq!(record.header("traceparent"), Some(answer.header("traceparent")));
}

#[tokio::test]
async fn the_same_idempotency_key_gives_the_same_event_id() {
    let (world, app, topic) = gateway().await;
    let body = json!({"topic": topic, "key": "k", "payload": 1});
    for key in ["one", "one", "two"] {
        app.post_with("/produce", &[("idempotency-key", key)], &body).await.expect(200);
    }
    let too_long = "x".repeat(256);
    app.post_with("/produce", &[("idempotency-key", &too_long)], &body).await.problem(400, "invalid_request");
    let records = world.kafka.read(&topic).await;
    let ids: Vec<&str> = records.iter().map(|record| record.header("ce_id").unwrap()).collect();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
}

#[tokio::test]
async fn records_of_one_key_stay_in_order_under_concurrent_requests_of_others() {
    let (world, app, topic) = gateway().await;
    let load = Load::start(&app, &Target::Produce(topic.clone()), 8);
    load.more(500).await;
    let outcome = load.stop().await;
    outcome.expect_only(&[]);
    let log = world.kafka.read(&topic).await;
    assert_eq!(disordered(&log), Vec::<String>::new());
    assert_eq!(lost(&outcome.acknowledged, &log), []);
    assert_eq!(log.len(), outcome.acknowledged.len());
}

#[tokio::test]
async fn a_topic_that_does_not_exist_is_404_at_once() {
    let (world, app, _) = gateway().await;
    let topic = world.topic("nowhere");
    let started = std::time::Instant::now();
    let answer = app.post_json("/produce", &json!({"topic": topic, "payload": 1})).await;
    let problem = answer.problem(404, "unknown_topic");
    assert_eq!(problem["success"], false);
    assert_eq!(problem["error"], problem["detail"]);
    // librdkafka alone would report this only after the delivery timeout of nine seconds.
    assert!(started.elapsed().as_secs() < 8, "{:?}", started.elapsed());
    assert_eq!(world.kafka.partitions(&topic).await, None, "the request must not create the topic");
}

#[tokio::test]
async fn a_topic_that_does_not_exist_is_created_where_that_is_allowed() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_GATEWAY__AUTO_CREATE_TOPICS", "true").start().await;
    let topic = world.topic("fresh");
    app.post_json("/produce", &json!({"topic": topic, "payload": 1})).await.expect(200);
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
}

#[tokio::test]
async fn internal_topics_are_rejected_and_the_allow_list_restricts_the_others() {
    let world = World::new().await;
    let (listed, other) = (world.make_topic("team-a", 1).await, world.make_topic("other", 1).await);
    let open = world.app().role("api").start().await;
    let produce = |topic: &str| json!({"topic": topic, "payload": 1});
    let internal_topics =
        ["messages", "audit", "dead-letter-events", "dead-letter-deliveries"].map(|name| world.topic(name));
    for internal in internal_topics.into_iter().chain(["__consumer_offsets".to_owned()]) {
        let problem = open.post_json("/produce", &produce(&internal)).await.problem(403, "topic_forbidden");
        assert_eq!(problem["success"], false);
    }
    open.post_json("/produce", &produce(&other)).await.expect(200);
    open.stop().await;
    let rules = format!("{},{}", world.topic("team-*"), world.topic("messages"));
    let narrow = world.app().role("api").env("POSTRIDER_GATEWAY__TOPICS__ALLOW", &rules).start().await;
    narrow.post_json("/produce", &produce(&listed)).await.expect(200);
    narrow.post_json("/produce", &produce(&other)).await.problem(403, "topic_forbidden");
    let keyed = json!({"topic": world.topic("messages"), "key": "k", "payload": 1});
    narrow.post_json("/produce", &keyed).await.expect(200);
    // The topic is compacted: retrying a record without a key would never help.
    narrow.post_json("/produce", &produce(&world.topic("messages"))).await.problem(400, "invalid_request");
    narrow.stop().await;
}

#[tokio::test]
async fn invalid_requests_are_400_with_the_fields_older_clients_read() {
    let (world, app, topic) = gateway().await;
    let cases = [
        (json!({"payload": 1}), "topic"),
        (json!({"topic": topic}), "payload"),
        (json!({"topic": "no such name", "payload": 1}), "topic"),
        (json!({"topic": topic, "payload": 1, "partition": -1}), "partition"),
        (json!({"topic": topic, "payload": 1, "partition": 99}), "partition"),
        (json!({"topic": topic, "payload": 1, "headers": {"ce_id": "x"}}), "ce_id"),
        (json!({"topic": topic, "key": "a", "key_base64": "YQ==", "payload": 1}), "key_base64"),
        (json!({"topic": topic, "key": 7, "payload": 1}), ""),
    ];
    for (body, word) in cases {
        let problem = app.post_json("/produce", &body).await.problem(400, "invalid_request");
        assert_eq!(problem["success"], false, "{body}");
        assert!(problem["error"].as_str().unwrap().contains(word), "{body}: {problem}");
    }
    assert_eq!(world.kafka.read(&topic).await, []);
}

#[tokio::test]
async fn health_reports_that_the_process_answers() {
    let (_world, app, _) = gateway().await;
    assert_eq!(app.get("/health").await.expect(200).json(), json!({"status": "healthy"}));
}

#[tokio::test]
async fn the_webhook_simulator_answers_at_the_requested_rates_and_is_off_by_default() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_GATEWAY__SIMULATOR__ENABLED", "true").start().await;
    let path = |rates: &str| format!("/webhook-simulator?min_delay_ms=0&max_delay_ms=5&{rates}");
    let never = "rate_500=0&rate_400=0&rate_503=0";
    let answer = app.post_json(&path(never), &json!({"a": 1})).await.expect(200).json();
    assert_eq!(answer["status"], "processed");
    for member in ["message", "processing_time_ms", "received_at"] {
        assert!(!answer[member].is_null(), "{member} in {answer}");
    }
    for (rates, status) in [
        ("rate_500=100&rate_400=0&rate_503=0", 500),
        ("rate_500=0&rate_400=100&rate_503=0", 400),
        ("rate_500=0&rate_400=0&rate_503=100", 503),
    ] {
        app.post_json(&path(rates), &json!({})).await.expect(status);
    }
    for bad in ["", "[1]", "{", "7"] {
        let answer = app.post(&path(never), bad).await.expect(400).json();
        assert_eq!(answer["error"], "Invalid JSON payload", "{bad}");
    }
    app.post_json("/webhook-simulator?rate_500=101", &json!({})).await.problem(422, "invalid_field");
    app.stop().await;
    let plain = world.app().role("api").start().await;
    plain.post_json("/webhook-simulator", &json!({})).await.problem(404, "not_found");
}
