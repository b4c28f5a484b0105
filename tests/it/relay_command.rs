//! The command `postrider relay`: flags, variables and exit codes.

use std::{collections::BTreeMap, process::Output};

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer},
};
use rustix::process::Signal;

use crate::{
    harness::{app::command, stack::off_runtime, target::Act, wait::seconds},
    relay::{Scene, numbered},
};

/// Runs the binary to its end.
async fn run(words: &[&str], env: &[(&str, &str)]) -> Output {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let env: BTreeMap<_, _> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    off_runtime(move || command(&env).args(words).output().unwrap()).await
}

#[tokio::test]
async fn single_dash_flags_work_and_no_other_server_than_kafka_is_needed() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("a", 1)]).await;
    let (topic, url) = (format!("-topic={}", scene.topic), scene.target.url("/x"));
    let (group, brokers) = (scene.group(), scene.world.kafka.brokers.clone());
    let nowhere = "redis://127.0.0.1:1";
    let words = [
        "-broker",
        &format!("127.0.0.1:1,{brokers}"),
        &topic,
        "-target-url",
        &url,
        "-group",
        &group,
        "-workers",
        "2",
        "-rate",
        "10.0",
        "-timeout",
        "5s",
        "-retries=2",
        "-retry-delay",
        "0.1",
    ];
    let app = scene.world.app().relay(words).env("POSTRIDER_REDIS__URL", nowhere).unset("POSTRIDER_KAFKA__BROKERS");
    let app = app.start().await;
    scene.target.await_seen(1, seconds(20)).await;
    app.stop().await;
}

#[tokio::test]
async fn variables_work_and_flags_override_them() {
    let scene = Scene::new(1).await;
    scene.target.script([Act::status(500), Act::status(500)]);
    scene.write(vec![numbered("a", 1)]).await;
    let brokers = scene.world.kafka.brokers.clone();
    let mut app = scene.world.app().relay(["--topic", &scene.topic]).unset("POSTRIDER_KAFKA__BROKERS");
    for (name, value) in [
        ("BROKER", brokers.as_str()),
        ("TOPIC", "another-topic"),
        ("CONSUMER_GROUP", &scene.group()),
        ("TARGET_URL", &scene.target.url("/by-variable")),
        ("RATE_LIMIT", "50"),
        ("HTTP_TIMEOUT", "5"),
        ("RETRY_ATTEMPTS", "1"),
        ("RETRY_DELAY", "300ms"),
        ("WORKERS", ""),
    ] {
        app = app.env(name, value);
    }
    let app = app.start().await;
    let letters = scene.letters(1).await;
    assert_eq!(letters[0].header("attempts"), Some("2"));
    assert_eq!(letters[0].header("consumer-group"), Some(scene.group().as_str()));
    let seen = scene.target.seen();
    assert!(seen[0].head.starts_with("POST /by-variable "));
    let gap_ms = (seen[1].at - seen[0].at).as_millis();
    assert!((295..1_000).contains(&gap_ms), "{gap_ms} ms");
    app.stop().await;
}

#[tokio::test]
async fn a_management_port_in_use_is_skipped_unless_it_was_chosen_explicitly() {
    let scene = Scene::new(1).await;
    let taken = std::net::TcpListener::bind("0.0.0.0:9090");
    let app = scene.world.app().relay(scene.words(&[])).unset("POSTRIDER_MANAGEMENT__LISTEN").start().await;
    let port: u16 = app.management.rsplit_once(':').unwrap().1.parse().unwrap();
    assert!((9_091..9_191).contains(&port), "{port}");
    app.stop().await;
    let address = format!("127.0.0.1:{port}");
    let _other = std::net::TcpListener::bind(&address).unwrap();
    let words = ["relay", "--topic", "t", "--target-url", "http://127.0.0.1:1", "--management", &address];
    let output = run(&words, &[]).await;
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains(&address), "{error}");
    drop(taken);
}

#[tokio::test]
async fn errors_name_the_wrong_argument_and_the_exit_code_is_not_zero() {
    let base = ["relay", "--topic", "t", "--target-url", "http://127.0.0.1:1/"];
    for (more, code, word) in [
        (&["--rate", "fast"][..], 2, "--rate"),
        (&["--timeout", "soon"], 2, "30s"),
        (&["--backoff", "linear"], 2, "exponential"),
        (&["--nonsense"], 2, "--nonsense"),
        (&["--rate", "fast"], 2, "it must be a number of requests per second, 0 or more"),
        (&["--rate", "-1"], 2, "it must be a number of requests per second, 0 or more"),
        (&["--rate=-1"], 2, "it must be a number of requests per second, 0 or more"),
        (&["--workers", "0"], 2, "it must be a whole number, 1 or more"),
        (&["--retries", "-1"], 2, "it must be a whole number, 0 or more"),
        (&["--ca-file", "/nowhere.pem"], 1, "/nowhere.pem"),
        (&["--header", "a b: c"], 1, "a b"),
        (&["--header", "nocolon"], 2, "colon"),
        (&["--once", "--dry-run"], 2, "--dry-run"),
        (&["--set", "kafka.broker=x"], 1, "kafka.brokers"),
    ] {
        let output = run(&[&base, more].concat(), &[("POSTRIDER_MANAGEMENT__LISTEN", "127.0.0.1:0")]).await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {error}");
        assert!(error.contains(word), "{more:?}: {error}");
    }
    let output = run(&["relay", "--topic", "t"], &[]).await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("TARGET_URL") && output.status.code() == Some(1));
    let output = run(&["relay", "--topic", "a b", "--target-url", "http://127.0.0.1:1"], &[]).await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("topic") && output.status.code() == Some(1));
}

