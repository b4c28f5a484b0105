//! Clients of the Kafka library that lose their way are replaced, and nothing is lost.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        check::{Write, leaked, lost},
        kafka_proxy::KafkaProxy,
        load::{Load, Target},
        target,
        wait::{seconds, until},
    },
    kv::{pull_after, push, running},
};

/// Within this a client that gets nowhere is replaced. The library's own time-outs are longer, or there are none.
const REPLACED: Duration = seconds(10);

/// The broker behind a proxy, and the product with load on it.
struct Scene {
    proxy: KafkaProxy,
    world: World,
    topic: String,
    target: target::Target,
    app: App,
    relay: App,
    load: Load,
    _stack: Stack,
}

impl Scene {
    async fn new(name: &str, properties: serde_json::Value) -> Self {
        let proxy = KafkaProxy::start().await;
        let stack = broker_behind(&proxy, name).await;
        let mut world = World::on(&stack).await;
        world.set("POSTRIDER_KAFKA__BROKERS", &proxy.address.to_string());
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
        Self { proxy, world, topic, target, app, relay, load, _stack: stack }
    }

    /// Producer, projection and relay work again, each within the bound.
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

    /// Ends all of it; nothing acknowledged is missing, and the relay has delivered everything.
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

/// A broker that is reached through a proxy, also by what its metadata says.
async fn broker_behind(proxy: &KafkaProxy, name: &str) -> Stack {
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", proxy.address);
    let ports = crate::harness::app::target_folder().join(format!("test-stack-{name}/ports"));
    // While it starts, the stack's own probe goes through the proxy as well.
    let follow = async {
        loop {
            let text = std::fs::read_to_string(&ports).unwrap_or_default();
            if let Some(port) = text.lines().find_map(|line| line.strip_prefix("kafka-1=")) {
                proxy.lead_to(&format!("127.0.0.1:{port}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // A client that is replaced cannot leave its group: the others wait for its session to end.
    let session = "group.consumer.session.timeout.ms=6000";
    let options = ["--only", "kafka", "--kafka-config", &advertised, "--kafka-config", session];
    tokio::select! {
        stack = Stack::own(name, &options) => stack,
        () = follow => unreachable!("it goes on for ever"),
    }
}

#[tokio::test]
async fn clients_that_were_told_of_no_brokers_work_again_in_time_and_nothing_is_lost() {
    // Consumers ask rarely, unless told otherwise.
    let scene = Scene::new("forgetful", json!({"topic.metadata.refresh.interval.ms": "2000"})).await;
    scene.proxy.hide_brokers();
    let relay = format!("relay-{}", scene.topic);
    let clients = ["producer", "kv", &relay].map(|client| format!("postrider-{client}"));
    until(&format!("one of {clients:?} asks no more"), seconds(60), || async {
        clients.iter().any(|client| scene.proxy.is_lost(client, seconds(4))).then_some(())
    })
    .await;
    scene.proxy.show_brokers();
    scene.await_service().await;
    scene.settle().await;
}

#[tokio::test]
async fn clients_whose_connections_are_black_holes_are_replaced_and_nothing_is_lost() {
    let scene = Scene::new("swallowed", json!({})).await;
    scene.proxy.swallow_open_connections();
    scene.await_service().await;
    for (process, client) in [(&scene.app, "kv".to_owned()), (&scene.relay, format!("relay-{}", scene.topic))] {
        let metric = format!("postrider_kafka_clients_replaced_total{{client=\"{client}\",reason=\"unanswered\"}}");
        assert!(process.metric(&metric).await >= Some(1.0), "{client} was not replaced");
    }
    scene.settle().await;
}
