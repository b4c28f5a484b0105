//! Connections to Redis and Postgres that stay open but stop answering are replaced, and the
//! Postgres pool keeps its size.

use futures_util::future::join_all;
use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        proxy::{Mode, Proxy},
        redis,
        wait::{seconds, until},
    },
    kv::{pull_after, push, running},
};

/// Creates a world that reaches Redis and Postgres through proxies.
async fn world_behind(redis: &Proxy, postgres: &Proxy) -> World {
    let mut world = World::new().await.with_postgres().await;
    world.reach_through(redis, postgres);
    world
}

/// Writes a value and waits until it can be read.
async fn await_view(app: &App, value: i32) {
    let position = push(app, "k", &json!(value)).await;
    assert_eq!(pull_after(app, "k", &position).await.json()["value"], value);
}

#[tokio::test]
async fn a_redis_connection_that_stops_answering_is_replaced() {
    let [proxy, postgres] = [Proxy::start().await, Proxy::start().await];
    let world = world_behind(&proxy, &postgres).await;
    let app = running(&world).await;
    await_view(&app, 1).await;
    for round in 0..3 {
        proxy.set(Mode::BlackHole);
        app.await_failing("redis", seconds(20)).await;
        proxy.set(Mode::Pass);
        app.await_ready(seconds(20)).await;
        await_view(&app, 2 + round).await;
    }
    let replaced = "postrider_redis_connections_replaced_total{reason=\"silent\"}";
    assert!(app.metric(replaced).await >= Some(3.0));
    app.stop().await;
}

#[tokio::test]
async fn connections_to_a_demoted_redis_primary_are_replaced() {
    let (old, new) =
        (Stack::own("demoted", &["--only", "redis"]).await, Stack::own("promoted", &["--only", "redis"]).await);
    let proxy = Proxy::start().await;
    proxy.lead_to(old.get("REDIS_URL").trim_start_matches("redis://"));
    let mut world = World::new().await;
    world.set("POSTRIDER_REDIS__URL", &format!("redis://{}", proxy.address));
    let app = running(&world).await;
    await_view(&app, 1).await;
    // As in a failover: the address leads to the new primary, and connections to the old one stay
    // open.
    let new_primary = new.get("REDIS_URL").trim_start_matches("redis://");
    let (host, port) = new_primary.split_once(':').unwrap();
    proxy.lead_to(new_primary);
    let _: String = redis::run(old.get("REDIS_URL"), &["REPLICAOF", host, port]).await;
    await_view(&app, 2).await;
    let replaced = "postrider_redis_connections_replaced_total{reason=\"read_only\"}";
    assert!(app.metric(replaced).await >= Some(1.0));
    app.stop().await;
}

#[tokio::test]
async fn a_cluster_shard_that_stops_answering_is_reconnected() {
    let stack = Stack::own("silent-shard", &["--only", "redis", "--redis-cluster"]).await;
    let urls: Vec<&str> = stack.get("REDIS_CLUSTER_URLS").split(',').collect();
    let [silent, other] = [urls[1], urls[0]].map(|url| url.trim_start_matches("redis://"));
    let proxy = Proxy::start().await;
    proxy.lead_to(silent);
    // From here on, the cluster announces the proxy as the address of this shard.
    let (port, announced) = (silent.rsplit_once(':').unwrap().1, proxy.address.port().to_string());
    let _: String = redis::run(urls[1], &["CONFIG", "SET", "cluster-announce-port", &announced]).await;
    until("all shards announce the proxy", seconds(30), || async {
        let mut replies = Vec::new();
        for url in &urls {
            replies.push(redis::run::<String>(url, &["CLUSTER", "NODES"]).await);
        }
        replies.iter().all(|nodes| nodes.contains(&announced) && !nodes.contains(&format!(":{port}@"))).then_some(())
    })
    .await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_REDIS__URL", &format!("redis://{other}"));
    world.set("POSTRIDER_REDIS__CLUSTER", "true");
    world.set("POSTRIDER_KV__PARTITIONS", "9");
    let app = running(&world).await;
    let keys: Vec<String> = (0..30).map(|number| format!("k{number}")).collect();
    for round in 0..3 {
        let mut positions = Vec::new();
        for key in &keys {
            positions.push(push(&app, key, &json!(round)).await);
        }
        for (key, position) in keys.iter().zip(&positions) {
            assert_eq!(pull_after(&app, key, position).await.expect(200).json()["value"], round, "{key}");
        }
        proxy.set(Mode::BlackHole);
        let pull = async |key: &String| app.get(&format!("/pull/{key}")).await.status;
        until("a pull fails", seconds(30), || async {
            let answers = join_all(keys.iter().map(pull)).await;
            answers.iter().any(|status| *status != 200).then_some(())
        })
        .await;
        proxy.set(Mode::Pass);
    }
    for key in &keys {
        let position = push(&app, key, &json!("end")).await;
        assert_eq!(pull_after(&app, key, &position).await.expect(200).json()["value"], "end", "{key}");
    }
    let replaced = "postrider_redis_connections_replaced_total{reason=\"silent\"}";
    assert!(app.metric(replaced).await >= Some(3.0));
    app.stop().await;
}

#[tokio::test]
async fn postgres_connections_that_stop_answering_are_closed_and_the_pool_keeps_its_size() {
    let [redis, proxy] = [Proxy::start().await, Proxy::start().await];
    let mut world = world_behind(&redis, &proxy).await;
    world.set("POSTRIDER_POSTGRES__MAX_CONNECTIONS", "4");
    let app = world.app().role("api").start().await;
    for round in 0..3 {
        // More concurrent requests than connections.
        let follow = |number: usize| {
            let app = &app;
            async move {
                let body = json!({"follower_id": format!("f{round}-{number}"), "followee_id": "a"});
                app.post_json("/follow", &body).await
            }
        };
        for answer in join_all((0..8).map(follow)).await {
            answer.expect(200);
        }
        proxy.set(Mode::BlackHole);
        for answer in join_all((0..8).map(follow)).await {
            assert_eq!(answer.status, 503, "{}", answer.text());
        }
        app.await_failing("postgres", seconds(20)).await;
        proxy.set(Mode::Pass);
        app.await_ready(seconds(20)).await;
        for answer in join_all((0..8).map(follow)).await {
            answer.expect(200);
        }
    }
    app.stop().await;
}
