//! The HTTP behaviour that all routes share.

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest::Method;
use serde_json::json;

use crate::{
    gateway::gateway,
    harness::{World, raw::Raw, until, wait::seconds},
};

#[tokio::test]
async fn an_error_is_a_complete_problem_document_about_the_request() {
    let (_world, app, _) = gateway().await;
    let problem = app.post("/push", "{").await.problem(400, "invalid_json");
    assert_eq!(problem["instance"], "/push");
    assert_eq!(problem["title"], "The body is not valid JSON");
    assert!(problem["detail"].as_str().unwrap().contains("line 1"), "{problem}");
    app.get("/no/such/route").await.problem(404, "not_found");
    let answer = app.get("/push").await;
    answer.problem(405, "method_not_allowed");
    assert_eq!(answer.header("allow"), "POST");
    let answer = app.request(Method::PATCH, "/pull/k", &[], "").await;
    answer.problem(405, "method_not_allowed");
}

#[tokio::test]
async fn every_answer_has_the_request_id_of_the_client_or_a_new_one() {
    let (_world, app, _) = gateway().await;
    for path in ["/health", "/no/such/route", "/pull/k"] {
        let answer = app.request(Method::GET, path, &[("x-request-id", "mine-1")], "").await;
        assert_eq!(answer.header("x-request-id"), "mine-1", "{path}");
        let made = app.get(path).await;
        assert_eq!(made.header("x-request-id").len(), 32, "{path}");
        assert_ne!(made.header("x-request-id"), app.get(path).await.header("x-request-id"));
    }
    let long = "x".repeat(300);
    let answer = app.request(Method::GET, "/health", &[("x-request-id", &long)], "").await;
    assert_eq!(answer.header("x-request-id").len(), 32, "a request id that is too long is replaced");
}

#[tokio::test]
async fn a_valid_traceparent_is_continued_and_answered() {
    let (_world, app, _) = gateway().await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let sent = format!("00-{trace}-00f067aa0ba902b7-00");
    let answered = app.request(Method::GET, "/health", &[("traceparent", &sent)], "").await;
    let answered = answered.header("traceparent").to_owned();
    assert!(answered.starts_with(&format!("00-{trace}-")) && answered != sent, "{answered}");
    for bad in ["", "nonsense", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"] {
        let answer = app.request(Method::GET, "/health", &[("traceparent", bad)], "").await;
        let made = answer.header("traceparent");
        assert!(made.len() == 55 && !made.contains(trace) && !made.contains("-00000000000"), "{bad}: {made}");
    }
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_other_media_types_rejected() {
    let (_world, app, topic) = gateway().await;
    let body = json!({"topic": topic, "payload": 1, "later": {"x": [1]}});
    app.post_json("/produce", &body).await.expect(200);
    app.post_json("/push", &json!({"key": "k", "value": 1, "later": true})).await.expect(202);
    for path in ["/push", "/produce"] {
        for kind in ["text/plain", "application/xml", "application/jsonx"] {
            let answer = app.request(Method::POST, path, &[("content-type", kind)], "{}").await;
            let problem = answer.problem(415, "unsupported_media_type");
            assert!(problem["detail"].as_str().unwrap().contains(kind));
        }
        // The last one is what curl sends by default.
        for kind in ["Application/JSON; charset=utf-8", "application/x-www-form-urlencoded"] {
            let answer = app.request(Method::POST, path, &[("content-type", kind)], "{}").await;
            answer.problem(400, "invalid_request");
        }
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_on_one_connection() {
    let (_world, app, topic) = gateway().await;
    let mut connection = Raw::connect(&app.api).await;
    let mut bytes = String::new();
    for number in 0..20 {
        let body = json!({"topic": topic, "key": "k", "payload": number}).to_string();
        bytes.push_str(&format!(
            "POST /produce HTTP/1.1\r\nHost: t\r\nX-Request-Id: r{number}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        bytes.push_str("GET /health HTTP/1.1\r\nHost: t\r\n\r\n");
    }
    assert!(connection.send(bytes).await);
    for number in 0..20 {
        let produced = connection.answer(seconds(10)).await.unwrap();
        assert_eq!(produced.status, 200, "{produced:?}");
        assert!(produced.head.to_lowercase().contains(&format!("x-request-id: r{number}\r\n")), "{produced:?}");
        assert_eq!(connection.answer(seconds(10)).await.unwrap().body, r#"{"status":"healthy"}"#);
    }
    assert!(connection.send("GET /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").await);
    assert_eq!(connection.answer(seconds(10)).await.unwrap().status, 200);
    assert!(connection.closes(seconds(10)).await);
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_and_counted_and_a_freed_place_is_reused() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_HTTP__MAX_CONNECTIONS", "2").start().await;
    let health = "GET /health HTTP/1.1\r\nHost: t\r\n\r\n";
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut connection = Raw::connect(&app.api).await;
        connection.send(health).await;
        assert_eq!(connection.answer(seconds(10)).await.unwrap().status, 200);
        open.push(connection);
    }
    let mut third = Raw::connect(&app.api).await;
    third.send(health).await;
    assert!(third.answer(seconds(10)).await.is_none(), "closed without an answer");
    assert!(app.metric("http_server_connections_refused_total").await.unwrap() >= 1.0);
    assert!(app.is_ready().await, "the management port has its own limit");
    drop(open);
    until("a connection is accepted again", seconds(10), || async {
        let mut connection = Raw::connect(&app.api).await;
        connection.send(health).await;
        connection.answer(seconds(10)).await.filter(|answer| answer.status == 200)
    })
    .await;
}

#[tokio::test]
async fn the_openapi_document_is_served() {
    let (_world, app, _) = gateway().await;
    let document = app.get("/openapi.json").await.expect(200).json();
    for path in ["/push", "/pull/{key}", "/produce", "/health"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
    assert!(app.get("/metrics").await.expect(200).text().contains("http_server_request_duration_seconds"));
}

#[tokio::test]
async fn http2_without_tls_works() {
    let (world, app, topic) = gateway().await;
    let stream = tokio::net::TcpStream::connect(app.api.trim_start_matches("http://")).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let requests = (0..50).map(|number| {
        let body = json!({"topic": topic, "payload": number}).to_string();
        let request = hyper::Request::post(format!("{}/produce", app.api)).body(Full::new(Bytes::from(body))).unwrap();
        sender.clone().send_request(request)
    });
    for answer in futures_util::future::join_all(requests).await {
        let answer = answer.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (200, hyper::Version::HTTP_2));
    }
    assert_eq!(world.kafka.read(&topic).await.len(), 50);
}
