//! Dashboards and alerts use only metrics that exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    harness::{App, World, sse::Stream, wait::seconds},
    messages::stored,
    roundtrip::roundtrip,
};

/// Metrics that appear with their first event, which needs a fault or more time than a test has.
/// They must be in the sources all the same.
const ONLY_AFTER_A_FAULT: [&str; 18] = [
    "http_server_connections_refused_total",
    "http_server_stalled_connections_total",
    "postrider_comments_slow_streams_total",
    "postrider_consumer_pauses_total",
    "postrider_consumer_retries_total",
    "postrider_feed_epochs_raised_total",
    "postrider_feed_duplicate_records_total",
    "postrider_kafka_clients_replaced_total",
    "postrider_kv_audit_dropped_total",
    "postrider_kv_rebuilds_total",
    "postrider_kv_restated_records_total",
    "postrider_messages_closed_connections_total",
    "postrider_messages_slow_connections_total",
    "postrider_messages_unannounced_total",
    "postrider_messages_unreadable_notices_total",
    "postrider_presence_reconciliations_total",
    "postrider_presence_restorations_total",
    "postrider_presence_takeovers_total",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let deeper = folders.iter().flat_map(|folder| self::files(folder, ending));
    files.into_iter().filter(|path| path.to_string_lossy().ends_with(ending)).chain(deeper).collect()
}

/// Returns every metric name that is followed by a selector.
fn names(text: &str) -> BTreeSet<String> {
    let word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let heads = text.split('{').map(|part| part.rsplit(|letter| !word(letter)).next().unwrap_or_default());
    let ours = |name: &&str| ["postrider_", "http_server_", "process_"].iter().any(|prefix| name.starts_with(prefix));
    heads.filter(ours).map(str::to_owned).collect()
}

fn referenced() -> BTreeSet<String> {
    let mut referenced = names(&fs::read_to_string(root().join("charts/postrider/files/alerts.yaml")).unwrap());
    for dashboard in files(&root().join("charts/postrider/dashboards"), ".json") {
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(dashboard).unwrap()).unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                referenced.extend(names(target["expr"].as_str().unwrap()));
            }
        }
    }
    referenced
}

async fn scraped(app: &App) -> BTreeSet<String> {
    let text = app.manage("/metrics").await.text();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.map(|line| line.split(['{', ' ']).next().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
async fn every_metric_of_a_dashboard_or_alert_is_in_a_live_scrape() {
    let world = World::new().await.with_postgres().await;
    let topic = world.topic("carried");
    world.kafka.create(&topic, 1).await;
    let route = json!([{"name": "tried", "topic": topic, "target_url": "http://127.0.0.1:1/", "allow": ["127.0.0.0/8"],
        "retries": 0, "rate": 0.0}]);
    let app = world
        .app()
        .env("POSTRIDER_GATEWAY__AUTO_CREATE_TOPICS", "true")
        .env("POSTRIDER_GATEWAY__RELAYS", &route.to_string())
        .env("POSTRIDER_GATEWAY__TOPICS__ALLOW", &format!("{},{topic}", world.topic("messages")))
        .env("POSTRIDER_MESSAGES__UNDELIVERED_AFTER_MS", "1000")
        .env("POSTRIDER_KAFKA__PROPERTIES", &json!({"statistics.interval.ms": "500"}).to_string())
        .start()
        .await;
    let stream = Stream::open(&app, "/api/v1/comments/stream", "").await;
    let output = roundtrip(&world, &app, &["--topic", &topic]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // Some metrics need help: a value that expires, and a record in a partition that its key does
    // not hash to.
    app.post_json("/push", &json!({"key": "short", "value": 1, "ttl_seconds": 1})).await.expect(202);
    for partition in 0..2 {
        let record = json!({"topic": world.topic("messages"), "key": "a", "payload": 1, "partition": partition});
        app.post_json("/produce", &record).await.expect(200);
    }
    // And a message that waits for its receiver.
    let message = json!({"chatId": "c", "senderId": "s", "receiverId": "late", "content": "while you were away"});
    app.post_json("/api/v1/message/action", &message).await.expect(200);
    stored(&app, "late", 1).await;
    let late = Stream::open(&app, "/api/v1/messages/stream?receiverId=late", "").await;
    let wanted = referenced();
    assert!(wanted.len() > 50, "{wanted:?}");
    let begun = Instant::now();
    loop {
        let scraped = scraped(&app).await;
        let absent = |name: &&String| !scraped.contains(*name) && !ONLY_AFTER_A_FAULT.contains(&name.as_str());
        let missing: Vec<_> = wanted.iter().filter(absent).collect();
        if missing.is_empty() {
            break;
        }
        assert!(begun.elapsed() < seconds(40), "not scraped: {missing:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop((stream, late));
    app.stop().await;
}

#[test]
fn metrics_that_appear_only_after_a_fault_are_in_the_sources() {
    let sources: String = ["src", "crates"]
        .iter()
        .flat_map(|folder| files(&root().join(folder), ".rs"))
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    for name in ONLY_AFTER_A_FAULT {
        assert!(sources.contains(&format!("\"{name}\"")), "{name}");
    }
}

#[test]
fn names_finds_a_metric_that_does_not_exist() {
    let found = names("sum by (le) (rate(postrider_no_such_total{job=\"a\"}[5m])) / up{x=\"{{pod}}\"}");
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["postrider_no_such_total"]);
}
