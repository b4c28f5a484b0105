//! Bodies that differ from the plain form: compressed, with fields in another case, or with names
//! that nobody knows.

use std::io::Write;

use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    gateway::gateway,
    harness::{Answer, World},
};

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn deflate(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(data.len())];
    let length = zstd_safe::compress(&mut out[..], data, 3).unwrap();
    out.truncate(length);
    out
}

#[tokio::test]
async fn compressed_bodies_are_accepted_up_to_the_limit_after_decompression() {
    let (world, app, topic) = gateway().await;
    let json = ("content-type", "application/json");
    let record = json!({"topic": topic, "payload": "p".repeat(100_000)}).to_string();
    for (encoding, body) in [
        ("gzip", gzip(record.as_bytes())),
        ("deflate", deflate(record.as_bytes())),
        ("zstd", zstd(record.as_bytes())),
        ("identity", record.clone().into_bytes()),
    ] {
        app.request(Method::POST, "/produce", &[json, ("content-encoding", encoding)], body).await.expect(200);
    }
    let stored: Vec<usize> = world.kafka.read(&topic).await.iter().map(|record| record.text().len()).collect();
    assert_eq!(stored, [100_002; 4]);
    let bomb = vec![b' '; 64 << 20];
    for (encoding, body) in [("gzip", gzip(&bomb)), ("deflate", deflate(&bomb)), ("zstd", zstd(&bomb))] {
        for path in ["/produce", "/push", "/api/v1/comments", "/api/v1/message/action", "/posts"] {
            let headers = [json, ("content-encoding", encoding), ("connection", "close")];
            app.request(Method::POST, path, &headers, body.clone()).await.problem(413, "body_too_large");
        }
    }
    let headers = [json, ("content-encoding", "gzip")];
    for body in [record.clone().into_bytes(), gzip(record.as_bytes())[..100].to_vec()] {
        app.request(Method::POST, "/produce", &headers, body).await.problem(400, "invalid_body");
    }
    for encoding in ["br", "compress", "gzip, zstd"] {
        let answer = app.request(Method::POST, "/push", &[json, ("content-encoding", encoding)], "x").await;
        answer.problem(415, "unsupported_encoding");
        assert_eq!(answer.header("accept-encoding"), "gzip, deflate, zstd");
    }
    let used = app.metric("postrider_memory_used_bytes{budget=\"requests\"}").await;
    assert_eq!(used.unwrap_or_default(), 0.0, "no decompressor keeps its memory");
    app.stop().await;
}

#[tokio::test]
async fn a_compressed_stream_has_the_limit_per_record() {
    let (world, app, topic) = gateway().await;
    let lines: String = (0..20_000).map(|number| format!("{{\"payload\":\"{number:0100}\"}}\n")).collect();
    let large = format!("{{\"payload\":\"{}\"}}\n", "x".repeat(2 << 20));
    let body = gzip(format!("{lines}{large}{{\"payload\":1}}").as_bytes());
    let headers =
        [("content-type", "application/x-ndjson"), ("content-encoding", "gzip"), ("accept", "application/jsonl")];
    let answer = app.request(Method::POST, &format!("/produce?topic={topic}"), &headers, body).await.expect(200);
    assert_eq!(answer.header("content-type"), "application/jsonl");
    let results: Vec<Value> = answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 20_002);
    let refused: Vec<&Value> = results.iter().filter(|result| result["success"] != true).collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0]["code"], "body_too_large");
    assert!(refused[0]["error"].as_str().unwrap().starts_with("the record has "), "{}", refused[0]);
    assert_eq!(world.kafka.read(&topic).await.len(), 20_001);
    let cut = gzip(lines.as_bytes());
    let cut = cut[..cut.len() / 2].to_vec();
    let answer = app.request(Method::POST, &format!("/produce?topic={topic}"), &headers, cut).await.expect(200);
    let last: Value = serde_json::from_str(answer.text().lines().last().unwrap()).unwrap();
    assert_eq!(last["code"], "invalid_body");
    app.stop().await;
}

