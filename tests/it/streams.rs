//! `POST /produce` with a stream of NDJSON lines.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use reqwest::{Body, Method};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};

use crate::{gateway::gateway, harness::World};

const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

fn results(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_stream_of_20_000_records_is_answered_in_order() {
    let (world, app, topic) = gateway().await;
    let mut body = String::new();
    for n in 0..20_000 {
        body.push_str(&format!("{{\"key\":\"k{}\",\"payload\":{n}}}\n", n % 50));
    }
    let answer = app.request(Method::POST, &format!("/produce?topic={topic}"), &[NDJSON], body).await.expect(200);
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let results = results(&answer.text());
    assert_eq!(results.len(), 20_000);
    let log = world.kafka.read(&topic).await;
    assert_eq!(log.len(), 20_000);
    let stored: std::collections::HashMap<_, _> =
        log.iter().map(|record| ((i64::from(record.partition), record.offset), record.text())).collect();
    for (n, result) in results.iter().enumerate() {
        assert_eq!(result["success"], true, "{result}");
        let position = (result["partition"].as_i64().unwrap(), result["offset"].as_i64().unwrap());
        assert_eq!(stored[&position], n.to_string());
    }
    assert_eq!(crate::harness::check::disordered(&log), Vec::<String>::new());
}

#[tokio::test]
async fn invalid_lines_get_an_error_in_order_and_do_not_stop_the_stream() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().role("api").env("POSTRIDER_HTTP__MAX_BODY_BYTES", "1000").start().await;
    let overlong = format!(r#"{{"payload":"{}"}}"#, "x".repeat(300_000));
    let lines = [
        r#"{"payload":0}"#,
        "not json",
        "",
        r#"{"payload":"\ud800"}"#,
        &overlong,
        r#"{"payload":1,"partition":-1}"#,
        "   ",
        "\u{1}",
        r#"{"topic":"__consumer_offsets","payload":1}"#,
        r#"{"payload":2}"#,
    ];
    // The last line has no newline, and is still accepted.
    let path = format!("/produce?topic={topic}");
    let answer = app.request(Method::POST, &path, &[NDJSON], lines.join("\n")).await.expect(200);
    let results = results(&answer.text());
    let codes: Vec<&str> = results.iter().map(|result| result["code"].as_str().unwrap_or("")).collect();
    let bad = "invalid_json";
    assert_eq!(codes, ["", bad, bad, "body_too_large", "invalid_request", bad, "topic_forbidden", ""]);
    let stored: Vec<String> = world.kafka.read(&topic).await.iter().map(|record| record.text().to_owned()).collect();
    assert_eq!(stored, ["0", "2"]);
}

#[tokio::test]
async fn results_arrive_while_the_stream_is_still_being_sent() {
    let (_world, app, topic) = gateway().await;
    let (lines, sent) = mpsc::channel::<String>(4);
    let body = stream::unfold(sent, |mut sent| async move {
        sent.recv().await.map(|line| (Ok::<_, std::convert::Infallible>(line), sent))
    });
    let request = app.client.post(format!("{}/produce?topic={topic}", app.api)).header(NDJSON.0, NDJSON.1);
    let request = tokio::spawn(request.body(Body::wrap_stream(body)).send());
    lines.send("{\"payload\":1}\n{\"payl".to_owned()).await.unwrap();
    let mut answers = request.await.unwrap().unwrap().bytes_stream();
    let patience = Duration::from_secs(10);
    let first =
        timeout(patience, answers.next()).await.expect("no result before the end of the stream").unwrap().unwrap();
    assert_eq!(results(std::str::from_utf8(&first).unwrap())[0]["success"], true);
    lines.send("oad\":2}\n".to_owned()).await.unwrap();
    let second = timeout(patience, answers.next()).await.expect("no second result").unwrap().unwrap();
    assert_eq!(results(std::str::from_utf8(&second).unwrap())[0]["success"], true);
    drop(lines);
    assert!(timeout(patience, answers.next()).await.expect("the response did not end").is_none());
}

#[tokio::test]
async fn a_stream_with_an_idempotency_key_gives_each_line_its_own_id_and_the_same_ids_on_a_retry() {
    let (world, app, topic) = gateway().await;
    let path = format!("/produce?topic={topic}");
    for _ in 0..2 {
        let body = "{\"key\":\"k\",\"payload\":1}\n{\"key\":\"k\",\"payload\":2}\n";
        app.request(Method::POST, &path, &[NDJSON, ("idempotency-key", "s1")], body).await.expect(200);
    }
    let log = world.kafka.read(&topic).await;
    let ids: Vec<&str> = log.iter().map(|record| record.header("ce_id").unwrap()).collect();
    assert_eq!((ids[0], ids[1]), (ids[2], ids[3]));
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn a_stream_without_a_topic_gets_an_error_for_each_line() {
    let (_world, app, _) = gateway().await;
    let answer = app.request(Method::POST, "/produce", &[NDJSON], "{\"payload\":1}\n").await.expect(200);
    let results = results(&answer.text());
    assert_eq!((&results[0]["code"], &results[0]["status"]), (&json!("invalid_request"), &json!(400)));
}
