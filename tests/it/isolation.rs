//! The requests of one client never change the answers to another.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    Answer, App, World,
    produce::{Write, produce},
    wait::{seconds, until},
};

/// Number of clients that send valid records, and of answers that each receives.
const GOOD: usize = 20;
const ANSWERS: usize = 100;

/// Sends valid bodies while other clients send invalid ones. Asserts that every valid one is
/// stored, and returns the last answer to each invalid one.
async fn beside(app: &App, good: impl Fn(usize) -> Value, bad: &[Value]) -> Vec<Answer> {
    let (stop, invalid_answers) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let mut others = JoinSet::new();
    for body in bad {
        let (client, url, body) = (app.client.clone(), format!("{}/produce", app.api), body.to_string());
        let (stop, invalid_answers) = (stop.clone(), invalid_answers.clone());
        others.spawn(async move {
            let mut last = None;
            while !stop.is_cancelled() {
                let request = client.post(&url).header("content-type", "application/json").body(body.clone());
                last = Some(Answer::read(request.send().await.unwrap()).await.unwrap());
                invalid_answers.fetch_add(1, Ordering::Relaxed);
            }
            last.unwrap()
        });
    }
    let mut writers = JoinSet::new();
    for number in 0..GOOD {
        let (client, url, body) = (app.client.clone(), format!("{}/produce", app.api), good(number).to_string());
        writers.spawn(async move {
            for _ in 0..ANSWERS {
                let request = client.post(&url).header("content-type", "application/json").body(body.clone());
                Answer::read(request.send().await.unwrap()).await.unwrap().expect(200);
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    assert!(invalid_answers.load(Ordering::Relaxed) > bad.len(), "no invalid request was answered meanwhile");
    stop.cancel();
    others.join_all().await
}

/// Returns how many producer ids and epochs the producer of postrider's own topics was given.
async fn epochs(app: &App) -> Option<f64> {
    until("the producer has its id", seconds(20), || async {
        app.metric("postrider_kafka_client_epochs_total{client=\"producer\"}").await.filter(|count| *count > 0.0)
    })
    .await
    .into()
}

#[tokio::test]
async fn a_record_that_its_topic_rejects_fails_alone() {
    let world = World::new().await;
    let app = world.app().start().await;
    app.post_json("/push", &json!({"key": "k", "value": 1})).await.expect(202);
    let before = epochs(&app).await;
    let (plain, compacted, small) = (world.topic("plain"), world.topic("compacted"), world.topic("small"));
    world.kafka.create(&plain, 1).await;
    world.kafka.create_with(&compacted, 1, &[("cleanup.policy", "compact")]).await;
    world.kafka.create_with(&small, 1, &[("max.message.bytes", "10000")]).await;
    let good = |topic: &str| {
        let topic = topic.to_owned();
        move |number: usize| json!({"topic": topic, "key": format!("k{number}"), "payload": noise(1_000, number as u64)})
    };
    let future = json!({"topic": plain, "payload": 1, "timestamp": 4_102_444_800_000_i64});
    for answer in beside(&app, good(&plain), &[future.clone(), future]).await {
        answer.problem(422, "invalid_field");
    }
    let keyless = json!({"topic": compacted, "payload": 1});
    for answer in beside(&app, good(&compacted), &[keyless.clone(), keyless]).await {
        answer.problem(400, "invalid_request");
    }
    let large = json!({"topic": small, "key": "k", "payload": noise(20_000, 99)});
    for answer in beside(&app, good(&small), &[large.clone(), large]).await {
        answer.problem(413, "body_too_large");
    }
    for topic in [plain, compacted, small] {
        assert_eq!(world.kafka.read(&topic).await.len(), GOOD * ANSWERS, "{topic}");
    }
    app.post_json("/push", &json!({"key": "k", "value": 2})).await.expect(202);
    assert_eq!(epochs(&app).await, before, "records of clients must not affect postrider's own producer");
    app.stop().await;
}

/// Text that does not compress.
fn noise(bytes: usize, seed: u64) -> String {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.alphanumeric()).take(bytes).collect()
}

async fn alter(world: &World, topic: &str, name: &str, value: &str) {
    let client: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &world.kafka.brokers).create().unwrap();
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(name, value);
    client.alter_configs([&change], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
}

#[tokio::test]
async fn a_batch_rejected_after_its_topic_was_changed_is_resent_record_by_record() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    for (setting, value, bad, status, code) in [
        ("cleanup.policy", "compact", json!({"payload": 1}), 400, "invalid_request"),
        ("max.message.bytes", "5000", json!({"key": "k", "payload": noise(6_000, 1)}), 413, "body_too_large"),
        ("message.timestamp.after.max.ms", "1000", json!({"payload": 1, "timestamp": 0}), 422, "invalid_field"),
    ] {
        let topic = world.topic(&setting.replace('.', "-"));
        world.kafka.create(&topic, 1).await;
        app.post_json("/produce", &json!({"topic": topic, "key": "k", "payload": 0})).await.expect(200);
        // From here on, what the process knows of the topic is out of date.
        alter(&world, &topic, setting, value).await;
        let mut bad = bad;
        bad["topic"] = json!(topic);
        let ahead_ms = postrider_time::clock::now_ms() + 1_800_000;
        if setting.contains("timestamp") {
            bad["timestamp"] = json!(ahead_ms);
        }
        let write = Write {
            key: bad["key"].as_str().map(Into::into),
            value: Some(bad["payload"].to_string().into()),
            timestamp_ms: bad["timestamp"].as_i64(),
            ..Write::default()
        };
        let before = until("the broker applies the new setting", seconds(60), || async {
            let before = world.kafka.read(&topic).await.len();
            produce(&world.kafka.brokers, &topic, vec![write.clone()]).await;
            (world.kafka.read(&topic).await.len() == before).then_some(before)
        })
        .await;
        let good = |number: usize| json!({"topic": topic, "key": format!("k{number}"), "payload": noise(1_000, 7)});
        for answer in beside(&app, good, &[bad]).await {
            answer.problem(status, code);
        }
        let log = world.kafka.read(&topic).await;
        assert_eq!(log.len(), GOOD * ANSWERS + before, "{topic}");
        assert!(
            log.iter().skip(before).all(|record| record.header("ce_id").is_some() && record.key.is_some()),
            "a record lost its headers or its key"
        );
    }
    let resent = app.metric("postrider_producer_records_total{client=\"producer-callers\",outcome=\"resent\"}").await;
    assert!(resent > Some(0.0), "{resent:?}");
    app.stop().await;
}

#[tokio::test]
async fn records_of_batches_and_streams_fail_alone() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let topic = world.topic("small");
    world.kafka.create_with(&topic, 1, &[("max.message.bytes", "2000")]).await;
    let mut records: Vec<Value> = (0..200).map(|n| json!({"key": "k", "payload": [n, noise(500, n)]})).collect();
    records[7]["timestamp"] = json!(4_102_444_800_000_i64);
    records[99]["payload"] = json!(noise(3_000, 1));
    let answer =
        app.post_json(&format!("/produce?topic={topic}"), &json!({"records": records})).await.expect(207).json();
    let failed = |results: &[Value]| -> Vec<(usize, String)> {
        let codes = results.iter().enumerate().filter(|(_, result)| result["success"] == false);
        codes.map(|(part, result)| (part, result["code"].as_str().unwrap().to_owned())).collect()
    };
    let expected = [(7, "invalid_field".to_owned()), (99, "body_too_large".to_owned())];
    assert_eq!(failed(answer["results"].as_array().unwrap()), expected);
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let headers = [("content-type", "application/x-ndjson")];
    let answer =
        app.request(reqwest::Method::POST, &format!("/produce?topic={topic}"), &headers, lines).await.expect(200);
    let results: Vec<Value> = answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(failed(&results), expected);
    let stored: Vec<i64> =
        world.kafka.read(&topic).await.iter().map(|record| record.json()[0].as_i64().unwrap()).collect();
    let whole: Vec<i64> = (0..200).filter(|n| ![7, 99].contains(n)).collect();
    assert_eq!(stored, [whole.clone(), whole].concat(), "the valid records keep their order");
    app.stop().await;
}

#[tokio::test]
async fn the_largest_record_that_fits_is_accepted_and_one_byte_more_is_413() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let topic = world.topic("small");
    world.kafka.create_with(&topic, 1, &[("max.message.bytes", "3000")]).await;
    let body = |bytes: usize| json!({"topic": topic, "key": "k", "headers": {"h": "1"}, "payload": noise(bytes, 3)});
    let problem = app.post_json("/produce", &body(3_000)).await.problem(413, "body_too_large");
    let needed: usize = problem["detail"].as_str().unwrap().split(' ').find_map(|word| word.parse().ok()).unwrap();
    let largest = 3_000 - (needed - 3_000);
    app.post_json("/produce", &body(largest)).await.expect(200);
    let problem = app.post_json("/produce", &body(largest + 1)).await.problem(413, "body_too_large");
    assert!(problem["detail"].as_str().unwrap().contains("3001 bytes"), "{problem}");
    // The broker agrees: it accepts exactly that size, and rejects it with a limit one byte lower.
    alter(&world, &topic, "max.message.bytes", "2999").await;
    let refusal = until("the broker applies the new setting", seconds(20), || async {
        Some(app.post_json("/produce", &body(largest)).await).filter(|answer| answer.status != 200)
    })
    .await;
    let problem = refusal.problem(413, "body_too_large");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("3000 bytes") && detail.contains("its topic accepts less"), "by the broker: {detail}");
    app.stop().await;
}

