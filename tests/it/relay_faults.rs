//! Delivery (Kafka to HTTP) to targets that fail.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    harness::{
        stack::off_runtime,
        target::{Act, Target},
        wait::{seconds, until, until_now},
    },
    relay::{Scene, numbered},
};

#[tokio::test]
async fn after_four_attempts_a_record_is_dead_lettered_and_never_retried() {
    let scene = Scene::new(1).await;
    scene.write(vec![numbered("bad", 1), numbered("bad", 2), numbered("good", 3)]).await;
    scene.target.decide(|seen| match seen.json()["value"]["n"].as_u64() {
        Some(1) => Act::Answer(500, "", "no \"luck\""),
        _ => Act::OK,
    });
    let app = scene.relay(&["--retry-delay", "500ms"]).await;
    let letters = scene.letters(1).await;
    scene.target.await_seen(6, seconds(20)).await;
    app.stop().await;
    let seen = scene.target.seen();
    let (attempts, others): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.json()["value"]["n"] == 1);
    assert_eq!((attempts.len(), others.len()), (4, 2));
    for pair in attempts.windows(2) {
        let gap_ms = (pair[1].at - pair[0].at).as_millis();
        assert!((495..900).contains(&gap_ms), "{gap_ms} ms");
    }
    let second = others.iter().find(|seen| seen.json()["value"]["n"] == 2).unwrap();
    assert!(second.at > attempts[3].at, "the key did not wait until its first record was settled");
    let letter = &letters[0];
    assert_eq!(letter.text(), r#"{"n":1}"#);
    for (name, value) in [
        ("original-topic", scene.topic.as_str()),
        ("original-offset", "0"),
        ("original-key", "bad"),
        ("consumer-group", &scene.group()),
        ("error-class", "http_500"),
        ("error", "answered 500: no \"luck\""),
        ("attempts", "4"),
    ] {
        assert_eq!(letter.header(name), Some(value), "{name}");
    }
    // A dead-lettered record is settled: a restart does not retry it.
    scene.write(vec![numbered("good", 4)]).await;
    let app = scene.relay(&[]).await;
    scene.target.await_seen(7, seconds(20)).await;
    app.stop().await;
    assert_eq!((scene.target.count(), scene.letters(1).await.len()), (7, 1));
}

