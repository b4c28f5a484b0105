//! The command `postrider relay`: flags, variables and exit codes.

use std::{collections::BTreeMap, process::Output};

use crate::{
    harness::{app::command, stack::off_runtime, wait::seconds},
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
    scene.target.script([crate::harness::target::Act::status(500), crate::harness::target::Act::status(500)]);
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
        (&["--workers", "0"], 1, "workers"),
        (&["--rate=-1"], 1, "rate"),
        (&["--ca-file", "/nowhere.pem"], 1, "/nowhere.pem"),
        (&["--header", "a b: c"], 1, "a b"),
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
