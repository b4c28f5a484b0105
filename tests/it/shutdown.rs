//! Shutdown by SIGTERM: readiness fails first, then the process finishes the work that it has
//! begun.

use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use futures_util::stream;
use reqwest::Body;
use serde_json::json;
use tokio::sync::mpsc;

use crate::{
    gateway::gateway,
    harness::{
        Stack, World,
        check::{disordered, lost},
        load::{Load, Target},
        raw::Raw,
        until,
        wait::seconds,
    },
    kv::{await_complete, push},
};

#[tokio::test]
async fn under_load_every_acknowledged_write_is_in_kafka_and_the_exit_is_clean() {
    let mut world = World::new().await;
    // Longer than a shutdown may take that does not wait for the grace period.
    world.set("POSTRIDER_DRAIN__GRACE_MS", "120000");
    let topic = world.make_topic("orders", 3).await;
    let mut app = world.app().role("api").start().await;
    for _ in 0..3 {
        let load = Load::start(&app, &Target::Produce(topic.clone()), 16);
        load.more(300).await;
        app.sigterm();
        let status = app.exit(seconds(30)).await;
        assert!(status.success(), "{status}\n{}", app.log());
        let outcome = load.stop().await;
        assert!(outcome.refused.is_empty(), "{:?}", outcome.refused);
        assert_eq!(lost(&outcome.acknowledged, &world.kafka.read(&topic).await), []);
        app = world.app().role("api").start().await;
    }
}

#[tokio::test]
async fn readiness_fails_first_while_requests_are_still_served() {
    let world = World::new().await;
    let mut app = world.app().env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "10000").start().await;
    app.sigterm();
    let begun = Instant::now();
    until("readiness is false", seconds(9), || async { (!app.is_ready().await).then_some(()) }).await;
    let report = app.manage("/readyz?verbose").await.json();
    assert_eq!((&report["ready"], &report["draining"]), (&json!(false), &json!(true)));
    assert_eq!(app.manage("/livez").await.status, 200);
    push(&app, "late", &json!(1)).await;
    // The answer closes the connection, so that the client's next one reaches another process.
    let answer = reqwest::get(format!("{}/health", app.api)).await.unwrap();
    assert_eq!(answer.headers()["connection"], "close");
    let status = app.exit(seconds(30)).await;
    assert!(status.success() && begun.elapsed() >= Duration::from_millis(9_900), "{status} {:?}", begun.elapsed());
    assert_eq!(world.kafka.read(&world.topic("messages")).await.len(), 1);
}

#[tokio::test]
async fn when_a_consumer_fails_readiness_fails_at_once_requests_finish_and_the_exit_code_is_1() {
    let mut world = World::new().await;
    // A second member with the same instance id fences the first one, whose client fails
    // permanently.
    world.set("POSTRIDER_KAFKA__PROPERTIES", &json!({"group.instance.id": "one"}).to_string());
    world.set("POSTRIDER_KAFKA__CONSUMER__GROUP_PROTOCOL", "classic");
    world.set("POSTRIDER_DRAIN__GRACE_MS", "60000");
    let topic = world.make_topic("orders", 1).await;
    let mut app = world.app().start().await;
    let body = json!({"topic": topic, "payload": "slow"}).to_string();
    let mut slow = Raw::connect(&app.api).await;
    let head = format!("POST /produce HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n", body.len());
    slow.send(head + &body[..10]).await;
    until("the request is being read", seconds(5), || async {
        (app.metric("http_server_active_requests").await? >= 1.0).then_some(())
    })
    .await;
    let other = world.app().role("processor").even_if_not_ready().start().await;
    app.await_log("task failed, stopping the role", seconds(60)).await;
    // The request delays the exit, and the management port still answers.
    until("readiness is false", seconds(10), || async { (!app.is_ready().await).then_some(()) }).await;
    let report = app.manage("/readyz?verbose").await.json();
    assert_eq!((&report["ready"], &report["draining"]), (&json!(false), &json!(true)));
    assert_eq!(app.ended(), None);
    assert!(slow.send(&body[10..]).await);
    assert_eq!(slow.answer(seconds(10)).await.expect("an answer").status, 200);
    assert_eq!(app.exit(seconds(60)).await.code(), Some(1), "{}", app.log());
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
    other.stop().await;
}

#[tokio::test]
async fn when_a_consumer_fails_the_exit_does_not_wait_for_an_endless_request() {
    let mut world = World::new().await;
    world.set("POSTRIDER_KAFKA__PROPERTIES", &json!({"group.instance.id": "one"}).to_string());
    world.set("POSTRIDER_KAFKA__CONSUMER__GROUP_PROTOCOL", "classic");
    world.set("POSTRIDER_DRAIN__GRACE_MS", "1500");
    // The request itself may take this long.
    world.set("POSTRIDER_HTTP__BODY_TIMEOUT_MS", "600000");
    let mut app = world.app().start().await;
    let mut slow = Raw::connect(&app.api).await;
    slow.send("POST /produce HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{").await;
    until("the request is being read", seconds(5), || async {
        (app.metric("http_server_active_requests").await? >= 1.0).then_some(())
    })
    .await;
    let other = world.app().role("processor").even_if_not_ready().start().await;
    assert_eq!(app.exit(seconds(90)).await.code(), Some(1), "{}", app.log());
    assert!(app.log().contains("task failed, stopping the role"), "{}", app.log());
    other.stop().await;
}

