//! After Redis loses data or a processor crashes, the view is rebuilt, answers 503 to misses until
//! then, and never returns older values.

use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        check::{behind, lost},
        kafka::latest,
        load::{Load, Readers, Target, view},
        redis, until,
        wait::seconds,
    },
    kv::{await_complete, pull_after, push, running},
};

const WRITERS: usize = 6;

/// Writers and readers of the view.
struct Traffic {
    load: Load,
    readers: Readers,
}

impl Traffic {
    fn start(app: &App) -> Self {
        Self { load: Load::start(app, &Target::Push, WRITERS), readers: Readers::start(app, WRITERS) }
    }

    /// Stops the traffic, and asserts that no write was lost, hidden or reverted.
    async fn settle(self, world: &World, app: &App) {
        let outcome = self.load.stop().await;
        // A busy machine may delay the broker for some seconds. Writes that fail for that are not
        // stored.
        outcome.expect_only(&["kafka_unavailable"]);
        self.readers.sights(50).await;
        let watch = self.readers.stop().await;
        assert_eq!(watch.faults, Vec::<String>::new());
        assert_settled(world, app, &outcome.acknowledged).await;
    }
}

/// Asserts that the view has every acknowledged write, and matches the last record of each key in
/// the topic.
async fn assert_settled(world: &World, app: &App, acknowledged: &[(String, u64)]) {
    let log = world.kafka.read(&world.topic("messages")).await;
    assert_eq!(lost(acknowledged, &log), []);
    let expected = latest(&log);
    for (key, value) in &expected {
        until(&format!("{key} matches the topic"), seconds(30), || async {
            let answer = app.get(&format!("/pull/{key}")).await;
            (answer.status == 200 && Some(&answer.json()["value"]) == value.as_ref()).then_some(())
        })
        .await;
    }
    assert_eq!(behind(acknowledged, &view(app, WRITERS).await), Vec::<String>::new());
}

