//! Connections to Redis and Postgres that stay silent and open are replaced, and none is used up by them.

use futures_util::future::join_all;
use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        proxy::{Mode, Proxy},
        redis,
        wait::seconds,
    },
    kv::{pull_after, push, running},
};

/// A world whose Redis and Postgres are behind proxies.
async fn behind(redis: &Proxy, postgres: &Proxy) -> World {
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
async fn a_redis_connection_that_stays_silent_is_replaced() {
    let [proxy, postgres] = [Proxy::start().await, Proxy::start().await];
    let world = behind(&proxy, &postgres).await;
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
async fn a_redis_server_that_was_demoted_is_left_for_its_successor() {
    let (old, new) =
        (Stack::own("demoted", &["--only", "redis"]).await, Stack::own("promoted", &["--only", "redis"]).await);
    let proxy = Proxy::start().await;
    proxy.lead_to(old.get("REDIS_URL").trim_start_matches("redis://"));
    let mut world = World::new().await;
    world.set("POSTRIDER_REDIS__URL", &format!("redis://{}", proxy.address));
    let app = running(&world).await;
    await_view(&app, 1).await;
    // As in a failover: the name leads to the new primary, and connections to the old one stay open.
    let successor = new.get("REDIS_URL").trim_start_matches("redis://");
    let (host, port) = successor.split_once(':').unwrap();
    proxy.lead_to(successor);
    let _: String = redis::run(old.get("REDIS_URL"), &["REPLICAOF", host, port]).await;
    await_view(&app, 2).await;
    let replaced = "postrider_redis_connections_replaced_total{reason=\"read_only\"}";
    assert!(app.metric(replaced).await >= Some(1.0));
    app.stop().await;
}

#[tokio::test]
async fn postgres_connections_that_stay_silent_are_closed_and_the_pool_stays_whole() {
    let [redis, proxy] = [Proxy::start().await, Proxy::start().await];
    let mut world = behind(&redis, &proxy).await;
    world.set("POSTRIDER_POSTGRES__MAX_CONNECTIONS", "4");
    let app = world.app().role("api").start().await;
    for round in 0..3 {
        // More at once than there are connections.
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