#[tokio::test]
async fn a_second_signal_ends_the_process_at_once() {
    let world = World::new().await;
    for (signal, code) in [(rustix::process::Signal::TERM, 143), (rustix::process::Signal::INT, 130)] {
        let mut app = world.app().env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "20000").start().await;
        app.sigterm();
        app.await_log("draining", seconds(5)).await;
        app.signal(signal);
        // Long before the readiness delay is over.
        let status = app.exit(seconds(10)).await;
        assert_eq!(status.code(), Some(code), "{status} {:?}", status.signal());
    }
}

#[tokio::test]
async fn idle_connections_do_not_delay_the_exit_and_a_partial_request_is_finished() {
    let (world, mut app, topic) = gateway().await;
    let mut idle = Raw::connect(&app.api).await;
    idle.send("GET /health HTTP/1.1\r\nHost: t\r\n\r\n").await;
    idle.answer(seconds(5)).await.unwrap();
    let body = json!({"topic": topic, "payload": "slow"}).to_string();
    let mut slow = Raw::connect(&app.api).await;
    let head = format!("POST /produce HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n", body.len());
    slow.send(head + &body[..10]).await;
    until("the request is being read", seconds(5), || async {
        (app.metric("http_server_active_requests").await? >= 1.0).then_some(())
    })
    .await;
    app.sigterm();
    app.await_log("draining", seconds(5)).await;
    assert!(idle.closes(seconds(5)).await);
    assert!(slow.send(&body[10..]).await);
    assert_eq!(slow.answer(seconds(5)).await.expect("an answer").status, 200);
    assert!(app.exit(seconds(15)).await.success());
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
}

#[tokio::test]
async fn an_endless_stream_is_cut_off_after_the_grace_period_and_its_results_are_correct() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    let mut app = world.app().role("api").env("POSTRIDER_DRAIN__GRACE_MS", "1500").start().await;
    let (lines, sent) = mpsc::channel::<String>(4);
    let body = stream::unfold(sent, |mut sent| async move {
        sent.recv().await.map(|line| (Ok::<_, std::convert::Infallible>(line), sent))
    });
    let request = app.client.post(format!("{}/produce?topic={topic}", app.api));
    let request = request.header("content-type", "application/x-ndjson").body(Body::wrap_stream(body)).send();
    let request = tokio::spawn(request);
    lines.send("{\"payload\":1}\n".to_owned()).await.unwrap();
    let mut answer = request.await.unwrap().unwrap();
    assert!(answer.chunk().await.unwrap().is_some());
    app.sigterm();
    let status = app.exit(seconds(15)).await;
    assert!(status.success(), "{status}\n{}", app.log());
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
}

#[tokio::test]
async fn a_processor_commits_its_finished_records_and_the_next_one_starts_there() {
    let world = World::new().await;
    let api = world.app().role("api").start().await;
    let processor = world.app().role("processor").start().await;
    await_complete(&api).await;
    let load = Load::start(&api, &Target::Push, 4);
    load.more(200).await;
    // The processor may be behind the API; the next one reads the rest.
    until("the processor has projected 200 records", seconds(20), || async {
        processor.metric("postrider_kv_projected_records_total").await.filter(|&projected| projected >= 200.0)
    })
    .await;
    processor.stop().await;
    load.more(20).await;
    let next = world.app().role("processor").start().await;
    let outcome = load.stop().await;
    let expected = outcome.acknowledged.len() as f64;
    let projected = until("the next processor has caught up", seconds(20), || async {
        crate::harness::load::view(&api, 4).await;
        let view = crate::harness::load::view(&api, 4).await;
        let behind = crate::harness::check::behind(&outcome.acknowledged, &view);
        if behind.is_empty() { next.metric("postrider_kv_projected_records_total").await } else { None }
    })
    .await;
    assert!(projected < expected - 100.0, "{projected} of {expected} records were projected again");
    let log = world.kafka.read(&world.topic("messages")).await;
    assert_eq!(disordered(&log), Vec::<String>::new());
    next.stop().await;
}

#[tokio::test]
async fn without_kafka_it_ends_in_time_all_the_same() {
    let stack = Stack::own("gone", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let mut app = world.app().start().await;
    push(&app, "k", &json!(1)).await;
    stack.ctl(&["pause", "kafka"]).await;
    app.await_failing("kafka", seconds(20)).await;
    app.sigterm();
    let status = app.exit(seconds(30)).await;
    assert!(status.success(), "{status}\n{}", app.log());
    stack.ctl(&["resume", "kafka"]).await;
}
