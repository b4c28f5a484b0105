//! Malformed and oversized input is answered with a clear 4xx, without a panic or growing memory.

use std::time::{Duration, Instant};

use futures_util::stream;
use reqwest::Body;

use crate::harness::{App, World, raw::Raw, until, wait::seconds};

/// Routes that take a JSON body.
const ROUTES: [&str; 2] = ["/push", "/produce"];
const MIB: usize = 1 << 20;

fn nested(levels: usize) -> String {
    format!(r#"{{"key":"k","topic":"t","value":{0}1{1},"payload":{0}1{1}}}"#, "[".repeat(levels), "]".repeat(levels))
}

#[tokio::test]
async fn malformed_bodies_are_400_with_a_reason() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", b"".to_vec()),
        ("blank", b" \n\t ".to_vec()),
        ("not JSON", b"key=value".to_vec()),
        ("cut off", br#"{"key":"k","value":"#.to_vec()),
        ("two values", br#"{"key":"k","value":1}{}"#.to_vec()),
        ("not UTF-8", b"{\"key\":\"\xff\xfe\",\"value\":1}".to_vec()),
        ("raw NUL", b"{\"key\":\"a\0b\",\"value\":\"\0\",\"topic\":\"t\",\"payload\":\"\0\"}".to_vec()),
        ("NUL between", b"{\"key\":\"k\",\0\"value\":1}".to_vec()),
        ("only NULs", vec![0; 10_000]),
        ("raw newline", b"{\"key\":\"k\",\"value\":\"a\nb\",\"topic\":\"t\",\"payload\":\"a\nb\"}".to_vec()),
        ("lone high surrogate", br#"{"key":"k","value":"\ud800","topic":"t","payload":"\ud800"}"#.to_vec()),
        ("lone low surrogate", br#"{"key":"k","value":"\udc00x","topic":"t","payload":"\udc00x"}"#.to_vec()),
        ("20,000 levels", nested(20_000).into_bytes()),
        ("129 levels", nested(129).into_bytes()),
        ("unclosed levels", "[".repeat(500_000).into_bytes()),
    ];
    for route in ROUTES {
        for (name, body) in &cases {
            let problem = app.post(route, body.clone()).await.problem(400, "invalid_json");
            assert_eq!(problem["instance"], route, "{name}");
        }
    }
    for (name, body) in
        [("array", "[]"), ("number", "7"), ("null", "null"), ("wrong types", r#"{"key":[],"topic":{}}"#)]
    {
        for route in ROUTES {
            let answer = app.post(route, body).await;
            assert_eq!(answer.problem(400, "invalid_request")["instance"], route, "{name}");
        }
    }
    app.post("/push", nested(127)).await.expect(202);
    app.stop().await;
}

#[tokio::test]
async fn oversized_requests_are_413_or_422_and_memory_does_not_grow() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let huge = || format!(r#"{{"key":"k","topic":"t","value":"{0}","payload":""}}"#, "x".repeat(10 * MIB));
    let long_key = format!(r#"{{"key":"{}","value":1}}"#, "k".repeat(MIB - 100));
    let round = || async {
        for route in ROUTES {
            // The server answers without reading the rest; a client may see that as a broken
            // connection.
            if let Ok(answer) = app.try_request(reqwest::Method::POST, route, &[], huge()).await {
                answer.problem(413, "body_too_large");
            }
            app.post(route, nested(20_000)).await.problem(400, "invalid_json");
        }
        app.post("/push", long_key.clone()).await.problem(422, "invalid_field");
        let answer = app.post("/push", format!(r#"{{"key":"{}","value":1}}"#, "k".repeat(MIB))).await;
        assert_eq!(answer.header("connection"), "close", "the client must not reuse the connection");
        let problem = answer.problem(413, "body_too_large");
        let sizes = format!("the body has {} bytes; at most {MIB} are accepted", MIB + 20);
        assert_eq!(problem["detail"], sizes);
    };
    for _ in 0..5 {
        round().await;
    }
    let before = app.rss_kib();
    for _ in 0..40 {
        round().await;
    }
    let after = app.rss_kib();
    assert!(after < before + 24 * 1024, "{before} KiB before, {after} KiB after 40 rounds");
}

#[tokio::test]
async fn an_endless_body_is_cut_off_at_the_limit() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    for route in ROUTES.repeat(4) {
        endless_body(&app, route).await;
    }
    let before = app.rss_kib();
    for route in ROUTES.repeat(10) {
        endless_body(&app, route).await;
    }
    let after = app.rss_kib();
    assert!(after < before + 8 * 1024, "{before} KiB before, {after} KiB after 20 bodies");
    endless_line(&app).await;
}

/// Sends up to 125 MiB in chunks. The server answers 413, and closes the connection long before the
/// end.
async fn endless_body(app: &App, route: &str) {
    let mut connection = Raw::connect(&app.api).await;
    let head = format!(
        "POST {route} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    connection.send(head).await;
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x1_0000));
    let mut sent = 0;
    while connection.send(&chunk).await && sent < 2_000 {
        sent += 1;
        if sent == 20 {
            let answer = connection.answer(seconds(10)).await.expect("an answer");
            assert_eq!(answer.status, 413, "{answer:?}");
            assert!(answer.body.contains(&format!("the body has more than {MIB} bytes")), "{answer:?}");
        }
    }
    assert!(sent < 2_000, "the server still reads after 125 MiB");
}

/// Sends a stream with an endless line. The server answers it once, and discards it as it arrives.
async fn endless_line(app: &App) {
    let before = app.rss_kib();
    let chunks = stream::iter((0..640).map(|_| Ok::<_, std::convert::Infallible>("x".repeat(0x1_0000))));
    let last = stream::iter([Ok("\nnot json\n".to_owned())]);
    let body = Body::wrap_stream(futures_util::StreamExt::chain(chunks, last));
    let headers = [("content-type", "application/x-ndjson")];
    let answer = app.request(reqwest::Method::POST, "/produce?topic=t", &headers, body).await.expect(200);
    let codes: Vec<String> = answer
        .text()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["code"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(codes, ["body_too_large", "invalid_json"]);
    let after = app.rss_kib();
    assert!(after < before + 16 * 1024, "{before} KiB before, {after} KiB after 40 MiB of one line");
}

#[tokio::test]
async fn a_slow_sender_is_disconnected_and_delays_nobody() {
    let mut world = World::new().await;
    let begin = async |app: &App| {
        let (mut body, mut head) = (Raw::connect(&app.api).await, Raw::connect(&app.api).await);
        body.send("POST /push HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            .await;
        head.send("POST /push HTTP/1.1\r\nHost: t\r\nX-").await;
        (body, head)
    };
    // With the default timeouts, slow requests are still open while others are answered.
    let patient = world.app().role("api").start().await;
    let slow = begin(&patient).await;
    patient.get("/health").await.expect(200);
    drop(slow);
    let timeout = seconds(2);
    for name in ["BODY", "HEADER"] {
        world.set(&format!("POSTRIDER_HTTP__{name}_TIMEOUT_MS"), &timeout.as_millis().to_string());
    }
    let app = world.app().role("api").start().await;
    let (mut slow_body, mut slow_head) = begin(&app).await;
    let answer = slow_body.answer(seconds(20)).await.unwrap();
    assert_eq!(answer.status, 408, "{answer:?}");
    assert!(answer.body.contains("request_timeout"), "{answer:?}");
    // Sending a byte at a time does not help: the timeout is for the whole body.
    let mut dripping = Raw::connect(&app.api).await;
    dripping
        .send("POST /push HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")
        .await;
    let begun = Instant::now();
    while begun.elapsed() < 2 * timeout && dripping.send(" ").await {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(dripping.answer(seconds(20)).await.unwrap().status, 408);
    assert!(
        slow_head.answer(seconds(20)).await.is_none_or(|answer| answer.status == 408),
        "an incomplete head is answered 408 or not at all"
    );
    assert!(slow_head.closes(seconds(10)).await);
}

#[tokio::test]
async fn input_that_is_not_http_is_400_or_closes_the_connection_and_the_next_one_is_served() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let long_head = format!("GET /health HTTP/1.1\r\nHost: t\r\nX-Long: {}\r\n\r\n", "x".repeat(2 * MIB));
    let cases: [&[u8]; 8] = [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /push HTTP/1.1\r\nHost: t\r\nContent-Length: nan\r\n\r\n{}",
        b"POST /push HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nHost: t\r\nBad\x01Name: x\r\n\r\n",
        long_head.as_bytes(),
    ];
    for bytes in cases {
        let mut connection = Raw::connect(&app.api).await;
        connection.send(bytes).await;
        if let Some(answer) = connection.answer(seconds(10)).await {
            assert!((400..500).contains(&answer.status), "{}: {answer:?}", String::from_utf8_lossy(&bytes[..20]));
        }
    }
    let mut bad_chunk = Raw::connect(&app.api).await;
    bad_chunk.send("POST /push HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n").await;
    let answer = bad_chunk.answer(seconds(10)).await.expect("an answer");
    assert!(answer.status == 400 && answer.body.contains("invalid_body"), "{answer:?}");
    app.get("/health").await.expect(200);
    for path in ["/pull/%ff", "/pull/%", "/pull/", "/pull/a%00b", "/pull/..%2f..%2fetc"] {
        let answer = app.get(path).await;
        assert!(matches!(answer.status, 400 | 404 | 503), "{path}: {answer:?}");
        assert_eq!(answer.header("content-type"), "application/problem+json", "{path}");
    }
}

#[tokio::test]
async fn connections_that_are_dropped_during_a_request_leak_nothing() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    for _ in 0..200 {
        let mut connection = Raw::connect(&app.api).await;
        connection.send("POST /push HTTP/1.1\r\nHost: t\r\nContent-Length: 1000\r\n\r\n{\"key\":").await;
    }
    until("all connections are closed", seconds(10), || async {
        let open = app.metric("http_server_open_connections").await;
        let active = app.metric("http_server_active_requests").await;
        // The metrics are scraped over a connection to the management port, which counts as well.
        (open.is_none_or(|open| open <= 3.0) && active.is_none_or(|active| active <= 1.0)).then_some(())
    })
    .await;
    app.get("/health").await.expect(200);
}
