//! Clients that send slowly, or do not read their responses, cannot push the process past its
//! memory limit, and other clients are still served.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use serde_json::json;
use tokio::{net::TcpStream, task::JoinSet};

use crate::{
    comments_stream::STREAM,
    harness::{
        App, World,
        raw::Raw,
        sse::Stream,
        wait::{seconds, until},
    },
    kv::{await_complete, pull_after, push, running},
};

const MIB: u64 = 1 << 20;

/// Opens HTTP/2 requests on one connection whose client never accepts a byte of any body.
async fn stalled(app: &App, path: &str, count: usize) -> JoinSet<()> {
    let stream = TcpStream::connect(app.api.trim_start_matches("http://")).await.unwrap();
    let (client, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let _ = connection.await;
    });
    for _ in 0..count {
        let mut client: SendRequest<Bytes> = client.clone().ready().await.unwrap();
        let request = hyper::Request::get(format!("{}{path}", app.api)).body(()).unwrap();
        let (answer, _) = client.send_request(request, true).unwrap();
        tasks.spawn(async move {
            if let Ok(answer) = answer.await {
                // The body is kept open and never read.
                let _body = answer.into_body();
                std::future::pending::<()>().await;
            }
        });
    }
    tasks
}

#[tokio::test]
async fn http2_streams_whose_client_reads_nothing_are_closed() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_HTTP__WRITE_TIMEOUT_MS", "1000");
    world.set("POSTRIDER_COMMENTS__STREAM_HEARTBEAT_MS", "200");
    let app = world.app().start().await;
    await_complete(&app).await;
    let healthy = Stream::open(&app, STREAM, "").await;
    let position = push(&app, "big", &json!("x".repeat(500_000))).await;
    pull_after(&app, "big", &position).await.expect(200);
    let mut held = Vec::new();
    for path in [STREAM, "/pull/big"] {
        held.push(stalled(&app, path, 200).await);
    }
    until("all streams are open", seconds(20), || async {
        (app.metric("postrider_comments_open_streams").await > Some(150.0)).then_some(())
    })
    .await;
    until("all stalled streams are closed", seconds(60), || async {
        let open = app.metric("postrider_comments_open_streams").await;
        let ended = app.metric("http_server_stalled_streams_total").await;
        (open == Some(1.0) && ended >= Some(400.0)).then_some(())
    })
    .await;
    let heartbeats = healthy.seen().heartbeats;
    until("the healthy stream still gets heartbeats", seconds(20), || async {
        (healthy.seen().heartbeats > heartbeats).then_some(())
    })
    .await;
    drop(held);
    app.stop().await;
}

/// Opens raw connections that send one request and then read nothing.
async fn slow(app: &App, count: usize, request: impl Fn(usize) -> String) -> Vec<Raw> {
    let mut held = Vec::new();
    for number in 0..count {
        let mut raw = Raw::narrow(&app.api).await;
        raw.send(request(number)).await;
        held.push(raw);
    }
    held
}

/// Starts uploads that stall shortly before their end. A refused upload ends by itself.
fn uploads(app: &App, count: usize) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let api = app.api.clone();
        tasks.spawn(async move {
            let mut raw = Raw::connect(&api).await;
            let head =
                "POST /push HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n";
            raw.send(head).await;
            for _ in 0..90 {
                if !raw.send([b' '; 10_000]).await {
                    return;
                }
            }
            std::future::pending::<()>().await;
        });
    }
    tasks
}

