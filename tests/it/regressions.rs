//! Regression tests for defects that were fixed.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use reqwest::Method;
use serde_json::json;

use crate::{
    gateway::gateway,
    harness::{World, check::disordered, until, wait::seconds},
};

const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

#[tokio::test]
async fn an_array_is_not_accepted_as_an_object() {
    let (world, app, topic) = gateway().await;
    app.post("/push", r#"["k","v",null]"#).await.problem(400, "invalid_request");
    app.post("/produce", format!(r#"["{topic}",null,null,1]"#)).await.problem(400, "invalid_request");
    let entry = format!(r#"["{topic}",null,null,1,null,null,null,null,null]"#);
    let batch = app.post("/produce", format!(r#"{{"topic":"{topic}","records":[{entry}]}}"#)).await.expect(207);
    assert_eq!(batch.json()["results"][0]["code"], "invalid_request");
    let path = format!("/produce?topic={topic}");
    let stream = app.request(Method::POST, &path, &[NDJSON], entry).await.expect(200);
    assert_eq!(stream.json()["code"], "invalid_request");
    assert_eq!(world.kafka.read(&topic).await, []);
}

#[tokio::test]
async fn a_batch_with_an_invalid_idempotency_key_is_refused_as_a_whole() {
    let (world, app, topic) = gateway().await;
    for records in [json!([]), json!([{"payload": 1}])] {
        let batch = json!({"topic": topic, "records": records});
        app.post_with("/produce", &[("idempotency-key", "")], &batch).await.problem(400, "invalid_request");
    }
    assert_eq!(world.kafka.read(&topic).await, []);
}

#[tokio::test]
async fn batches_and_streams_wait_for_producer_capacity_and_keep_their_order() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 2).await;
    let builder = world.app().role("api").env("POSTRIDER_KAFKA__PRODUCER__MAX_IN_FLIGHT_RECORDS", "7");
    let app = builder.start().await;
    let records: Vec<_> = (0..400).map(|n| json!({"key": format!("k{}", n % 3), "payload": n})).collect();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    app.post_json("/produce", &json!({"topic": topic, "records": records})).await.expect(200);
    let path = format!("/produce?topic={topic}");
    let results = app.request(Method::POST, &path, &[NDJSON], lines.replace(":\"k", ":\"s")).await.expect(200).text();
    assert_eq!(results.lines().filter(|line| line.contains(r#""success":true"#)).count(), 400, "{results}");
    let log = world.kafka.read(&topic).await;
    assert_eq!(log.len(), 800);
    assert_eq!(disordered(&log), Vec::<String>::new());
}

#[tokio::test]
async fn a_push_does_not_create_the_topic() {
    let world = World::new().await;
    let app = world.app().env("POSTRIDER_KAFKA__TOPICS__CREATE", "false").even_if_not_ready().start().await;
    until("the check names the missing topic", seconds(20), || async {
        app.failing("topics").await.filter(|detail| detail.contains("does not exist"))
    })
    .await;
    let refused = app.post_json("/push", &json!({"key": "k", "value": 1})).await;
    let problem = refused.problem(503, "kafka_unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("topics"), "{problem}");
    assert_eq!(world.kafka.partitions(&world.topic("messages")).await, None);
    // The check lists everything to create at once.
    for problem in app.failing("topics").await.unwrap().split("; ") {
        let (topic, how) = problem.split_once("create it with ").unwrap();
        let (count, settings) = how.split_once(" partitions and ").unwrap();
        let settings: Vec<(&str, &str)> = settings.split(' ').filter_map(|setting| setting.split_once('=')).collect();
        world.kafka.create_with(topic.split('`').nth(1).unwrap(), count.parse().unwrap(), &settings).await;
    }
    until("pushes are accepted", seconds(20), || async {
        (app.post_json("/push", &json!({"key": "k", "value": 1})).await.status == 202).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_view_is_not_ready_before_the_group_has_assigned_its_partitions() {
    let world = World::new().await;
    let builder = world.app().role("processor").env("POSTRIDER_KAFKA__BROKERS", "127.0.0.1:1");
    let cut_off = builder.even_if_not_ready().start().await;
    let detail = cut_off.await_failing("kv view", seconds(5)).await;
    assert!(detail.contains("waiting for partitions"), "{detail}");
    drop(cut_off);
    // Two partitions, three members: the member without a partition is ready as well.
    let first = world.app().role("processor").start().await;
    let second = world.app().role("processor").start().await;
    let third = world.app().role("processor").start().await;
    for member in [first, second, third] {
        member.await_ready(seconds(30)).await;
        assert_eq!(member.failing("kv view").await, None);
        member.stop().await;
    }
}

#[tokio::test]
async fn a_duplicate_stays_a_duplicate_in_a_rebuilt_view() {
    let stack = crate::harness::Stack::own("redouble", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = crate::kv::running(&world).await;
    let push = async |value: u32, key: Option<&str>| {
        let headers: Vec<_> = key.map(|key| ("idempotency-key", key)).into_iter().collect();
        app.post_with("/push", &headers, &json!({"key": "A", "value": value})).await.expect(202)
    };
    push(1, Some("one")).await;
    push(2, Some("two")).await;
    push(1, Some("one")).await;
    let last = push(2, Some("two")).await;
    let position = last.header("postrider-position").to_owned();
    assert_eq!(crate::kv::pull_after(&app, "A", &position).await.json()["value"], 2);
    // The processor restates the value after each duplicate, so that compaction cannot bring back
    // an old one.
    let topic = world.topic("messages");
    until("the value is restated after both duplicates", seconds(15), || async {
        let log = world.kafka.read(&topic).await;
        let restated = log.iter().filter(|record| record.header("postrider-version").is_some()).count();
        (restated >= 2 && log.last()?.text() == "2").then_some(())
    })
    .await;
    crate::harness::redis::run::<String>(&world.redis_url, &["FLUSHALL"]).await;
    crate::kv::await_complete(&app).await;
    assert_eq!(app.get("/pull/A").await.expect(200).json()["value"], 2);
}

#[tokio::test]
async fn pings_on_an_idle_http2_connection_are_not_an_unfinished_head() {
    let world = World::new().await;
    let builder = world.app().role("api").env("POSTRIDER_HTTP__HEADER_TIMEOUT_MS", "200");
    let app = builder.env("POSTRIDER_HTTP__IDLE_TIMEOUT_MS", "1500").start().await;
    let stream = tokio::net::TcpStream::connect(app.api.trim_start_matches("http://")).await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(Duration::from_millis(100)).keep_alive_while_idle(true);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    let ended = tokio::spawn(connection);
    for _ in 0..2 {
        let request = hyper::Request::get(format!("{}/health", app.api)).body(Empty::<Bytes>::new()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        // Several times the header timeout, and less than the idle timeout.
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    // Then the server closes the connection gracefully.
    assert!(
        tokio::time::timeout(seconds(10), ended).await.expect("the idle connection was not closed").unwrap().is_ok()
    );
}

#[tokio::test]
async fn the_simulator_works_with_a_single_rate() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_GATEWAY__SIMULATOR__ENABLED", "true").start().await;
    for status in [500, 400, 503] {
        let path = format!("/webhook-simulator?min_delay_ms=0&max_delay_ms=1&rate_{status}=100");
        app.post_json(&path, &json!({})).await.expect(status);
    }
    let failing = app.manage("/metrics").await.text();
    assert!(failing.contains(r#"postrider_check_ok{check="topics"}"#), "{failing}");
}
