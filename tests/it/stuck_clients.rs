//! Stuck Kafka clients: the process replaces clients that make no progress, and loses no record.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        check::{Write, leaked, lost},
        load::{Load, Target},
        metadata_proxy::MetadataProxy,
        proxy::{Mode, Proxy},
        target,
        wait::{seconds, until},
    },
    kv::{pull_after, push, running},
};

/// Time within which a stuck client is replaced. The library's own timeouts are longer or missing.
const REPLACED: Duration = seconds(10);

/// Running processes with load, and a broker behind a proxy.
struct Scene {
    world: World,
    topic: String,
    target: target::Target,
    app: App,
    relay: App,
    load: Load,
    _stack: Stack,
}

impl Scene {
    async fn new(name: &str, proxy: SocketAddr, lead_to: impl Fn(&str), properties: serde_json::Value) -> Self {
        let advertised = format!("advertised.listeners=PLAINTEXT://{proxy}");
        // A replaced client cannot leave its group: the others wait until its session expires.
        let session = "group.consumer.session.timeout.ms=6000";
        let options = ["--only", "kafka", "--kafka-config", &advertised, "--kafka-config", session];
        let stack = Stack::behind(name, &options, lead_to).await;
        let mut world = World::on(&stack).await;
        world.set("POSTRIDER_KAFKA__BROKERS", &proxy.to_string());
        world.set("POSTRIDER_KAFKA__PROPERTIES", &properties.to_string());
        let topic = world.make_topic("orders", 2).await;
        let target = target::Target::start().await;
        let (group, url) = (world.topic("relay"), target.url("/hook"));
        let words = ["--topic", &topic, "--group", &group, "--target-url", &url, "--rate", "0"].map(str::to_owned);
        let relay = world.app().relay(words).start().await;
        let app = running(&world).await;
        push(&app, "k", &json!(1)).await;
        let load = Load::start(&app, &Target::Produce(topic.clone()), 4);
        load.more(100).await;
        until("the relay delivers", seconds(20), || async { (target.count() > 0).then_some(()) }).await;
        Self { world, topic, target, app, relay, load, _stack: stack }
    }

    /// Waits until producer, projection and relay work again, each within the bound.
    async fn await_service(&self) {
        let (app, target) = (&self.app, &self.target);
        until("a push is accepted", REPLACED, || async {
            let answer = app.post_json("/push", &json!({"key": "k", "value": 2})).await;
            (answer.status == 202).then_some(())
        })
        .await;
        let position = push(app, "k", &json!(3)).await;
        assert_eq!(pull_after(app, "k", &position).await.json()["value"], 3);
        let delivered = target.count();
        until("the relay delivers again", REPLACED, || async { (target.count() > delivered).then_some(()) }).await;
    }

    /// Stops everything. Fails if an acknowledged write is missing or the relay has not delivered
    /// all records.
    async fn settle(self) {
        let outcome = self.load.stop().await;
        outcome.expect_only(&["kafka_unavailable", "outcome_unknown"]);
        let log = self.world.kafka.read(&self.topic).await;
        assert_eq!(lost(&outcome.acknowledged, &log), Vec::<Write>::new());
        assert_eq!(leaked(&outcome.refused_as("kafka_unavailable"), &log), Vec::<Write>::new());
        until("the relay delivers everything", seconds(30), || async {
            let seen = self.target.seen().into_iter().map(|seen| seen.json());
            let delivered: BTreeSet<_> =
                seen.map(|seen| (seen["partition"].as_i64(), seen["offset"].as_i64())).collect();
            let is_delivered = |partition: i32, offset| delivered.contains(&(Some(partition.into()), Some(offset)));
            log.iter().all(|record| is_delivered(record.partition, record.offset)).then_some(())
        })
        .await;
        self.app.stop().await;
        self.relay.stop().await;
    }
}

