//! Packets to and from Kafka, Redis and Postgres are dropped: no connection is closed, refused or
//! answered, and no new connection is established.

use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        network::{CALLERS, Network, SERVERS, within_own},
        proxy::Proxy,
        stack::off_runtime,
        wait::{seconds, until},
    },
    kv::{pull_after, push, running},
};

#[tokio::test]
async fn the_process_reconnects_after_packets_were_dropped() {
    if !off_runtime(|| within_own("dropped_packets::in_a_network_of_its_own")).await {
        eprintln!("skipped: needs root and iproute2");
    }
}

/// Uses all three servers once; `None` if a request fails.
async fn works(app: &App, number: usize) -> Option<()> {
    let body = json!({"follower_id": format!("f{number}"), "followee_id": "a"});
    let followed = app.post_json("/follow", &body).await;
    let pushed = app.post_json("/push", &json!({"key": "k", "value": number})).await;
    let pulled = app.get("/pull/k").await;
    (followed.status == 200 && pushed.status == 202 && pulled.status == 200).then_some(())
}

#[tokio::test]
#[ignore = "run by the test above, in a network namespace"]
async fn in_a_network_of_its_own() {
    let network = Network::new();
    let [kafka, redis, postgres] = [(); 3].map(|()| Proxy::start_at(SERVERS.here));
    let [kafka, redis, postgres] = [kafka.await, redis.await, postgres.await];
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", kafka.address);
    let stack = Stack::behind("dropped", &["--kafka-config", &advertised], |upstream| kafka.lead_to(upstream)).await;
    let mut world = World::on(&stack).await.with_postgres().await;
    world.kafka.brokers = kafka.address.to_string();
    world.reach_through(&redis, &postgres);
    world.set("POSTRIDER_KAFKA__BROKERS", &kafka.address.to_string());
    world.set("POSTRIDER_AUTH__MODE", "off");
    for name in ["POSTRIDER_HTTP__LISTEN", "POSTRIDER_MANAGEMENT__LISTEN"] {
        world.set(name, &format!("{}:0", CALLERS.there));
    }
    world.enter(network.pid());
    let app = running(&world).await;
    for round in 0..2 {
        let position = push(&app, "k", &json!(round)).await;
        assert_eq!(pull_after(&app, "k", &position).await.json()["value"], round);
        network.cut(&SERVERS);
        for check in ["kafka", "redis", "postgres"] {
            app.await_failing(check, seconds(60)).await;
        }
        // The kernel retries connection attempts at growing intervals.
        tokio::time::sleep(seconds(8)).await;
        network.mend(&SERVERS);
        let mut number = 0;
        until("all three servers are reachable", seconds(20), || {
            number += 1;
            works(&app, number)
        })
        .await;
        app.await_ready(seconds(20)).await;
        let position = push(&app, "k", &json!("after")).await;
        assert_eq!(pull_after(&app, "k", &position).await.json()["value"], "after");
    }
    app.stop().await;
}
