//! Server outages: processes refuse requests quickly with the right code, and lose no acknowledged
//! write.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        check::{Write, disordered, leaked, lost},
        kafka::Stored,
        load::{Load, Outcome, Target},
        until,
        wait::seconds,
    },
    kv::{pull_after, push, running},
};

const REFUSED: &str = "kafka_unavailable";
const UNKNOWN: &str = "outcome_unknown";

/// Bound for an immediate answer: far below the delivery timeout of a patient process.
const AT_ONCE: Duration = seconds(30);

/// Starts an API process that waits two minutes for the broker's confirmation of a record.
async fn patient(world: &World) -> App {
    world.app().role("api").env("POSTRIDER_KAFKA__PRODUCER__DELIVERY_TIMEOUT_MS", "120000").start().await
}

/// Checks that the log has all acknowledged writes, no refused ones, and no duplicates.
fn assert_honest(outcome: &Outcome, log: &[Stored]) {
    outcome.expect_only(&[REFUSED, UNKNOWN]);
    assert_eq!(lost(&outcome.acknowledged, log), Vec::<Write>::new());
    assert_eq!(leaked(&outcome.refused_as(REFUSED), log), Vec::<Write>::new());
    assert_eq!(disordered(log), Vec::<String>::new());
}

/// Returns the log without the records that the test wrote in addition to the load.
fn of_writers(log: Vec<Stored>) -> Vec<Stored> {
    log.into_iter().filter(|record| record.key.is_some()).collect()
}

async fn produce(app: &App, topic: &str) -> crate::harness::Answer {
    app.post_json("/produce", &json!({"topic": topic, "payload": "one"})).await
}