#[tokio::test]
async fn slow_clients_stay_within_the_memory_limit_and_others_are_served() {
    const LIMIT: u64 = 200 * MIB;
    let mut world = World::new().await.with_postgres().await;
    for (name, value) in [
        ("MEMORY__LIMIT_BYTES", LIMIT.to_string()),
        ("HTTP__BODY_TIMEOUT_MS", "300000".to_owned()),
        ("HTTP__WRITE_TIMEOUT_MS", "300000".to_owned()),
        ("COMMENTS__MAX_STREAMS", "2000".to_owned()),
        ("MESSAGES__IDLE_TIMEOUT_MS", "300000".to_owned()),
        ("POSTGRES__MAX_CONNECTIONS", "8".to_owned()),
    ] {
        world.set(&format!("POSTRIDER_{name}"), &value);
    }
    let processor = world.app().role("processor").start().await;
    let app = world.app().role("api").start().await;
    await_complete(&app).await;
    let beginning = Stream::open(&app, STREAM, "").await;
    let beginning = until("the stream sends its first id", seconds(20), || async {
        Some(beginning.seen().last_id).filter(|id| !id.is_empty())
    })
    .await;
    let position = push(&app, "big", &json!("x".repeat(900_000))).await;
    pull_after(&app, "big", &position).await.expect(200);
    for number in 0..30 {
        app.post_json("/api/v1/comments", &json!({"text": format!("{number} {}", "c".repeat(60_000))}))
            .await
            .expect(200);
    }
    for receiver in 0..32 {
        for number in 0..20 {
            let content = format!("{number} {}", "m".repeat(20_000));
            let message =
                json!({"chatId": "c", "senderId": "s", "receiverId": format!("r{receiver}"), "content": content});
            app.post_json("/api/v1/message/action", &message).await.expect(200);
        }
    }
    until("all comments and messages are stored", seconds(60), || async {
        (world.count("comments").await == 30 && world.count("messages").await == 640).then_some(())
    })
    .await;
    let idle_kib = app.rss_kib();
    let uploads = uploads(&app, 700);
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(stalled(&app, "/pull/big", 256).await);
    }
    let catching_up =
        slow(&app, 1_000, |_| format!("GET {STREAM}?after={beginning} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
    let sockets = slow(&app, 2_000, |number| {
        format!(
            "GET /api/v1/websocket/message?receiverId=r{} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            number % 32
        )
    })
    .await;
    let mut peak_kib = 0;
    for number in 0..200 {
        app.get("/health").await.expect(200);
        let position = push(&app, "small", &json!(number)).await;
        assert_eq!(pull_after(&app, "small", &position).await.expect(200).json()["value"], number);
        peak_kib = peak_kib.max(app.rss_kib());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The budgets take 60 % of the container's limit.
    let container_kib = LIMIT / 60 * 100 / 1024;
    assert!(peak_kib < container_kib, "{idle_kib} KiB idle, {peak_kib} KiB peak, {container_kib} KiB allowed");
    eprintln!("{idle_kib} KiB idle, {peak_kib} KiB peak");
    for budget in ["requests", "responses", "queues"] {
        let refused = app.metric(&format!("postrider_memory_refused_total{{budget=\"{budget}\"}}")).await;
        let used = app.metric(&format!("postrider_memory_used_bytes{{budget=\"{budget}\"}}")).await;
        eprintln!("{budget}: {used:?} used, {refused:?} refused");
    }
    drop((uploads, streams, catching_up, sockets));
    until("all memory budgets are free", seconds(60), || async {
        for budget in ["small_requests", "requests", "responses", "queues"] {
            let used = app.metric(&format!("postrider_memory_used_bytes{{budget=\"{budget}\"}}")).await;
            if used != Some(0.0) {
                return None;
            }
        }
        Some(())
    })
    .await;
    app.stop().await;
    processor.stop().await;
}

#[tokio::test]
async fn consumers_work_with_very_little_memory() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MEMORY__LIMIT_BYTES", "10000000");
    world.set("POSTRIDER_KAFKA__CONSUMER__PREFETCH_KIB", "1");
    let app = running(&world).await;
    let position = push(&app, "k", &json!(1)).await;
    assert_eq!(pull_after(&app, "k", &position).await.expect(200).json()["value"], 1);
    app.stop().await;
}