#[tokio::test]
async fn every_kind_of_failure_has_its_own_class_in_the_dead_letters() {
    let scene = Scene::new(1).await;
    let acts = [
        ("hang", Act::Hang, "timeout"),
        ("reset", Act::Reset, "connection"),
        ("garbage", Act::Bytes(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "bad_answer"),
        ("redirect", Act::Answer(302, "location: http://127.0.0.1:1/\r\n", ""), "redirect"),
        ("gone", Act::status(410), "gone"),
        ("missing", Act::status(404), "http_404"),
        ("flood", Act::Flood(503, 200 << 20), "http_503"),
    ];
    let keys = acts.each_ref().map(|(key, _, class)| (*key, *class));
    scene.write(keys.iter().map(|(key, _)| numbered(key, 1)).collect()).await;
    scene.target.decide(move |seen| {
        let key = seen.json()["key"].as_str().unwrap().to_owned();
        acts.iter().find(|(name, _, _)| *name == key).unwrap().1.clone()
    });
    let app = scene.relay(&["--retries", "1", "--retry-delay", "10ms", "--timeout", "1s"]).await;
    let letters = scene.letters(keys.len()).await;
    for (key, class) in keys {
        let letter = letters.iter().find(|letter| letter.header("original-key") == Some(key)).unwrap();
        assert_eq!((letter.header("error-class"), letter.header("attempts")), (Some(class), Some("2")), "{key}");
    }
    assert_eq!(scene.target.count(), 14, "not two attempts for each record, including 410");
    app.stop().await;
}

#[tokio::test]
async fn a_record_counts_as_delivered_when_the_target_trickles_its_body_after_200() {
    let scene = Scene::new(1).await;
    scene.target.script([Act::Trickle(200)]);
    scene.write(vec![numbered("a", 1), numbered("a", 2)]).await;
    let app = scene.relay(&[]).await;
    scene.target.await_seen(2, seconds(20)).await;
    app.stop().await;
    assert_eq!(scene.target.count(), 2);
}

#[tokio::test]
async fn retry_after_lengthens_the_wait_unless_it_is_ignored() {
    // The ignored header asks for an hour.
    for (more, header, at_least_ms) in
        [(&[][..], "retry-after: 1\r\n", 1_000), (&["--ignore-retry-after"][..], "retry-after: 3600\r\n", 100)]
    {
        let scene = Scene::new(1).await;
        scene.target.script([Act::Answer(429, header, "")]);
        scene.write(vec![numbered("a", 1)]).await;
        let app = scene.relay(more).await;
        let seen = scene.target.await_seen(2, seconds(20)).await;
        let gap_ms = (seen[1].at - seen[0].at).as_millis();
        assert!(gap_ms >= at_least_ms, "{more:?}: {gap_ms} ms");
        app.stop().await;
    }
}

#[tokio::test]
async fn a_target_that_was_down_gets_every_record_in_order_afterwards() {
    let scene = Scene::new(2).await;
    scene.write((0..60).map(|n| numbered(&format!("k{}", n % 6), n)).collect()).await;
    let down_until = Instant::now() + seconds(4);
    scene.target.decide(move |_| if Instant::now() < down_until { Act::status(503) } else { Act::OK });
    let app = scene.relay(&["--retries", "100", "--backoff", "exponential", "--max-retry-delay", "500ms"]).await;
    let delivered = || {
        let seen = scene.target.seen();
        let well = seen.into_iter().filter(|seen| seen.at >= down_until).map(|seen| seen.json());
        well.map(|body| (body["key"].clone(), body["value"]["n"].as_u64().unwrap())).collect::<Vec<_>>()
    };
    let delivered = until_now("all records are delivered", seconds(30), || {
        Some(delivered()).filter(|delivered| delivered.len() >= 60)
    })
    .await;
    for key in 0..6_u64 {
        let key = format!("k{key}");
        let numbers: Vec<u64> = delivered.iter().filter(|(name, _)| *name == key).map(|(_, n)| *n).collect();
        assert!(numbers.is_sorted() && numbers.len() == 10, "{key}: {numbers:?}");
    }
    app.stop().await;
}

#[tokio::test]
async fn sigterm_waits_for_a_running_request_and_commits_its_record() {
    let scene = Scene::new(1).await;
    scene.target.decide(|_| Act::After(Duration::from_millis(1_500), 200));
    scene.write(vec![numbered("a", 1)]).await;
    let mut app = scene.relay(&[]).await;
    scene.target.await_seen(1, seconds(20)).await;
    app.sigterm();
    assert!(app.exit(seconds(20)).await.success());
    scene.target.decide(|_| Act::OK);
    scene.write(vec![numbered("a", 2)]).await;
    let app = scene.relay(&[]).await;
    let seen = scene.target.await_seen(2, seconds(20)).await;
    assert_eq!(seen[1].json()["value"]["n"], 2, "the first record was not committed");
    app.stop().await;
}

#[tokio::test]
async fn sigterm_does_not_wait_for_a_hung_target_or_a_distant_rate_slot() {
    let scene = Scene::new(1).await;
    scene.target.script([Act::Hang]);
    scene.write(vec![numbered("a", 1), numbered("b", 2), numbered("c", 3)]).await;
    let mut app = scene.relay(&["--rate", "0.01"]).await;
    scene.target.await_seen(1, seconds(20)).await;
    app.sigterm();
    // The target has 30 s, and the next slot is 100 s away.
    assert!(app.exit(seconds(20)).await.success());
    let app = scene.relay(&[]).await;
    scene.target.await_seen(4, seconds(20)).await;
    app.stop().await;
}

#[tokio::test]
async fn configured_routes_refuse_private_addresses_unless_they_are_allowed() {
    let scene = Scene::new(1).await;
    let allowed = Target::start().await;
    scene.write(vec![numbered("a", 1)]).await;
    let port = scene.target.address.port();
    let route = |name: &str, url: &str, more: &str| {
        format!(r#"{{"name":"{name}","topic":"{}","target_url":"{url}","retries":0,"rate":0{more}}}"#, scene.topic)
    };
    let routes = [
        route("literal", &format!("http://127.0.0.1:{port}/"), ""),
        route("by-name", &format!("http://localhost:{port}/"), ""),
        route("other-net", &format!("http://[::ffff:127.0.0.1]:{port}/"), r#","allow":["10.0.0.0/8"]"#),
        route("allowed", &allowed.url("/"), r#","allow":["127.0.0.1/32"],"headers":{"authorization":"Bearer t"}"#),
    ];
    let mut scene = scene;
    scene.world.set("POSTRIDER_GATEWAY__RELAYS", &format!("[{}]", routes.join(",")));
    let app = scene.world.app().role("relay").start().await;
    let seen = allowed.await_seen(1, seconds(20)).await;
    assert_eq!(seen[0].header("authorization"), Some("Bearer t"));
    let letters = scene.letters(3).await;
    for letter in &letters {
        assert_eq!(letter.header("error-class"), Some("refused_address"), "{letter:?}");
    }
    assert_eq!(scene.target.connections(), 0);
    let delivered = r#"postrider_relay_requests_total{route="allowed",outcome="delivered"}"#;
    assert_eq!(app.metric(delivered).await, Some(1.0));
    let refused = r#"postrider_relay_requests_total{route="by-name",outcome="refused_address"}"#;
    assert_eq!(app.metric(refused).await, Some(1.0));
    let mut lag = scene.world.command();
    let shown = off_runtime(move || lag.args(["lag", "--output", "json"]).output().unwrap()).await;
    let shown: Vec<Value> = serde_json::from_slice(&shown.stdout).unwrap();
    for name in ["relay-literal", "relay-allowed"] {
        assert!(shown.iter().any(|row| row["consumer"] == name), "{name}: {shown:?}");
    }
    app.stop().await;
}

#[tokio::test]
async fn a_record_that_waits_for_its_retry_does_not_fail_the_liveness_probe() {
    let mut scene = Scene::new(1).await;
    scene.world.set("POSTRIDER_KAFKA__CONSUMER__STALL_TIMEOUT_MS", "2000");
    scene.target.script([Act::Answer(503, "retry-after: 3600\r\n", "later")]);
    let relay = scene.relay(&["--timeout", "500ms"]).await;
    scene.write(vec![numbered("k", 1)]).await;
    until("it is delivered once", seconds(20), || async { (scene.target.count() == 1).then_some(()) }).await;
    let lag = format!("postrider_consumer_lag_records{{client=\"relay-{}\"", scene.topic);
    until("the library reports the lag", seconds(20), || async {
        relay.metric(&lag).await.filter(|&records| records >= 1.0)
    })
    .await;
    // Several times the stall timeout.
    let begun = Instant::now();
    while begun.elapsed() < seconds(8) {
        let answer = relay.manage("/livez?verbose").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    relay.stop().await;
}