#[tokio::test]
async fn without_a_broker_writes_are_refused_in_time_and_resume_when_it_is_back() {
    let stack = Stack::own("broker", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let topic = world.make_topic("orders", 3).await;
    let (app, patient) = (world.app().role("api").start().await, patient(&world).await);
    let load = Load::start(&app, &Target::Produce(topic.clone()), 4);
    load.more(100).await;
    produce(&patient, &topic).await.expect(200);
    stack.ctl(&["kill", "kafka"]).await;
    let detail = app.await_failing("kafka", seconds(10)).await;
    assert!(detail.contains("no broker answers"), "{detail}");
    assert!(!app.is_ready().await);
    patient.await_failing("kafka", seconds(30)).await;
    let asked = Instant::now();
    let problem = produce(&patient, &topic).await.problem(503, REFUSED);
    assert_eq!(problem["success"], false);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    app.post_json("/push", &json!({"key": "k", "value": 1})).await.problem(503, REFUSED);
    assert_eq!(app.manage("/livez").await.status, 200, "a restart would not help");
    load.each_refused().await;
    stack.ctl(&["start", "kafka"]).await;
    app.await_ready(seconds(20)).await;
    load.more(100).await;
    let outcome = load.stop().await;
    assert!(!outcome.refused_as(REFUSED).is_empty());
    assert_honest(&outcome, &of_writers(world.kafka.read(&topic).await));
    app.stop().await;
    patient.stop().await;
}

#[tokio::test]
async fn a_broker_that_hangs_leaves_outcomes_unknown_in_time_and_recovers() {
    let stack = Stack::own("hung", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let topic = world.make_topic("orders", 3).await;
    let app = world.app().role("api").env("POSTRIDER_KAFKA__PRODUCER__DELIVERY_TIMEOUT_MS", "4000").start().await;
    let patient = patient(&world).await;
    let load = Load::start(&app, &Target::Produce(topic.clone()), 4);
    load.more(100).await;
    produce(&patient, &topic).await.expect(200);
    stack.ctl(&["pause", "kafka"]).await;
    for app in [&app, &patient] {
        app.await_failing("kafka", seconds(30)).await;
    }
    let asked = Instant::now();
    produce(&patient, &topic).await.problem(503, REFUSED);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    load.each_refused().await;
    stack.ctl(&["resume", "kafka"]).await;
    app.await_ready(seconds(20)).await;
    load.more(100).await;
    let outcome = load.stop().await;
    assert_honest(&outcome, &of_writers(world.kafka.read(&topic).await));
    app.stop().await;
    patient.stop().await;
}

#[tokio::test]
async fn one_of_three_brokers_killed_loses_nothing_and_refuses_no_longer_than_an_election() {
    let stack = Stack::own("three", &["--only", "kafka", "--brokers", "3"]).await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_KAFKA__TOPICS__REPLICATION_FACTOR", "3");
    let topic = world.make_topic("orders", 6).await;
    let app = world.app().start().await;
    let produced = Load::start(&app, &Target::Produce(topic.clone()), 6);
    let pushed = Load::start(&app, &Target::Push, 3);
    produced.more(100).await;
    for broker in ["kafka-1", "kafka-2"] {
        stack.ctl(&["kill", broker]).await;
        produced.each_more(30).await;
        pushed.each_more(30).await;
        stack.ctl(&["start", broker]).await;
        world.kafka.await_in_sync(&topic, 3).await;
        world.kafka.await_in_sync(&world.topic("messages"), 3).await;
    }
    let (produced, pushed) = (produced.stop().await, pushed.stop().await);
    for (outcome, topic) in [(&produced, topic.clone()), (&pushed, world.topic("messages"))] {
        assert_honest(outcome, &world.kafka.read(&topic).await);
    }
    without_a_quorum(&stack, &app, &topic).await;
    app.stop().await;
}

/// Kills two of three brokers: writes are refused until the brokers are back.
async fn without_a_quorum(stack: &Stack, app: &App, topic: &str) {
    stack.ctl(&["kill", "kafka-1", "kafka-2"]).await;
    until("a write is refused", seconds(30), || async { (produce(app, topic).await.status == 503).then_some(()) })
        .await;
    stack.ctl(&["start", "kafka-1", "kafka-2"]).await;
    until("writes succeed again", seconds(60), || async { (produce(app, topic).await.status == 200).then_some(()) })
        .await;
}

#[tokio::test]
async fn without_a_broker_reads_are_served_unless_their_audit_is_required() {
    let stack = Stack::own("audit", &["--only", "kafka"]).await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_KAFKA__PRODUCER__DELIVERY_TIMEOUT_MS", "120000");
    let app = running(&world).await;
    let strict = world.app().role("api").env("POSTRIDER_KV__AUDIT", "required").start().await;
    let position = push(&app, "k", &json!(1)).await;
    pull_after(&app, "k", &position).await.expect(200);
    strict.get("/pull/k").await.expect(200);
    stack.ctl(&["kill", "kafka"]).await;
    for app in [&app, &strict] {
        app.await_failing("kafka", seconds(10)).await;
    }
    let asked = Instant::now();
    assert_eq!(app.get("/pull/k").await.expect(200).json()["value"], 1);
    app.get("/pull/none").await.problem(404, "key_not_found");
    strict.get("/pull/k").await.problem(503, REFUSED);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    assert!(app.metric("postrider_kv_audit_dropped_total").await.unwrap() >= 2.0);
    stack.ctl(&["start", "kafka"]).await;
    for app in [app, strict] {
        app.await_ready(seconds(20)).await;
        app.get("/pull/k").await.expect(200);
        app.stop().await;
    }
}

#[tokio::test]
async fn without_redis_only_reads_are_refused_and_the_view_catches_up_afterwards() {
    let stack = Stack::own("noredis", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    let position = push(&app, "k", &json!(1)).await;
    pull_after(&app, "k", &position).await.expect(200);
    stack.ctl(&["stop", "redis"]).await;
    // The answer comes while Redis is down. The client would time out after a minute.
    app.get("/pull/k").await.problem(503, "redis_unavailable");
    app.await_failing("redis", seconds(10)).await;
    let mut position = String::new();
    for number in 2..50 {
        position = push(&app, "k", &json!(number)).await;
    }
    stack.ctl(&["start", "redis"]).await;
    let pulled = pull_after(&app, "k", &position).await.expect(200);
    assert_eq!(pulled.json()["value"], 49);
    app.await_ready(seconds(10)).await;
    app.stop().await;
}

#[tokio::test]
async fn the_process_reconnects_to_a_restarted_postgres() {
    let stack = Stack::own("pg", &["--only", "postgres"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().start().await;
    assert_eq!(app.failing("postgres").await, None);
    for how in ["--immediate", "--kill"] {
        stack.ctl(&["restart", "postgres", how]).await;
        app.await_ready(seconds(20)).await;
    }
    stack.ctl(&["stop", "postgres"]).await;
    let detail = app.await_failing("postgres", seconds(15)).await;
    assert!(detail.contains("Postgres does not answer"), "{detail}");
    push(&app, "k", &json!("needs no Postgres")).await;
    stack.ctl(&["start", "postgres"]).await;
    app.await_ready(seconds(20)).await;
    app.stop().await;
}

#[tokio::test]
async fn a_process_that_starts_before_its_servers_waits_for_them() {
    let stack = Stack::own("late", &["--only", "kafka,redis"]).await;
    let world = World::on(&stack).await;
    stack.ctl(&["kill", "all"]).await;
    let app = world.app().even_if_not_ready().start().await;
    for check in ["kafka", "redis"] {
        app.await_failing(check, seconds(15)).await;
    }
    assert_eq!(app.manage("/startupz").await.status, 503);
    stack.ctl(&["start", "kafka", "redis"]).await;
    app.await_ready(seconds(30)).await;
    assert_eq!(app.manage("/startupz").await.status, 200);
    let position = push(&app, "k", &json!(1)).await;
    let answer = until("the view has the value", seconds(20), || async {
        Some(pull_after(&app, "k", &position).await).filter(|answer| answer.status == 200)
    });
    assert_eq!(answer.await.json()["value"], 1);
    app.stop().await;
}
