//! Delivery (Kafka to HTTP): envelopes, order, rate and restarts.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use serde_json::{Value, json};

use crate::harness::{
    App, World,
    produce::{Write, keyed, produce},
    target::{Act, Seen, Target},
    wait::{seconds, until},
};

/// A world with a topic and a target, and the arguments of a delivery between them.
pub struct Scene {
    pub world: World,
    pub topic: String,
    pub target: Target,
}

impl Scene {
    pub async fn new(partitions: i32) -> Self {
        let world = World::new().await;
        let topic = world.make_topic("orders", partitions).await;
        Self { world, topic, target: Target::start().await }
    }

    pub fn group(&self) -> String {
        self.world.topic("http-consumer")
    }

    /// Returns the arguments of the command: no rate limit and short waits, unless `more` overrides
    /// them.
    pub fn words(&self, more: &[&str]) -> Vec<String> {
        let (group, url) = (self.group(), self.target.url("/webhook"));
        let own = ["--topic", &self.topic, "--target-url", &url, "--group", &group, "--rate", "0"];
        let waits = if more.contains(&"--retry-delay") { &[][..] } else { &["--retry-delay", "100ms"] };
        own.iter().chain(waits).chain(more).map(|word| (*word).to_owned()).collect()
    }

    /// Starts `postrider relay`.
    pub async fn relay(&self, more: &[&str]) -> App {
        self.world.app().relay(self.words(more)).start().await
    }

    pub async fn write(&self, records: Vec<Write>) {
        produce(&self.world.kafka.brokers, &self.topic, records).await;
    }

    /// Returns the dead letters, once there are this many.
    pub async fn letters(&self, count: usize) -> Vec<crate::harness::kafka::Stored> {
        self.world.kafka.read_at_least(&self.world.topic("dead-letter-deliveries"), count).await
    }
}

/// Returns `(key, n)` of each delivery.
fn numbers(seen: &[Seen]) -> Vec<(String, u64)> {
    let read = |seen: &Seen| {
        let body = seen.json();
        (body["key"].as_str().unwrap().to_owned(), body["value"]["n"].as_u64().unwrap())
    };
    seen.iter().map(read).collect()
}

pub fn numbered(key: &str, n: u64) -> Write {
    keyed(key, json!({ "n": n }))
}

/// Lists the deliveries whose number is not above the key's previous one.
fn disordered(deliveries: &[(String, u64)]) -> Vec<String> {
    let mut last = BTreeMap::new();
    let out_of_order = |(key, n): &(String, u64)| {
        let before = last.insert(key.clone(), *n);
        before.filter(|before| before >= n).map(|before| format!("{key}: {n} after {before}"))
    };
    deliveries.iter().filter_map(out_of_order).collect()
}

#[test]
fn the_order_check_finds_a_swap_and_a_duplicate() {
    let list = |entries: &[(&str, u64)]| entries.iter().map(|(key, n)| ((*key).to_owned(), *n)).collect::<Vec<_>>();
    assert!(disordered(&list(&[("a", 0), ("b", 0), ("a", 1), ("b", 2)])).is_empty());
    assert_eq!(disordered(&list(&[("a", 1), ("a", 0)])).len(), 1);
    assert_eq!(disordered(&list(&[("a", 1), ("a", 1)])).len(), 1);
}

