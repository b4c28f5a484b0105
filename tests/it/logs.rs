//! Contents of the log: what must be in it, and what must not.

use serde_json::{Value, json};

use crate::harness::{
    App, Stack, World,
    stack::off_runtime,
    wait::{seconds, until},
};

fn lines(app: &App) -> Vec<Value> {
    app.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Returns whether a line comes from the client library.
fn is_of_library(line: &Value) -> bool {
    line["target"].as_str().is_some_and(|target| target.contains("rdkafka"))
        || line["message"].as_str().is_some_and(|message| message.contains("rdkafka"))
}

#[tokio::test]
async fn the_lines_of_the_kafka_library_are_folded_during_an_outage_and_all_there_for_debugging() {
    const ONE: &str = "kafka client reported an error, more within a minute are counted";
    let stack = Stack::own("logs", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let app = world.app().start().await;
    let debugging = world.app().role("api").env("POSTRIDER_TELEMETRY__LOG_FILTER", "debug").start().await;
    stack.ctl(&["kill", "kafka"]).await;
    let all = |line: &Value| line["message"] == "kafka client library";
    until("the library has logged much", seconds(60), || async {
        (lines(&debugging).into_iter().filter(all).count() > 5).then_some(())
    })
    .await;
    app.await_failing("kafka", seconds(30)).await;
    stack.ctl(&["start", "kafka"]).await;
    app.await_ready(seconds(60)).await;
    let again = app.await_log("kafka reachable again", seconds(30)).await;
    assert!(again["client_errors"].as_u64().unwrap() > 5, "{again}");
    let logged = lines(&app);
    let folded: Vec<&Value> = logged.iter().filter(|line| line["message"] == ONE).collect();
    assert!((1..=2).contains(&folded.len()), "{folded:?}");
    assert!(folded[0]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{folded:?}");
    let unfolded: Vec<&Value> = logged.iter().filter(|line| is_of_library(line)).collect();
    assert!(unfolded.is_empty(), "{unfolded:?}");
    app.stop().await;
    debugging.stop().await;
}

#[tokio::test]
async fn the_log_has_nothing_that_people_wrote() {
    const MARKER: &str = "whisper4711";
    let world = World::new().await.with_postgres().await;
    let topic = world.make_topic("any", 1).await;
    let app = world.app().start().await;
    let debugging = world.app().env("POSTRIDER_TELEMETRY__LOG_FILTER", "info,postrider_comments=debug").start().await;
    let message = json!({"chatId": "c", "senderId": "ann", "receiverId": "bob", "content": MARKER});
    for (path, body, status) in [
        ("/api/v1/comments", json!({"text": format!("1 {MARKER}"), "post_id": "a"}), 200),
        ("/api/v1/comments", json!({"text": format!("2 {MARKER}"), "post_id": "b"}), 200),
        ("/api/v1/comments", json!({"text": format!("3 {MARKER}"), "post_id": "c"}), 200),
        ("/api/v1/comments", json!({"text": [MARKER]}), 400),
        ("/api/v1/message/action", message, 200),
        ("/follow", json!({"follower_id": "bob", "followee_id": "ann"}), 200),
        ("/posts", json!({"author_id": "ann", "content": MARKER}), 202),
        ("/push", json!({"key": "k", "value": MARKER}), 202),
        ("/produce", json!({"topic": topic, "payload": MARKER}), 200),
    ] {
        assert_eq!(app.post_json(path, &body).await.status, status, "{path}");
    }
    // Records that no projection accepts become dead letters.
    let event = json!({"event_id": 1, "type": MARKER, "actor_id": "a", "payload": {}});
    for (name, bad) in [("comments", json!(MARKER)), ("message", json!(MARKER)), ("post-events", event)] {
        world.kafka.write(&world.topic(name), &[Some(bad.to_string().into_bytes())], &[]).await;
    }
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), 3).await;
    assert!(letters.iter().any(|letter| letter.header("error").is_some_and(|error| error.contains(MARKER))));
    for path in ["/api/v1/messages?receiverId=bob", "/feeds/bob?expand=posts", "/pull/k"] {
        until(&format!("{path} has it"), seconds(20), || async {
            app.get(path).await.text().contains(MARKER).then_some(())
        })
        .await;
    }
    let stored = |app: &App| lines(app).into_iter().filter(|line| line["message"] == "comment").count();
    until("all comments are logged", seconds(20), || async { (stored(&app) + stored(&debugging) == 3).then_some(()) })
        .await;
    let texts = lines(&debugging).into_iter().filter(|line| line["message"] == "comment text");
    assert_eq!(texts.filter(|line| line.to_string().contains(MARKER)).count(), stored(&debugging));
    for process in [&app, &debugging] {
        let told = |line: &Value| line["level"] != "DEBUG" && line.to_string().contains(MARKER);
        let told: Vec<Value> = lines(process).into_iter().filter(told).collect();
        assert!(told.is_empty(), "{told:?}");
    }
    app.stop().await;
    debugging.stop().await;
}

#[tokio::test]
async fn what_reads_kafka_waits_for_a_broker_that_is_just_starting() {
    let stack = Stack::own("just-started", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let app = world.app().start().await;
    stack.ctl(&["kill", "kafka"]).await;
    // They ask from the first moment at which the broker answers.
    let run = |words: &'static [&'static str], management: String| {
        let mut command = world.command();
        command.args(words).args(["--wait", "2m"]).env("MANAGEMENT_URL", management);
        tokio::spawn(off_runtime(move || command.output().unwrap()))
    };
    let commands = [run(&["dlq", "list"], String::new()), run(&["lag"], app.management.clone())];
    stack.ctl(&["start", "kafka"]).await;
    let answer = app.get("/admin/dlq").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    for command in commands {
        let output = command.await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    app.stop().await;
}
