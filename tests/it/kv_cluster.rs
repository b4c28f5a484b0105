//! The key-value view in a Redis Cluster, and the rotation of its URL.

use serde_json::json;

use crate::{
    harness::{Stack, World, redis, until, wait::seconds},
    kv::{pull_after, push, running},
    rotation::{Secret, await_refused, await_replaced, started, with_redis},
};

#[tokio::test]
async fn a_cluster_serves_the_view_and_a_shard_that_lost_its_data_is_rebuilt() {
    let stack = Stack::own("cluster", &["--only", "redis", "--redis-cluster"]).await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_REDIS__URL", stack.get("REDIS_CLUSTER_URLS"));
    world.set("POSTRIDER_REDIS__CLUSTER", "true");
    world.set("POSTRIDER_KV__PARTITIONS", "9");
    let app = running(&world).await;
    for number in 0..90 {
        let position = push(&app, &format!("k{number}"), &json!(number)).await;
        pull_after(&app, &format!("k{number}"), &position).await.expect(200);
    }
    let nodes: Vec<&str> = stack.get("REDIS_CLUSTER_URLS").split(',').collect();
    assert_eq!(nodes.len(), 3);
    for node in &nodes {
        assert!(redis::run::<usize>(node, &["DBSIZE"]).await > 0, "every shard has a part of the view");
    }
    redis::run::<String>(nodes[1], &["FLUSHALL"]).await;
    let mut rebuilt = 0;
    for number in 0..90 {
        let path = format!("/pull/k{number}");
        let answer = until(&path, seconds(30), || async {
            let answer = app.get(&path).await;
            assert_ne!(answer.status, 404, "k{number} was pushed");
            (answer.status == 200).then_some(answer)
        })
        .await;
        assert_eq!(answer.json()["value"], number);
        rebuilt += 1;
    }
    assert_eq!(rebuilt, 90);
    assert!(app.metric("postrider_kv_rebuilds_total").await.is_some());
    for number in 0..20 {
        let body = json!({"key": format!("i{number}"), "value": 1});
        app.post_with("/push", &[("idempotency-key", "i")], &body).await.expect(202);
    }
    for (bound, least) in [("idempotency_ids", 20.0), ("redis_memory", 1.0)] {
        until(&format!("{bound} of all shards is measured"), seconds(30), || async {
            app.metric(&format!(r#"postrider_bound_used{{bound="{bound}"}}"#)).await.filter(|&used| used >= least)
        })
        .await;
    }
    app.stop().await;
}

#[tokio::test]
async fn a_process_restarts_for_a_rotated_cluster_url_and_keeps_its_rotation_lease_there() {
    let stack = Stack::own("cluster-rotation", &["--only", "redis", "--redis-cluster"]).await;
    let mut world = World::on(&stack).await;
    let urls = stack.get("REDIS_CLUSTER_URLS");
    world.set("POSTRIDER_REDIS__CLUSTER", "true");
    let secret = Secret::new(&world, "redis-cluster", urls);
    let mut app = with_redis(world.app().role("api"), &secret).start().await;
    let before = started(&app).await;
    secret.set("redis://127.0.0.1:1");
    await_refused(&app, "redis", true).await;
    let mut nodes: Vec<&str> = urls.split(',').collect();
    nodes.reverse();
    secret.set(&nodes.join(","));
    await_replaced(&mut app, before).await;
    let lease = format!("{}:rotation:api", world.prefix);
    until("the lease is released", seconds(30), || async {
        let mut held = 0;
        for node in &nodes {
            held += redis::run::<Vec<String>>(node, &["KEYS", &lease]).await.len();
        }
        (held == 0).then_some(())
    })
    .await;
    app.await_log("ready again, rotation lease released", seconds(30)).await;
    app.stop().await;
}
