//! Each comment is stored once, despite duplicates, crashes, lost data, and records that do not fit
//! the table.

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;

use crate::{
    comments::{PATH, all, comment, counts, listed, texts},
    harness::{App, Stack, World, kafka::Stored, sse::Stream, until, wait::seconds},
};

/// Posts numbered comments until it is stopped, and retries each one until it is acknowledged.
pub struct Poster {
    task: tokio::task::JoinHandle<Vec<String>>,
    stop: tokio::sync::watch::Sender<bool>,
    count: tokio::sync::watch::Receiver<usize>,
}

impl Poster {
    /// Starts posting to the address in `api`, which may change when its process is replaced. An
    /// attempt without a success answer is retried.
    pub fn start(name: &'static str, api: tokio::sync::watch::Receiver<String>) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let (counter, count) = tokio::sync::watch::channel(0);
        let client = reqwest::Client::builder().timeout(seconds(15)).build().unwrap();
        let task = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            while !*stopped.borrow() {
                let text = format!("{name} {}", acknowledged.len());
                until(&format!("{text} is acknowledged"), seconds(60), || {
                    let request = client
                        .post(format!("{}{PATH}", *api.borrow()))
                        .header("idempotency-key", &text)
                        .json(&json!({"text": text, "post_id": name}));
                    async move { request.send().await.is_ok_and(|answer| answer.status() == 200).then_some(()) }
                })
                .await;
                acknowledged.push(text);
                counter.send_replace(acknowledged.len());
            }
            acknowledged
        });
        Self { task, stop, count }
    }

    /// Waits until `count` more comments are acknowledged.
    pub async fn more(&self, count: usize) {
        let wanted = *self.count.borrow() + count;
        let mut counted = self.count.clone();
        tokio::time::timeout(seconds(90), counted.wait_for(|&count| count >= wanted)).await.unwrap().unwrap();
    }

    /// Stops posting, and returns the texts of the acknowledged comments.
    pub async fn stop(self) -> Vec<String> {
        self.stop.send_replace(true);
        self.task.await.unwrap()
    }
}

pub fn address(app: &App) -> (tokio::sync::watch::Sender<String>, tokio::sync::watch::Receiver<String>) {
    tokio::sync::watch::channel(app.api.clone())
}

/// Waits for `count` dead letters, and returns them by key, which identifies the record. Panics if
/// there are more.
async fn letters(world: &World, count: usize) -> BTreeMap<String, Stored> {
    let topic = world.topic("dead-letter-events");
    let letters = until(&format!("{count} dead letters"), seconds(20), || async {
        let letters = world.kafka.read(&topic).await;
        let letters: BTreeMap<_, _> = letters.into_iter().map(|letter| (letter.key().to_owned(), letter)).collect();
        Some(letters).filter(|letters| letters.len() >= count)
    })
    .await;
    assert_eq!(letters.len(), count, "{letters:?}");
    letters
}

#[tokio::test]
async fn a_retried_comment_is_stored_once() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    // Without a record key, each duplicate goes to any partition.
    for _ in 0..12 {
        app.post_with(PATH, &[("idempotency-key", "k1")], &json!({"text": "once"})).await.expect(200);
    }
    comment(&app, "p", "another").await;
    comment(&app, "p", "another").await;
    let log = world.kafka.read(&world.topic("comments")).await;
    assert_eq!(log.len(), 14);
    assert!(
        log.iter().any(|record| record.partition != log[0].partition),
        "the duplicates must be in several partitions"
    );
    let comments = listed(&app, 3).await;
    assert_eq!(counts(texts(&comments))["once"], 1);
    until("all duplicates are counted", seconds(10), || async {
        (app.metric("postrider_comments_duplicate_records_total").await == Some(11.0)).then_some(())
    })
    .await;
    assert_eq!(listed(&app, 3).await, comments);
    app.stop().await;
}

