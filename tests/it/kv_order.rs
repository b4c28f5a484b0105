//! Duplicates of older writes change nothing: the view and the topic keep the newest value.

use serde_json::json;

use crate::{
    harness::{App, Stack, World, kafka::latest, redis, until, wait::seconds},
    kv::{await_complete, pull_after, running},
};

/// Writes A=1 with the idempotency key K, A=2, and A=1 with K again: the retry of a client that
/// missed its answer.
async fn late_duplicate(app: &App) -> String {
    let retried = json!({"key": "A", "value": 1});
    app.post_with("/push", &[("idempotency-key", "K")], &retried).await.expect(202);
    app.post_json("/push", &json!({"key": "A", "value": 2})).await.expect(202);
    let answer = app.post_with("/push", &[("idempotency-key", "K")], &retried).await.expect(202);
    answer.header("postrider-position").to_owned()
}

async fn await_last_record_two(world: &World) {
    let topic = world.topic("messages");
    until("the topic's last record of A is 2", seconds(15), || async {
        (latest(&world.kafka.read(&topic).await)["A"] == Some(json!(2))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_late_duplicate_of_an_older_write_changes_nothing() {
    let world = World::new().await;
    let app = running(&world).await;
    let position = late_duplicate(&app).await;
    assert_eq!(pull_after(&app, "A", &position).await.json()["value"], 2);
    await_last_record_two(&world).await;
    assert_eq!(app.get("/pull/A").await.json()["value"], 2);
}

#[tokio::test]
async fn a_late_duplicate_changes_nothing_after_redis_has_lost_everything() {
    let stack = Stack::own("double", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    let position = late_duplicate(&app).await;
    pull_after(&app, "A", &position).await.expect(200);
    for _ in 0..2 {
        redis::run::<String>(&world.redis_url, &["FLUSHALL"]).await;
        let retried = json!({"key": "A", "value": 1});
        let answer = app.post_with("/push", &[("idempotency-key", "K")], &retried).await.expect(202);
        await_complete(&app).await;
        let pulled = pull_after(&app, "A", answer.header("postrider-position")).await;
        assert_eq!(pulled.json()["value"], 2);
        await_last_record_two(&world).await;
    }
}

#[tokio::test]
async fn a_late_duplicate_while_no_processor_runs_changes_nothing_either() {
    let world = World::new().await;
    let api = world.app().role("api").start().await;
    let position = late_duplicate(&api).await;
    let processor = world.app().role("processor").start().await;
    assert_eq!(pull_after(&api, "A", &position).await.json()["value"], 2);
    await_last_record_two(&world).await;
    processor.stop().await;
}

#[tokio::test]
async fn a_duplicate_of_a_delete_does_not_delete_a_newer_value() {
    let world = World::new().await;
    let app = running(&world).await;
    let delete = || app.request(reqwest::Method::DELETE, "/pull/A", &[("idempotency-key", "D")], "");
    delete().await.expect(202);
    app.post_json("/push", &json!({"key": "A", "value": 2})).await.expect(202);
    let answer = delete().await.expect(202);
    let pulled = pull_after(&app, "A", answer.header("postrider-position")).await;
    assert_eq!(pulled.expect(200).json()["value"], 2);
    await_last_record_two(&world).await;
}