#[tokio::test]
async fn different_writes_under_one_idempotency_key_are_all_stored() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let topic = world.make_topic("orders", 1).await;
    let write = async |path: &str, body: Value| {
        // The second request is a retry of the first.
        for _ in 0..2 {
            let answer = app.post_with(path, &[("idempotency-key", "shared")], &body).await;
            assert!(answer.status < 300, "{path}: {answer:?}");
        }
    };
    for author in ["a", "b"] {
        write("/api/v1/comments", json!({"text": "nice", "author_id": author})).await;
        write("/api/v1/message/action", json!({"chatId": "c", "senderId": author, "receiverId": "r", "content": "hi"}))
            .await;
        write("/push", json!({"key": "k", "value": author})).await;
        write("/posts", json!({"author_id": author, "content": "post"})).await;
        write("/follow", json!({"follower_id": "f", "followee_id": author})).await;
        write("/produce", json!({"topic": topic, "payload": author})).await;
        write("/produce", json!({"records": [{"topic": topic, "payload": 1}, {"topic": topic, "payload": author}]}))
            .await;
    }
    until("both comments are listed", seconds(20), || async {
        (app.get("/api/v1/comments").await.json()["comments"].as_array()?.len() == 2).then_some(())
    })
    .await;
    until("both messages are stored", seconds(20), || async {
        let page = app.get("/api/v1/messages?receiverId=r").await;
        (page.status == 200 && page.json()["messages"].as_array()?.len() == 2).then_some(())
    })
    .await;
    until("both posts are in the feed", seconds(20), || async {
        (app.get("/feeds/f").await.json()["post_ids"].as_array()?.len() == 2).then_some(())
    })
    .await;
    let ids = |log: Vec<crate::harness::kafka::Stored>| -> std::collections::BTreeSet<String> {
        log.iter().map(|record| record.header("ce_id").unwrap().to_owned()).collect()
    };
    assert_eq!(ids(world.kafka.read(&topic).await).len(), 6, "one event per single record, two per batch");
    assert_eq!(app.get("/pull/k").await.expect(200).json()["value"], "b", "the later push wins");
    app.stop().await;
}