#[tokio::test]
async fn killed_processors_and_a_replay_of_the_topic_store_each_comment_once() {
    let mut world = World::new().await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let poster = Poster::start("a", address(&api).1);
    for _ in 0..3 {
        let processor = world.app().role("processor").env("POSTRIDER_COMMENTS__BATCH_RECORDS", "7").start().await;
        poster.more(60).await;
        processor.kill().await;
        poster.more(20).await;
    }
    let processor = world.app().role("processor").start().await;
    let acknowledged = poster.stop().await;
    let comments = listed(&api, acknowledged.len()).await;
    let newest_first: Vec<&str> = acknowledged.iter().rev().map(String::as_str).collect();
    assert_eq!(texts(&comments), newest_first, "comments on one post keep their order");
    processor.stop().await;
    // A new consumer group reads the whole topic again.
    let prefix = format!("{}again_", world.prefix);
    world.set("POSTRIDER_KAFKA__GROUP_PREFIX", &prefix);
    world.sql("UPDATE projection_progress SET next = 0").await;
    let processor = world.app().role("processor").start().await;
    until("all replayed records are counted as duplicates", seconds(30), || async {
        let repeated = processor.metric("postrider_comments_duplicate_records_total").await;
        (repeated >= Some(acknowledged.len() as f64)).then_some(())
    })
    .await;
    assert_eq!(listed(&api, acknowledged.len()).await, comments);
    assert_eq!(processor.metric("postrider_comments_stored_total").await, Some(0.0));
    processor.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn records_of_older_producers_are_stored_and_invalid_records_are_dead_lettered() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_COMMENTS__MAX_TEXT_BYTES", "1000");
    world.sql("ALTER TABLE comments ADD CHECK (text NOT LIKE 'forbidden%')").await;
    let app = world.app().start().await;
    let topic = world.topic("comments");
    let value = |text: &str| Some(text.as_bytes().to_vec());
    let mut values = vec![
        None,
        value("not JSON"),
        value("{\"text\":\"\u{1}\"}"),
        Some(b"\xff\xfe".to_vec()),
        value(r#"{"note":"no text"}"#),
        value(r#"{"text":"  "}"#),
        value(r#"{"text":7}"#),
        value("[]"),
        value(r#"{"text":"a\u0000"}"#),
        Some(json!({"text": "x".repeat(1_001)}).to_string().into_bytes()),
    ];
    for number in 0..30 {
        values.push(value(&format!(r#"{{"text":"old {number}"}}"#)));
        if number % 10 == 3 {
            values.push(value(&format!(r#"{{"text":"forbidden {number}"}}"#)));
        }
    }
    world.kafka.write(&topic, &values, &[]).await;
    world.kafka.write(&topic, &[value(r#"{"text":"foreign"}"#)], &[("ce_id", "no uuid")]).await;
    let comments = listed(&app, 31).await;
    let found = counts(texts(&comments));
    assert!((0..30).all(|number| found[&format!("old {number}")] == 1) && found["foreign"] == 1, "{found:?}");
    let letters = letters(&world, 13).await;
    for (class, count) in [
        ("no_value", 1),
        ("not_json", 3),
        ("no_text", 2),
        ("wrong_type", 2),
        ("null_character", 1),
        ("too_large", 1),
        ("refused", 3),
    ] {
        let of_class = letters.values().filter(|letter| letter.header("error-class") == Some(class));
        assert_eq!(of_class.count(), count, "{class}");
    }
    for reason in ["`text` must be a string (got 7)", "the value must be a JSON object (got an array)"] {
        assert!(letters.values().any(|letter| letter.header("error") == Some(reason)), "{reason}: {letters:?}");
    }
    comment(&app, "p", "still going").await;
    listed(&app, 32).await;
    app.kill().await;
    let app = world.app().start().await;
    comment(&app, "p", "after the crash").await;
    listed(&app, 33).await;
    let again = self::letters(&world, 13).await;
    assert!(again.keys().eq(letters.keys()), "{again:?}");
    app.stop().await;
    // Ids that are derived from positions are the same when the topic is read again.
    world.set("POSTRIDER_KAFKA__GROUP_PREFIX", &format!("{}again_", world.prefix));
    world.sql("UPDATE projection_progress SET next = 0").await;
    let app = world.app().start().await;
    comment(&app, "p", "after the replay").await;
    let comments = listed(&app, 34).await;
    assert_eq!(comments[0]["text"], "after the replay");
    app.stop().await;
}

#[tokio::test]
async fn comments_are_accepted_during_postgres_restarts_and_none_is_lost() {
    let stack = Stack::own("comments", &["--only", "postgres"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().start().await;
    let stream = Stream::open(&app, &format!("{PATH}/stream"), "").await;
    let posters = ["a", "b"].map(|name| Poster::start(name, address(&app).1));
    for how in ["--immediate", "--kill"] {
        posters[0].more(50).await;
        stack.ctl(&["restart", "postgres", how]).await;
    }
    stack.ctl(&["stop", "postgres"]).await;
    let answer = app.get(PATH).await;
    answer.problem(503, "postgres_unavailable");
    comment(&app, "p", "while it is down").await;
    app.get(&format!("{PATH}/stream?after=0.0-0")).await.problem(503, "postgres_unavailable");
    stack.ctl(&["start", "postgres"]).await;
    posters[1].more(50).await;
    let mut expected = vec!["while it is down".to_owned()];
    for poster in posters {
        expected.extend(poster.stop().await);
    }
    let comments = listed(&app, expected.len()).await;
    assert_eq!(counts(texts(&comments)), counts(expected.iter().map(String::as_str)));
    let seen = until("the stream has all comments", seconds(10), || async {
        Some(stream.seen()).filter(|seen| seen.events.len() >= expected.len())
    })
    .await;
    assert_eq!(counts(seen.texts()), counts(expected.iter().map(String::as_str)));
    app.await_ready(seconds(20)).await;
    app.stop().await;
}

#[tokio::test]
async fn comments_that_postgres_lost_are_restored_from_the_topic() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    for number in 0..30 {
        comment(&app, &format!("p{}", number % 4), &format!("t{number}")).await;
    }
    let comments = listed(&app, 30).await;
    // Lose everything while nobody writes; then the newest part, as after a restore; then
    // everything while comments arrive.
    world.sql("TRUNCATE comments, projection_progress").await;
    assert_eq!(listed(&app, 30).await, comments);
    world
        .sql(r#"DELETE FROM comments WHERE "offset" >= 3; UPDATE projection_progress SET next = least(next, 3)"#)
        .await;
    assert_eq!(listed(&app, 30).await, comments);
    let poster = Poster::start("a", address(&app).1);
    poster.more(50).await;
    world.sql("TRUNCATE comments, projection_progress").await;
    poster.more(50).await;
    let expected: Vec<String> = (0..30).map(|number| format!("t{number}")).chain(poster.stop().await).collect();
    let found = listed(&app, expected.len()).await;
    assert_eq!(counts(texts(&found)), counts(expected.iter().map(String::as_str)));
    app.stop().await;
}

#[tokio::test]
async fn a_replaced_topic_is_rejected_until_the_epoch_is_raised_and_no_stored_comment_is_lost() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let stream = Stream::open(&app, &format!("{PATH}/stream"), "").await;
    for number in 0..6 {
        comment(&app, "p", &format!("old {number}")).await;
    }
    listed(&app, 6).await;
    until("the stream has caught up", seconds(10), || async { (stream.seen().events.len() == 6).then_some(()) }).await;
    let (third, _) = stream.seen().events[2].clone();
    drop(stream);
    app.stop().await;
    world.kafka.remove_and_wait(&world.topic("comments")).await;
    let app = world.app().even_if_not_ready().start().await;
    let detail = until("the replaced topic is rejected", seconds(40), || async {
        app.failing("comments").await.filter(|detail| detail.contains("comments.epoch"))
    })
    .await;
    assert!(detail.contains("before 6"), "{detail}");
    app.stop().await;
    let app = world.app().env("POSTRIDER_COMMENTS__EPOCH", "1").start().await;
    comment(&app, "p", "new").await;
    assert_eq!(listed(&app, 7).await[0]["text"], "new");
    let stream = Stream::open(&app, &format!("{PATH}/stream"), &third).await;
    let seen = until("the stream has the old comments and the new one", seconds(10), || async {
        Some(stream.seen()).filter(|seen| seen.events.len() >= 4)
    })
    .await;
    assert_eq!(seen.texts(), ["old 3", "old 4", "old 5", "new"]);
    assert!(all(&app, 2, "&post_id=p").await.unwrap().len() == 7);
    tokio::time::timeout(Duration::from_secs(30), app.stop()).await.unwrap();
}