#[tokio::test]
async fn once_delivers_what_the_topic_has_and_explains_what_failed() {
    let scene = Scene::new(2).await;
    let words = |more: &[&str]| [vec!["relay".to_owned()], scene.words(more), vec!["--once".to_owned()]].concat();
    let relay = async |more: &[&str]| {
        let mut command = scene.world.command();
        command.args(words(more));
        let output = off_runtime(move || command.output().unwrap()).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, summary, log) = relay(&[]).await;
    assert_eq!(code, Some(0), "an empty topic has an end: {log}");
    assert!(summary.starts_with("delivered 0 records"), "{summary}");
    scene.write((0..5).map(|n| numbered(&format!("k{n}"), n)).collect()).await;
    let (code, summary, log) = relay(&[]).await;
    assert_eq!((code, scene.target.count()), (Some(0), 5), "{log}");
    assert!(summary.contains("delivered 5 records") && summary.contains("0 records are dead letters"), "{summary}");
    scene.write(vec![numbered("a", 6), numbered("b", 7)]).await;
    scene.target.decide(|seen| Act::status(if seen.json()["key"] == "a" { 418 } else { 200 }));
    let (code, summary, log) = relay(&["--retries", "1"]).await;
    assert_eq!(code, Some(1), "{summary}{log}");
    assert!(summary.contains("delivered 1 records") && summary.contains("2 attempts failed"), "{summary}");
    assert!(summary.contains("1 http_418, the last one") && summary.contains("postrider dlq list"), "{summary}");
    assert!(log.contains("1 records failed"), "{log}");
    let words = ["relay", "--topic", "nowhere", "--target-url", "http://127.0.0.1:1", "--once"];
    let missing = run(&words, &[("BROKER", &scene.world.kafka.brokers)]).await;
    let error = String::from_utf8_lossy(&missing.stderr);
    assert!(missing.status.code() == Some(1) && error.contains("topic `nowhere` does not exist"), "{error}");
}

#[tokio::test]
async fn a_signal_before_the_end_is_not_success() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("a", 1), numbered("a", 2)]).await;
    scene.target.decide(|seen| if seen.json()["value"]["n"] == 1 { Act::OK } else { Act::Hang });
    let mut app = scene.relay(&["--once"]).await;
    scene.target.await_seen(2, seconds(20)).await;
    app.signal(Signal::TERM);
    assert_eq!(app.exit(seconds(30)).await.code(), Some(143), "{}", app.log());
    let mut app = scene.relay(&["--once"]).await;
    scene.target.await_seen(3, seconds(20)).await;
    app.signal(Signal::INT);
    assert_eq!(app.exit(seconds(30)).await.code(), Some(130), "{}", app.log());
    assert_eq!(scene.target.seen()[2].json()["value"]["n"], 2, "the first record was committed");
}

/// Commits an offset of partition 0 for the scene's group.
fn commit(scene: &Scene, offset: i64) {
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &scene.world.kafka.brokers).set("group.id", scene.group());
    let client: BaseConsumer = client.create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&scene.topic, 0, Offset::Offset(offset)).unwrap();
    client.commit(&list, CommitMode::Sync).unwrap();
}

#[tokio::test]
async fn a_topic_that_ends_before_the_groups_commit_is_delivered_anew() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("a", 1), numbered("b", 2)]).await;
    commit(&scene, 9);
    let mut command = scene.world.command();
    command.arg("relay").args(scene.words(&["--once"]));
    let output = off_runtime(move || command.output().unwrap()).await;
    let (summary, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && summary.starts_with("delivered 2 records"), "{summary}{log}");
    assert_eq!(scene.target.count(), 2);
}

#[tokio::test]
async fn a_dry_run_prints_the_requests_and_neither_sends_nor_commits() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("a", 1), numbered("b", 2)]).await;
    let dry_run = async || {
        let mut command = scene.world.command();
        command.arg("relay").args(scene.words(&["--dry-run", "--header", "authorization: hidden"]));
        let output = off_runtime(move || command.output().unwrap()).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = dry_run().await;
    let requests: Vec<serde_json::Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<&serde_json::Value> = requests.iter().map(|request| &request["body"]["value"]["n"]).collect();
    assert_eq!(numbers, [1, 2]);
    assert!(requests[0]["url"].as_str().unwrap().ends_with("/********") && !printed.contains("hidden"), "{printed}");
    assert_eq!((dry_run().await, scene.target.count()), (printed, 0), "nothing was committed or sent");
    let app = scene.relay(&[]).await;
    scene.target.await_seen(2, seconds(20)).await;
    app.stop().await;
    // The commit of a finished record is awaited by the stop.
    assert_eq!(dry_run().await, "");
}

#[tokio::test]
async fn a_dry_run_refuses_a_target_that_a_delivery_would_refuse() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("a", 1)]).await;
    for (host, words) in [("127.0.0.1", "127.0.0.1, which may not"), ("localhost", "because it is a loopback address")]
    {
        let url = format!("http://{host}:1/hook");
        let mut command = scene.world.command();
        command.args(["relay", "--topic", &scene.topic, "--target-url", &url, "--dry-run", "--public-only"]);
        let output = off_runtime(move || command.output().unwrap()).await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{error}");
        assert!(error.contains("--public-only: ") && error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_relay_without_kafka_says_where_it_looks_for_it_and_waits() {
    let scene = Scene::new(1).await;
    let app = scene.world.app().relay(scene.words(&["--broker", "127.0.0.1:1"])).even_if_not_ready().start().await;
    let line = app.await_log("waiting for kafka", seconds(20)).await;
    let error = line["error"].as_str().unwrap();
    assert!(error.contains("127.0.0.1:1 (`kafka.brokers`, from --broker) within 3 s: "), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
    app.stop().await;
}