#[tokio::test]
async fn every_kind_of_record_arrives_in_the_documented_envelope() {
    let scene = Scene::new(1).await;
    let at = Some(1_672_574_400_000);
    let text = |key: Option<&str>, value: &str| Write {
        key: key.map(Into::into),
        value: Some(value.into()),
        timestamp_ms: at,
        ..Write::default()
    };
    let object = Write {
        headers: vec![
            ("ce_id", "event-7".to_owned()),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".to_owned()),
        ],
        ..text(Some("k"), r#"{"b":1.0, "a":[1e3]}"#)
    };
    let binary =
        Write { value: Some(vec![0xff, b'"', 0]), key: Some(vec![0xfe]), timestamp_ms: at, ..Write::default() };
    let tombstone = Write { key: Some("k".into()), timestamp_ms: at, ..Write::default() };
    scene.write(vec![object, text(None, "plain"), text(Some(""), "[1,2]"), binary, tombstone]).await;
    let app = scene.relay(&["--workers", "1"]).await;
    let seen = scene.target.await_seen(5, seconds(20)).await;
    let topic = &scene.topic;
    let expected = [
        r#""offset":0,"key":"k","value":{"b":1.0, "a":[1e3]}"#,
        r#""offset":1,"value":{"raw_message":"plain"}"#,
        r#""offset":2,"key":"","value":{"raw_message":"[1,2]"}"#,
        "\"offset\":3,\"key\":\"\u{fffd}\",\"value\":{\"raw_message\":\"\u{fffd}\\\"\\u0000\"}",
        r#""offset":4,"key":"k","value":{"raw_message":""}"#,
    ];
    let mut bodies: Vec<&str> = seen.iter().map(Seen::text).collect();
    bodies.sort_by_key(|body| serde_json::from_str::<Value>(body).unwrap()["offset"].as_i64());
    for (body, expected) in bodies.iter().zip(expected) {
        let whole = format!(r#"{{"topic":"{topic}","partition":0,{expected},"timestamp":"2023-01-01T12:00:00Z"}}"#);
        assert_eq!(*body, whole);
    }
    let first = seen.iter().find(|seen| seen.json()["offset"] == 0).unwrap();
    assert!(first.head.starts_with("POST /webhook HTTP/1.1\r\n"));
    for (name, value) in [
        ("user-agent", "kafka-http-consumer/1.0"),
        ("content-type", "application/json"),
        ("idempotency-key", "event-7"),
        ("postrider-timestamp", "1672574400000"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
    ] {
        assert_eq!(first.header(name), Some(value), "{name}");
    }
    let last = seen.iter().find(|seen| seen.json()["offset"] == 4).unwrap();
    assert_eq!(last.header("idempotency-key"), Some(format!("{topic}/0@4").as_str()));
    assert_eq!(last.header("postrider-tombstone"), Some("true"));
    app.stop().await;
}

#[tokio::test]
async fn a_retried_key_keeps_its_order_and_other_keys_continue() {
    let scene = Scene::new(2).await;
    let keys: Vec<String> = (0..10).map(|key| format!("k{key}")).collect();
    let records = (0..20).flat_map(|n| keys.iter().map(move |key| numbered(key, n)));
    scene.write(records.collect()).await;
    let failures = std::sync::Mutex::new(0);
    scene.target.decide(move |seen| {
        let body = seen.json();
        let troubled = body["key"] == "k3" && body["value"]["n"] == 5;
        let mut failures = failures.lock().unwrap();
        match troubled && *failures < 3 {
            true => {
                *failures += 1;
                Act::status(500)
            }
            false => Act::OK,
        }
    });
    let app = scene.relay(&["--retry-delay", "1s"]).await;
    let seen = scene.target.await_seen(203, seconds(30)).await;
    let (mut delivered, mut failed) = (Vec::new(), Vec::new());
    for seen in &seen {
        let number = numbers(std::slice::from_ref(seen)).remove(0);
        let troubled = number == ("k3".to_owned(), 5);
        if troubled && failed.len() < 3 { failed.push(seen.at) } else { delivered.push((number, seen.at)) }
    }
    let order: Vec<_> = delivered.iter().map(|(number, _)| number.clone()).collect();
    assert_eq!(disordered(&order), Vec::<String>::new());
    assert_eq!(order.iter().collect::<HashSet<_>>().len(), 200);
    let recovered = delivered.iter().find(|(number, _)| *number == ("k3".to_owned(), 5)).unwrap().1;
    let meanwhile = delivered.iter().filter(|((key, _), at)| key != "k3" && *at < recovered).count();
    assert!(meanwhile >= 170, "only {meanwhile} records of other keys were delivered meanwhile");
    app.stop().await;
}

#[tokio::test]
async fn a_restarted_relay_resumes_at_the_commit_point() {
    let scene = Scene::new(3).await;
    let write = |from: u64| (from..from + 100).map(|n| numbered(&format!("k{}", n % 7), n)).collect::<Vec<_>>();
    scene.write(write(0)).await;
    let app = scene.relay(&[]).await;
    scene.target.await_seen(100, seconds(30)).await;
    app.stop().await;
    scene.write(write(100)).await;
    let app = scene.relay(&[]).await;
    scene.target.await_seen(200, seconds(30)).await;
    app.stop().await;
    let seen = numbers(&scene.target.seen());
    assert_eq!(disordered(&seen), Vec::<String>::new());
    assert_eq!(seen.len(), 200, "a committed record was delivered again");
}

#[tokio::test]
async fn a_killed_relay_loses_no_record_and_the_next_one_keeps_the_order_of_first_deliveries() {
    let scene = Scene::new(2).await;
    scene.write((0..400).map(|n| numbered(&format!("k{}", n % 11), n)).collect()).await;
    scene.target.decide(|_| Act::After(Duration::from_millis(5), 200));
    let app = scene.relay(&[]).await;
    scene.target.await_seen(100, seconds(30)).await;
    app.kill().await;
    let app = scene.relay(&[]).await;
    until("every record was delivered", seconds(60), || async {
        let seen: HashSet<_> = numbers(&scene.target.seen()).into_iter().collect();
        (seen.len() == 400).then_some(())
    })
    .await;
    app.stop().await;
    let mut known = HashSet::new();
    let first: Vec<_> =
        numbers(&scene.target.seen()).into_iter().filter(|number| known.insert(number.clone())).collect();
    assert_eq!(disordered(&first), Vec::<String>::new());
}

#[tokio::test]
async fn the_rate_is_kept_within_five_percent() {
    let scene = Scene::new(2).await;
    scene.write((0..840).map(|n| numbered(&format!("k{}", n % 50), n)).collect()).await;
    let app = scene.relay(&["--rate", "100"]).await;
    // Each partition alone has enough records: the Kafka client may begin to read one of them late.
    let seen = scene.target.await_seen(350, seconds(30)).await;
    // The first half second does not count: the process connects then.
    let took = (seen[349].at - seen[49].at).as_secs_f64();
    let rate = 300.0 / took;
    assert!((95.0..=105.0).contains(&rate), "{rate} per second");
    app.stop().await;
}

#[tokio::test]
async fn the_relay_waits_for_a_topic_that_does_not_exist_yet() {
    let world = World::new().await;
    let target = Target::start().await;
    let scene = Scene { topic: world.topic("later"), target, world };
    let app = scene.world.app().relay(scene.words(&[])).even_if_not_ready().start().await;
    app.await_log("topic does not exist yet, waiting for it", seconds(20)).await;
    let check = format!("relay-{}", scene.topic);
    assert!(app.failing(&check).await.unwrap().contains("does not exist"));
    scene.world.kafka.create(&scene.topic, 1).await;
    scene.write(vec![numbered("a", 1)]).await;
    scene.target.await_seen(1, seconds(30)).await;
    app.await_ready(seconds(10)).await;
    app.stop().await;
}