#[tokio::test]
async fn clients_that_got_metadata_without_brokers_recover_in_time_and_lose_no_record() {
    // By default, consumers refresh their metadata rarely.
    let properties = json!({"topic.metadata.refresh.interval.ms": "2000"});
    let proxy = MetadataProxy::start().await;
    let scene = Scene::new("forgetful", proxy.address, |upstream| proxy.lead_to(upstream), properties).await;
    let relay = format!("relay-{}", scene.topic);
    let clients = ["producer-callers", "producer", "kv", &relay].map(|client| format!("postrider-{client}"));
    // Hide the brokers again for clients that recovered by chance.
    let is_one_lost = || clients.iter().any(|client| proxy.is_lost(client, seconds(4)));
    until(&format!("one of {clients:?} is stuck"), seconds(120), || async {
        proxy.hide_brokers();
        for _ in 0..100 {
            if is_one_lost() {
                return Some(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        None
    })
    .await;
    proxy.show_brokers();
    scene.await_service().await;
    scene.settle().await;
}

#[tokio::test]
async fn clients_whose_connections_are_black_holes_are_replaced_and_lose_no_record() {
    let proxy = Proxy::start().await;
    let scene = Scene::new("swallowed", proxy.address, |upstream| proxy.lead_to(upstream), json!({})).await;
    proxy.set(Mode::BlackHole);
    // New connections do not work either until the network does. Connections opened until then stay
    // silent.
    scene.app.await_failing("kafka", seconds(30)).await;
    scene.relay.await_failing("kafka", seconds(30)).await;
    proxy.set(Mode::Pass);
    scene.await_service().await;
    for (process, client) in [(&scene.app, "kv".to_owned()), (&scene.relay, format!("relay-{}", scene.topic))] {
        let metric = format!("postrider_kafka_clients_replaced_total{{client=\"{client}\",reason=\"unanswered\"}}");
        assert!(process.metric(&metric).await >= Some(1.0), "{client} was not replaced");
    }
    scene.settle().await;
}

#[tokio::test]
async fn a_first_write_to_a_topic_while_the_broker_is_silent_succeeds_soon_after_it_is_back() {
    let proxy = Proxy::start().await;
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", proxy.address);
    let options = ["--only", "kafka", "--kafka-config", &advertised];
    let stack = Stack::behind("first-write", &options, |upstream| proxy.lead_to(upstream)).await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_KAFKA__BROKERS", &proxy.address.to_string());
    let topic = world.make_topic("orders", 1).await;
    let app = world.app().role("api").start().await;
    let body = json!({"topic": topic, "payload": "first"});
    let produce = || app.post_json("/produce", &body);
    proxy.set(Mode::BlackHole);
    // The first outcome is unknown after some seconds. Later writes are refused once no broker
    // answers.
    let (first, _) = tokio::join!(produce(), app.await_failing("kafka", seconds(30)));
    assert_eq!(first.status, 503, "{}", first.text());
    proxy.set(Mode::Pass);
    until("a record is accepted", REPLACED, || async { (produce().await.status == 200).then_some(()) }).await;
    app.stop().await;
}

#[tokio::test]
async fn clients_that_wait_for_a_suspended_broker_are_not_replaced() {
    // A broker that is fenced meanwhile would answer with metadata without brokers, which gets
    // clients stuck.
    let stack = Stack::own("still", &["--only", "kafka", "--kafka-config", "broker.session.timeout.ms=60000"]).await;
    let world = World::on(&stack).await;
    let app = running(&world).await;
    push(&app, "k", &json!(1)).await;
    // Longer than a client may be without a response while Kafka answers other clients.
    stack.ctl(&["pause", "kafka"]).await;
    tokio::time::sleep(seconds(8)).await;
    stack.ctl(&["resume", "kafka"]).await;
    app.await_ready(seconds(20)).await;
    let requests = || async { app.metric("postrider_kafka_client_requests_total{client=\"kv\"}").await };
    for _ in 0..3 {
        let before = requests().await;
        until("the client reports statistics", seconds(20), || async { (requests().await != before).then_some(()) })
            .await;
    }
    for client in ["producer", "producer-callers", "kv"] {
        let metric = format!("postrider_kafka_clients_replaced_total{{client=\"{client}\"");
        assert_eq!(app.metric(&metric).await, None, "{client} was replaced");
    }
    push(&app, "k", &json!(2)).await;
    app.stop().await;
}

#[tokio::test]
async fn a_client_is_not_replaced_while_one_of_three_brokers_is_silent_and_the_others_answer() {
    // A broker that is fenced meanwhile would lose its partitions to the others.
    let options = ["--only", "kafka", "--brokers", "3", "--kafka-config", "broker.session.timeout.ms=60000"];
    let stack = Stack::own("one-silent", &options).await;
    let mut world = World::on(&stack).await;
    world.set("POSTRIDER_KAFKA__TOPICS__REPLICATION_FACTOR", "3");
    world.set("POSTRIDER_KV__PARTITIONS", "6");
    let app = running(&world).await;
    push(&app, "k", &json!(1)).await;
    // Longer than a client may wait while no broker answers.
    stack.ctl(&["pause", "kafka-3"]).await;
    tokio::time::sleep(seconds(9)).await;
    let metric = app.metric("postrider_kafka_clients_replaced_total{client=\"kv\"").await;
    stack.ctl(&["resume", "kafka-3"]).await;
    assert_eq!(metric, None, "the consumer was replaced");
    until("a push is accepted", seconds(30), || async {
        let answer = app.post_json("/push", &json!({"key": "k", "value": 2})).await;
        (answer.status == 202).then_some(())
    })
    .await;
    app.stop().await;
}