#[tokio::test]
async fn after_flushall_the_view_is_rebuilt_without_a_false_404_or_an_older_value() {
    let stack = Stack::own("flush", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    for number in 0..300 {
        push(&app, &format!("still{number}"), &json!(number)).await;
    }
    let traffic = Traffic::start(&app);
    for _ in 0..3 {
        traffic.load.more(100).await;
        redis::run::<String>(&world.redis_url, &["FLUSHALL"]).await;
        for number in [0, 150, 299] {
            let answer = until("the view answers", seconds(30), || async {
                Some(app.get(&format!("/pull/still{number}")).await).filter(|answer| answer.status != 503)
            })
            .await;
            assert_eq!(answer.expect(200).json()["value"], number);
        }
    }
    traffic.settle(&world, &app).await;
    assert!(app.metric("postrider_kv_rebuilds_total").await.is_some_and(|count| count >= 1.0));
    app.stop().await;
}

#[tokio::test]
async fn a_view_without_traffic_is_rebuilt_and_misses_are_503_until_then() {
    let stack = Stack::own("quiet", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    let position = push(&app, "k", &json!("v")).await;
    pull_after(&app, "k", &position).await.expect(200);
    redis::run::<String>(&world.redis_url, &["FLUSHALL"]).await;
    let back = until("the value is back", seconds(20), || async {
        let answer = app.get("/pull/k").await;
        if answer.status == 503 {
            answer.problem(503, "rebuilding");
            return None;
        }
        Some(answer)
    });
    assert_eq!(back.await.expect(200).json()["value"], "v");
    app.get("/pull/none0").await.problem(404, "key_not_found");
}

#[tokio::test]
async fn after_redis_was_rolled_back_no_value_is_reverted() {
    let stack = Stack::own("rollback", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    let traffic = Traffic::start(&app);
    traffic.load.more(150).await;
    redis::run::<String>(&world.redis_url, &["SAVE"]).await;
    traffic.load.more(300).await;
    stack.ctl(&["kill", "redis"]).await;
    stack.ctl(&["start", "redis"]).await;
    traffic.load.more(150).await;
    traffic.settle(&world, &app).await;
}

#[tokio::test]
async fn after_redis_restarts_empty_the_view_is_rebuilt() {
    let stack = Stack::own("empty", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    let traffic = Traffic::start(&app);
    traffic.load.more(150).await;
    stack.ctl(&["restart", "redis", "--kill"]).await;
    traffic.load.more(150).await;
    traffic.settle(&world, &app).await;
}

#[tokio::test]
async fn a_processor_killed_under_load_loses_and_reverts_nothing() {
    let world = World::new().await;
    let api = world.app().role("api").start().await;
    let mut processor = world.app().role("processor").start().await;
    await_complete(&api).await;
    let traffic = Traffic::start(&api);
    for _ in 0..2 {
        traffic.load.more(150).await;
        processor.kill().await;
        traffic.load.more(50).await;
        processor = world.app().role("processor").start().await;
    }
    traffic.load.more(150).await;
    traffic.settle(&world, &api).await;
    processor.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn processors_that_start_and_stop_hand_over_without_loss() {
    let world = World::new().await;
    let api = world.app().role("api").start().await;
    let mut processor = world.app().role("processor").start().await;
    await_complete(&api).await;
    let traffic = Traffic::start(&api);
    for _ in 0..3 {
        let next = world.app().role("processor").start().await;
        next.await_log("partitions assigned", seconds(20)).await;
        traffic.load.more(50).await;
        processor.stop().await;
        traffic.load.more(50).await;
        processor = next;
    }
    traffic.settle(&world, &api).await;
    processor.stop().await;
}

#[tokio::test]
async fn a_wrong_partition_count_is_rejected_with_instructions() {
    let mut world = World::new().await;
    let settings = [("cleanup.policy", "compact"), ("message.timestamp.type", "LogAppendTime")];
    world.kafka.create_with(&world.topic("messages"), 3, &settings).await;
    let app = world.app().even_if_not_ready().start().await;
    let detail = until("readiness reports the reason", seconds(20), || async {
        app.failing("topics").await.filter(|detail| detail.contains("partitions"))
    })
    .await;
    for word in [world.topic("messages").as_str(), "3", "2", "kv.partitions", "kv.epoch"] {
        assert!(detail.contains(word), "{word} in {detail}");
    }
    assert!(!app.is_ready().await);
    app.stop().await;
    world.set("POSTRIDER_KV__PARTITIONS", "3");
    world.app().start().await.stop().await;
}

#[tokio::test]
async fn a_topic_with_the_wrong_cleanup_policy_is_rejected_with_the_command_that_fixes_it() {
    let world = World::new().await;
    world.kafka.create_with(&world.topic("messages"), 2, &[("cleanup.policy", "delete")]).await;
    let app = world.app().even_if_not_ready().start().await;
    let detail = until("readiness reports the reason", seconds(20), || async {
        app.failing("topics").await.filter(|detail| detail.contains("cleanup.policy"))
    })
    .await;
    assert!(detail.contains("kafka-configs.sh") && detail.contains("cleanup.policy=compact"), "{detail}");
}

#[tokio::test]
async fn a_replaced_topic_is_rejected_until_the_epoch_is_raised() {
    let mut world = World::new().await;
    let app = running(&world).await;
    let mut position = String::new();
    for number in 0..10 {
        position = push(&app, "k", &json!(number)).await;
    }
    pull_after(&app, "k", &position).await.expect(200);
    app.stop().await;
    world.kafka.remove_and_wait(&world.topic("messages")).await;
    let app = world.app().even_if_not_ready().start().await;
    let detail = until("readiness reports the reason", seconds(20), || async {
        app.failing("kv view").await.filter(|detail| detail.contains("epoch"))
    })
    .await;
    assert!(detail.contains("raise `kv.epoch`"), "{detail}");
    app.stop().await;
    world.set("POSTRIDER_KV__EPOCH", "1");
    let app = running(&world).await;
    let position = push(&app, "k", &json!("new")).await;
    assert!(position.ends_with(".1"), "{position}");
    assert_eq!(pull_after(&app, "k", &position).await.expect(200).json()["value"], "new");
    app.stop().await;
}
