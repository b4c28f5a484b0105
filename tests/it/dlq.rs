//! Dead letters: stored, and then listed, shown, replayed and purged by `postrider dlq`.

use postrider_dlq::{self as dlq, DELIVERIES_TOPIC, EVENTS_TOPIC};
use postrider_health::Health;
use postrider_kafka::{
    self as kafka, Admin, Broker, DeadLetters, Outgoing, Producer,
    batch::Batch,
    dead_letter::{Letter, Reason},
};
use rdkafka::{
    Timestamp,
    message::{Header, OwnedHeaders, OwnedMessage},
};
use serde_json::{Value, json};

use crate::harness::{World, kafka::Stored, stack::off_runtime};

pub const NOW_MS: i64 = 1_893_456_000_000;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// A world with dead-letter topics, and a producer to dead-letter records with.
pub struct Post {
    pub world: World,
    producer: Producer,
}

/// The output of a command, and whether it succeeded.
struct Printed {
    ok: bool,
    out: String,
    err: String,
}

impl Printed {
    fn json(&self) -> Value {
        assert!(self.ok, "{}", self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

impl Post {
    pub async fn new() -> Self {
        let world = World::new().await;
        let config = kafka::Config {
            brokers: vec![world.kafka.brokers.clone()],
            topic_prefix: world.prefix.clone(),
            ..kafka::Config::default()
        };
        let broker = Broker::start(&config, Health::default().check("kafka")).unwrap();
        let producer = Producer::start(&config, broker.clone()).unwrap();
        let specs = dlq::topic_specs(&dlq::Config { partitions: 2, ..dlq::Config::default() }, &config);
        Admin::new(&config, broker).unwrap().ensure(&specs).await.unwrap();
        Self { world, producer }
    }

    pub async fn produce(&self, topic: &str, partition: i32, key: Option<&[u8]>, value: Option<&[u8]>) -> OwnedMessage {
        let headers = OwnedHeaders::new()
            .insert(Header { key: "ce_id", value: Some("11111111-2222-7333-8444-555555555555") })
            .insert(Header { key: "twice", value: Some("1") })
            .insert(Header { key: "error", value: Some("the record's own") })
            .insert(Header { key: "twice", value: Some("2") })
            .insert(Header { key: "traceparent", value: Some(&format!("00-{TRACE}-b7ad6b7169203331-01")) });
        let record = Outgoing {
            topic,
            partition: Some(partition),
            key,
            payload: value,
            headers: Some(headers.clone()),
            ..Outgoing::default()
        };
        let stored = self.producer.store(record).await.unwrap();
        message(topic, stored.partition, stored.offset, key, value, headers)
    }

    /// Dead-letters a record, and returns the id of the letter.
    pub async fn give_up(
        &self,
        letters: &str,
        record: &OwnedMessage,
        group: &str,
        class: &'static str,
        at_ms: i64,
    ) -> String {
        use rdkafka::Message;
        let mut batch = Batch::default();
        batch.push(record);
        let reason = Reason { class, message: format!("Not Today ({class})\u{1b}[2J") };
        let letter = Letter {
            topic: record.topic(),
            partition: record.partition(),
            record: batch.iter().next().unwrap(),
            group,
            reason: &reason,
            attempts: 4,
            first_failed_ms: at_ms - 60_000,
            last_failed_ms: at_ms,
        };
        DeadLetters::new(self.producer.clone(), self.world.topic(letters)).store(&letter).await.unwrap();
        letter.id()
    }

    /// Runs `postrider dlq …` with the real binary.
    async fn dlq(&self, words: &[&str]) -> Printed {
        let mut command = self.world.command();
        command.arg("dlq").args(words);
        let output = off_runtime(move || command.output().unwrap()).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Printed { ok: output.status.success(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    pub async fn listed(&self, words: &[&str]) -> Vec<String> {
        let listing = self.dlq(&[&["list", "--output", "json"], words].concat()).await.json();
        let letters = listing["letters"].as_array().unwrap();
        letters.iter().map(|letter| letter["id"].as_str().unwrap().to_owned()).collect()
    }

    pub async fn change(&self, words: &[&str]) -> Value {
        self.dlq(&[words, &["--output", "json"]].concat()).await.json()
    }

    pub async fn records(&self, topic: &str) -> Vec<Stored> {
        self.world.kafka.read(topic).await
    }
}

pub fn message(
    topic: &str,
    partition: i32,
    offset: i64,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    headers: OwnedHeaders,
) -> OwnedMessage {
    let (key, value) = (key.map(<[u8]>::to_vec), value.map(<[u8]>::to_vec));
    OwnedMessage::new(value, key, topic.to_owned(), Timestamp::CreateTime(NOW_MS), partition, offset, Some(headers))
}

/// Returns a record without its offset and timestamp, to compare it with a copy.
pub fn content(record: &Stored) -> Stored {
    Stored { offset: 0, timestamp_ms: 0, ..record.clone() }
}

pub fn outcomes(report: &Value) -> Vec<&str> {
    report["letters"].as_array().unwrap().iter().map(|item| item["outcome"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn letters_are_listed_newest_first_and_by_every_filter() {
    let post = Post::new().await;
    let (orders, other) = (post.world.make_topic("orders", 3).await, post.world.make_topic("other", 1).await);
    assert_eq!(post.dlq(&["list"]).await.out, "no dead letters match\n");
    let first = post.produce(&orders, 2, Some(b"a"), Some(b"1")).await;
    let second = post.produce(&other, 0, Some(b"b"), Some(b"2")).await;
    let third = post.produce(&orders, 1, None, Some(b"3")).await;
    let (hour_ms, now_ms) = (3_600_000, postrider_time::clock::now_ms());
    let a = post.give_up(EVENTS_TOPIC, &first, "kv", "transport", now_ms - 3 * hour_ms).await;
    let b = post.give_up(DELIVERIES_TOPIC, &second, "relay", "status", now_ms - hour_ms).await;
    let c = post.give_up(EVENTS_TOPIC, &third, "kv", "status", now_ms - 2 * hour_ms).await;
    assert_eq!(a, format!("{orders}/2@0 kv"));
    let since = postrider_time::clock::rfc3339(now_ms - 90 * 60_000);
    for (words, expected) in [
        (&[][..], vec![&b, &c, &a]),
        (&["--limit", "2"], vec![&b, &c]),
        (&["--events"], vec![&c, &a]),
        (&["--deliveries"], vec![&b]),
        (&["--letters", &post.world.topic(EVENTS_TOPIC)], vec![&c, &a]),
        (&["--topic", &orders], vec![&c, &a]),
        (&["--topic", "orders", "--error", "status"], vec![&c]),
        (&["--error", "not today (TRANS"], vec![&a]),
        (&["--key", "b"], vec![&b]),
        (&["--since", "200m"], vec![&b, &c, &a]),
        (&["--since", "150m"], vec![&b, &c]),
        (&["--since", &since], vec![&b]),
        (&["--key", "nobody"], vec![]),
    ] {
        assert_eq!(post.listed(words).await.iter().collect::<Vec<_>>(), expected, "{words:?}");
    }
    let empty = post.dlq(&["list", "--letters", ""]).await;
    assert!(!empty.ok && empty.err.contains("--letters is empty; leave it out"), "{}", empty.err);
    // An error message must not send escape sequences to the terminal.
    let table = post.dlq(&["list", "--limit", "2"]).await.out;
    assert!(table.contains("FAILED AT") && table.contains(&b) && table.contains("Not Today (status)"), "{table}");
    assert!(table.contains("the newest 2 of 3") && !table.contains('\u{1b}'), "{table}");
}

#[tokio::test]
async fn show_prints_every_part_of_the_record_of_a_letter() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let record = post.produce(&topic, 0, Some(&[0, 255]), Some(br#"{"n":1}"#)).await;
    let id = post.give_up(EVENTS_TOPIC, &record, "kv", "transport", NOW_MS).await;
    let text = post.produce(&topic, 0, Some(b"AP8="), Some(b"1")).await;
    let of_text = post.give_up(EVENTS_TOPIC, &text, "kv", "transport", NOW_MS).await;
    assert_eq!(post.listed(&["--key", "AP8="]).await, [of_text]);
    for key in ["AP8=", "AP8"] {
        assert_eq!(post.listed(&["--key-base64", key]).await, [id.as_str()]);
    }
    let table = post.dlq(&["list"]).await.out;
    let words: Vec<&str> = table.split_whitespace().collect();
    assert!(words.contains(&"base64:AP8=") && words.contains(&"AP8="), "{table}");
    let wrong = post.dlq(&["list", "--key-base64", "?"]).await;
    assert!(!wrong.ok && wrong.err.contains("--key-base64 must be base64 (got `?`)"), "{}", wrong.err);
    let detail = post.dlq(&["show", &id, "--output", "json"]).await.json();
    for (member, expected) in [
        ("id", json!(id)),
        ("letters", json!(post.world.topic(EVENTS_TOPIC))),
        ("topic", json!(topic)),
        ("partition", json!(0)),
        ("offset", json!(0)),
        ("key_base64", json!("AP8=")),
        ("timestamp", json!("2030-01-01T00:00:00.000Z")),
        ("event_id", json!("11111111-2222-7333-8444-555555555555")),
        ("group", json!("kv")),
        ("error_class", json!("transport")),
        ("attempts", json!(4)),
        ("first_failed_at", json!("2029-12-31T23:59:00.000Z")),
        ("failed_at", json!("2030-01-01T00:00:00.000Z")),
        ("trace_id", json!(TRACE)),
        ("value_bytes", json!(7)),
        ("value", json!({"n": 1})),
    ] {
        assert_eq!(detail[member], expected, "{member}");
    }
    let names: Vec<&str> =
        detail["headers"].as_array().unwrap().iter().map(|header| header["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["ce_id", "twice", "error", "twice", "traceparent"],
        "the headers of the record, without those of the letter"
    );
    let page = post.dlq(&["show", &id]).await;
    assert!(page.ok && page.out.contains(r#"value            {"n":1}"#) && page.out.contains(TRACE), "{}", page.out);
    let unknown = post.dlq(&["show", "x/0@0 y"]).await;
    assert!(!unknown.ok && unknown.err.contains("no dead letter `x/0@0 y`"), "{}", unknown.err);
    let nowhere = post.dlq(&["list", "--letters", &post.world.topic("nowhere")]).await;
    assert!(!nowhere.ok && nowhere.err.contains("does not exist"), "{}", nowhere.err);
    assert_eq!(
        post.world.kafka.partitions(&post.world.topic("nowhere")).await,
        None,
        "listing must not create the topic"
    );
}

#[tokio::test]
async fn a_dry_run_reports_what_would_happen_and_changes_nothing() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let record = post.produce(&topic, 0, Some(b"k"), Some(b"v")).await;
    let id = post.give_up(EVENTS_TOPIC, &record, "kv", "transport", NOW_MS).await;
    let letters = post.world.topic(EVENTS_TOPIC);
    let before = (post.records(&topic).await, post.records(&letters).await);
    for (word, outcome, done) in [("replay", "would_replay", "replayed"), ("purge", "would_purge", "purged")] {
        let report = post.change(&[word, "--dry-run"]).await;
        assert_eq!(report["letters"], json!([{"id": id, "outcome": outcome}]), "{report}");
        assert_eq!((&report["dry_run"], &report["done"]), (&json!(true), &json!(1)));
        let printed = post.dlq(&[word, "--dry-run"]).await;
        assert!(
            printed.out.contains(&format!("1 of 1 would be {done}")) && printed.out.contains(&id),
            "{}",
            printed.out
        );
        let unknown = post.dlq(&[word, "--dry-run", "nope"]).await;
        assert!(!unknown.ok && unknown.out.contains("not_found     nope"), "{}", unknown.out);
        assert!(unknown.err.contains("1 of these ids have no dead letter"), "{}", unknown.err);
        let refused = post.dlq(&[word]).await;
        assert!(!refused.ok && refused.err.contains("--yes"), "without a filter, `--yes` is required: {}", refused.err);
    }
    assert_eq!((post.records(&topic).await, post.records(&letters).await), before);
}

#[tokio::test]
async fn a_replay_restores_records_exactly_and_in_order_and_removes_their_letters() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 3).await;
    let some = |bytes: &'static [u8]| Some(bytes);
    let cases = [
        // In a partition that the key's hash does not choose.
        (0, some(b"k"), some(b"1")),
        (1, some(b"k"), some(b"2")),
        (2, some(b"k"), some(b"3")),
        (2, some(&[0, 255]), some(&[1, 254])),
        (2, None, some(b"")),
        (2, some(b"gone"), None),
    ];
    let mut produced = Vec::new();
    for (partition, key, value) in cases {
        produced.push(post.produce(&topic, partition, key, value).await);
    }
    let before = post.records(&topic).await;
    for record in produced.iter().rev() {
        post.give_up(EVENTS_TOPIC, record, "kv", "transport", NOW_MS).await;
    }
    let limited = post.change(&["replay", "--topic", "orders", "--limit", "1"]).await;
    assert_eq!((&limited["done"], &limited["remaining"]), (&json!(1), &json!(5)));
    let report = post.dlq(&["replay", "--topic", "orders"]).await;
    assert!(report.ok && report.out == "5 of 5 replayed\n", "{} {}", report.out, report.err);
    assert_eq!(post.listed(&[]).await, [""; 0]);
    let after = post.records(&topic).await;
    assert_eq!(after.len(), 2 * before.len());
    for partition in 0..3 {
        let part = |records: &[Stored]| -> Vec<_> {
            records.iter().filter(|record| record.partition == partition).map(content).collect()
        };
        let (first, again) = (part(&before), part(&after));
        assert_eq!(again, [first.clone(), first].concat(), "partition {partition}");
    }
    let again = post.change(&["replay", "--yes"]).await;
    assert_eq!(again["matched"], 0, "there is nothing left to replay");
    assert_eq!(post.records(&topic).await.len(), after.len());
}

#[tokio::test]
async fn a_crash_between_replay_and_removal_replays_the_event_with_the_same_id() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let record = post.produce(&topic, 0, Some(b"k"), Some(b"v")).await;
    for _ in 0..2 {
        // Store the letter again, as if it had not been removed.
        post.give_up(EVENTS_TOPIC, &record, "kv", "transport", NOW_MS).await;
        assert_eq!(outcomes(&post.change(&["replay", "--yes"]).await), ["replayed"]);
    }
    let records = post.records(&topic).await;
    assert_eq!(records.len(), 3);
    assert!(records.iter().all(|record| content(record) == content(&records[0])), "{records:?}");
}

#[tokio::test]
async fn a_superseded_record_of_a_compacted_topic_is_not_replayed() {
    let post = Post::new().await;
    let topic = post.world.topic("compacted");
    post.world.kafka.create_with(&topic, 1, &[("cleanup.policy", "compact")]).await;
    let old = post.produce(&topic, 0, Some(b"a"), Some(b"old")).await;
    let only = post.produce(&topic, 0, Some(b"b"), Some(b"only")).await;
    post.produce(&topic, 0, Some(b"a"), Some(b"new")).await;
    // Compaction has removed this record, so the topic had a newer one.
    let compacted = message(&topic, 0, 40, Some(b"c"), Some(b"gone"), OwnedHeaders::new());
    let mut ids = Vec::new();
    for record in [&old, &only, &compacted] {
        ids.push(post.give_up(EVENTS_TOPIC, record, "kv", "transport", NOW_MS).await);
    }
    let expected = ["superseded", "replayed", "superseded"];
    let expected_dry = ["superseded", "would_replay", "superseded"];
    assert_eq!(outcomes(&post.change(&["replay", "--yes", "--dry-run"]).await), expected_dry);
    let report = post.change(&["replay", "--yes"]).await;
    assert_eq!(outcomes(&report), expected, "{report}");
    let values: Vec<Stored> = post.records(&topic).await;
    assert_eq!(values.iter().map(Stored::text).collect::<Vec<_>>(), ["old", "only", "new", "only"]);
    assert_eq!(post.listed(&[]).await.len(), 2, "the letters of superseded records stay");
    // After a crash, the replayed copy is the newer record, so the record is not written a third
    // time.
    post.give_up(EVENTS_TOPIC, &only, "kv", "transport", NOW_MS).await;
    assert_eq!(outcomes(&post.change(&["replay", &ids[1]]).await), ["superseded"]);
    assert_eq!(post.records(&topic).await.len(), 4);
    assert_eq!(post.change(&["purge", "--topic", "compacted"]).await["done"], 3);
    assert_eq!(post.listed(&[]).await, [""; 0]);
}

#[tokio::test]
async fn a_purge_writes_a_tombstone_to_the_partition_of_the_letter() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let mut ids = Vec::new();
    for key in ["a", "b", "c"] {
        let record = post.produce(&topic, 0, Some(key.as_bytes()), Some(b"v")).await;
        ids.push(post.give_up(DELIVERIES_TOPIC, &record, "relay", "status", NOW_MS).await);
    }
    let report = post.change(&["purge", &ids[0], &ids[2]]).await;
    assert_eq!(outcomes(&report), ["purged", "purged"]);
    assert_eq!(post.listed(&[]).await, [ids[1].clone()]);
    let records = post.records(&post.world.topic(DELIVERIES_TOPIC)).await;
    let tombstones: Vec<&Stored> = records.iter().filter(|record| record.value.is_none()).collect();
    assert_eq!(tombstones.len(), 2);
    for tombstone in tombstones {
        let letter = records.iter().find(|record| record.key == tombstone.key && record.value.is_some()).unwrap();
        assert_eq!(letter.partition, tombstone.partition);
        assert!([&ids[0], &ids[2]].contains(&&tombstone.key().to_owned()));
    }
    assert_eq!(post.records(&topic).await.len(), 3, "the records themselves are not touched");
}
