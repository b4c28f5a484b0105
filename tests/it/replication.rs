//! Replication of postrider's own topics: settings at creation, and checks of existing topics.

use rdkafka::admin::ConfigSource;

use crate::harness::{
    Stack, World,
    wait::{seconds, until},
};

#[tokio::test]
async fn a_topic_with_one_replica_on_three_brokers_is_a_warning_and_does_not_block_readiness() {
    // With Kafka's own defaults, every topic depends on one broker.
    let more = ["--kafka-config", "min.insync.replicas=1"];
    let stack = Stack::own("replicas", &[&["--only", "kafka", "--brokers", "3"][..], &more].concat()).await;
    let world = World::on(&stack).await;
    let (unreplicated, created) = (world.topic("audit"), world.topic("comments"));
    world.kafka.create_replicated(&unreplicated, 1, 1, &[]).await;
    let app = world.app().role("api").start().await;
    assert_eq!(
        world.kafka.setting(&created, "min.insync.replicas").await,
        ("2".to_owned(), ConfigSource::DynamicTopic),
        "a created topic with three replicas does not require two in sync"
    );
    let check = until("readiness names the topic", seconds(20), || async {
        let report = app.manage("/readyz?verbose").await.expect(200).json();
        let check = report["checks"]["topic replication"].clone();
        (check["status"] == "warning").then_some(check)
    })
    .await;
    let detail = check["detail"].as_str().unwrap();
    assert!(detail.contains(&unreplicated) && detail.contains("1 replica") && !detail.contains(&created), "{detail}");
    let metrics = app.manage("/metrics").await.text();
    for (topic, ok, replicas) in [(&unreplicated, 0, 1), (&created, 1, 3)] {
        assert!(metrics.contains(&format!("postrider_topic_replication_ok{{topic=\"{topic}\"}} {ok}\n")), "{metrics}");
        assert!(metrics.contains(&format!("postrider_topic_replicas{{topic=\"{topic}\"}} {replicas}\n")), "{metrics}");
    }
    app.await_log("topic replication below configuration", seconds(5)).await;
    app.stop().await;
}

#[tokio::test]
async fn a_minimum_of_replicas_in_sync_above_the_replication_factor_is_refused_and_creates_no_topic() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_KAFKA__TOPICS__REPLICATION_FACTOR", "1");
    let app = app.env("POSTRIDER_KAFKA__TOPICS__MIN_INSYNC_REPLICAS", "2").even_if_not_ready().start().await;
    let problem = until("readiness names the setting", seconds(20), || async {
        app.failing("topics").await.filter(|problem| problem.contains("kafka.topics.min_insync_replicas"))
    })
    .await;
    assert!(problem.contains("is 2, above the 1 replicas"), "{problem}");
    assert_eq!(world.kafka.partitions(&world.topic("messages")).await, None);
    app.stop().await;
}