#[tokio::test]
async fn field_names_in_any_case_are_accepted() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().role("api").start().await;
    app.post_json("/push", &json!({"Key": "user123", "Value": "Hello", "TTL_Seconds": 60})).await.expect(202);
    let pushed = world.kafka.read(&world.topic("messages")).await;
    assert_eq!((pushed[0].key(), pushed[0].text()), ("user123", r#""Hello""#));
    assert!(pushed[0].header("postrider-expires-at").is_some());
    app.post(&format!("/produce?topic={topic}"), r#"{"KEY":"k","Payload": {"Key": 1.50}}"#).await.expect(200);
    let produced = world.kafka.read(&topic).await;
    assert_eq!((produced[0].key(), produced[0].text()), ("k", r#"{"Key":1.50}"#));
    let sent = r#"{"ChatId":"c","SenderId":"s","ReceiverId":"r","Content":"x","Extra": [1]}"#;
    app.post("/api/v1/message/action", sent).await.expect(200);
    let messages = world.kafka.read(&world.topic("message")).await;
    let expected = r#"{"chatId":"c","senderId":"s","receiverId":"r","content":"x","Extra":[1]}"#;
    assert_eq!(messages[0].text(), expected, "consumers know the names as documented");
    let comment = app.post("/api/v1/comments", r#"{"Text":"nice"}"#).await.expect(200).json();
    assert_eq!(comment["comment"], json!({"text": "nice"}));
    // An exact name wins.
    app.post("/push", r#"{"Key":"other","key":"exact","KEY":"other","value":1}"#).await.expect(202);
    let keys: Vec<String> =
        world.kafka.read(&world.topic("messages")).await.iter().map(|record| record.key().to_string()).collect();
    assert!(keys.contains(&"exact".to_owned()) && !keys.contains(&"other".to_owned()), "{keys:?}");
    app.stop().await;
}

#[tokio::test]
async fn a_near_miss_of_a_name_is_warned_of_and_counted() {
    let (_world, app, topic) = gateway().await;
    let warning = |answer: &Answer| answer.header("postrider-warning").to_owned();
    let answer = app.post_json("/push", &json!({"key": "k", "value": 1, "ttlSeconds": 5})).await.expect(202);
    assert_eq!(warning(&answer), "unknown field `ttlSeconds`; did you mean `ttl_seconds`?");
    let answer = app.post_json("/push", &json!({"kee": "k", "value": 1})).await;
    answer.problem(400, "invalid_request");
    assert_eq!(warning(&answer), "unknown field `kee`; did you mean `key`?");
    let body = json!({"topic": topic, "payload": 1, "partitions": 0});
    let answer = app.post_json("/produce", &body).await.expect(200);
    assert_eq!(warning(&answer), "unknown field `partitions`; did you mean `partition`?");
    let answer = app.get("/api/v1/messages?ReceiverID=r").await;
    answer.problem(400, "invalid_request");
    assert_eq!(warning(&answer), "unknown parameter `ReceiverID`; did you mean `receiverId`?");
    for (path, body) in [
        ("/push", json!({"key": "k", "value": 1, "later": {"x": [1]}})),
        ("/push", json!({"key": "k", "value": 1, "keys": 1})),
        ("/produce", json!({"topic": topic, "payload": 1, "zzz": 1})),
    ] {
        assert_eq!(warning(&app.post_json(path, &body).await), "", "{body}");
    }
    for (labels, count) in [
        ("http_route=\"/push\",in=\"field\"", 2.0),
        ("http_route=\"/produce\",in=\"field\"", 1.0),
        ("http_route=\"/api/v1/messages\",in=\"parameter\"", 1.0),
    ] {
        assert_eq!(app.metric(&format!("postrider_http_near_misses_total{{{labels}}}")).await, Some(count), "{labels}");
    }
    app.stop().await;
}

#[tokio::test]
async fn a_route_that_deletes_refuses_what_it_does_not_know() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let json = ("content-type", "application/json");
    for path in ["/pull/k", "/posts/1", "/users/u"] {
        for (query, body) in [("?dry_run=true", ""), ("?force", ""), ("", r#"{"dry_run":true}"#), ("", "[1]")] {
            let answer = app.request(Method::DELETE, &format!("{path}{query}"), &[json], body).await;
            answer.problem(400, "invalid_request");
        }
    }
    let problem = app.request(Method::DELETE, "/pull/k?dry_run=true", &[], "").await.problem(400, "invalid_request");
    assert_eq!(problem["detail"], "unknown parameter `dry_run`; this route takes none");
    assert!(world.kafka.read(&world.topic("messages")).await.is_empty(), "nothing was deleted");
    app.request(Method::DELETE, "/pull/k", &[json], "{}").await.expect(202);
    app.request(Method::DELETE, "/pull/k", &[], "").await.expect(202);
    assert_eq!(world.kafka.read(&world.topic("messages")).await.len(), 2);
    app.stop().await;
}
