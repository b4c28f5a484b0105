//! The live stream of comments: stored comments arrive at once, and a broken stream resumes where
//! it ended.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::{
    comments::{PATH, comment, counts, listed},
    comments_faults::{Poster, address},
    harness::{
        Stack, World,
        raw::Raw,
        redis,
        sse::{Seen, Stream},
        until,
        wait::{seconds, until_now},
    },
};

pub const STREAM: &str = "/api/v1/comments/stream";

async fn events(stream: &Stream, count: usize) -> Seen {
    until_now(&format!("{count} events"), seconds(20), || (stream.count() >= count).then_some(())).await;
    let seen = stream.seen();
    assert_eq!(seen.events.len(), count, "{seen:?}");
    seen
}

/// Follows the stream until the text `last` arrives, and resumes whenever the stream ends. Returns
/// all texts.
async fn follow(api: tokio::sync::watch::Receiver<String>, mut after: String, last: String) -> Vec<String> {
    let client = reqwest::Client::new();
    let mut texts = Vec::new();
    loop {
        let current = api.borrow().clone();
        let Ok(stream) = Stream::try_open(&client, &current, STREAM, &after).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let seen = until("the stream ends or has the last text", seconds(120), || async {
            Some(stream.seen()).filter(|seen| seen.ended || seen.texts().contains(&last.as_str()))
        })
        .await;
        texts.extend(seen.texts().into_iter().map(str::to_owned));
        after = seen.last_id;
        if texts.contains(&last) {
            return texts;
        }
    }
}

#[tokio::test]
async fn a_stream_delivers_comments_at_once_and_another_process_resumes_it() {
    let mut world = World::new().await.with_postgres().await;
    // Sweeps are so rare that every comment in this test is delivered by a notification.
    world.set("POSTRIDER_COMMENTS__STREAM_SWEEP_INTERVAL_MS", "600000");
    let (first, second) = (world.app().start().await, world.app().role("api").start().await);
    let stream = Stream::open(&first, STREAM, "").await;
    let start = until("the stream sends its start", seconds(5), || async {
        Some(stream.seen().last_id).filter(|id| !id.is_empty())
    })
    .await;
    // Until both processes subscribe to notifications, a comment may arrive late.
    let channel = format!("{}:comments:stored", world.prefix);
    until("both processes are subscribed", seconds(10), || async {
        let (_, count): (String, usize) = redis::run(&world.redis_url, &["PUBSUB", "NUMSUB", &channel]).await;
        (count == 2).then_some(())
    })
    .await;
    let given = json!({"text": "live", "author_id": "a", "post_id": "p"});
    first.post_json(PATH, &given).await.expect(200);
    let seen = events(&stream, 1).await;
    assert_eq!(seen.events[0].1, listed(&second, 1).await[0]);
    drop(stream);
    for number in 0..100 {
        comment(&first, &format!("p{}", number % 5), &format!("missed {number}")).await;
    }
    listed(&first, 101).await;
    let resumed = Stream::open(&second, STREAM, &seen.last_id).await;
    let missed = events(&resumed, 100).await;
    assert!(counts(missed.texts()).values().all(|&count| count == 1), "{missed:?}");
    comment(&second, "p", "live again").await;
    assert_eq!(events(&resumed, 101).await.texts()[100], "live again");
    // Resuming from any event delivers exactly the later ones; also from the start, and by the
    // query parameter.
    for at in [0, 1, 50, 99] {
        let again = Stream::open(&second, STREAM, &missed.events[at].0).await;
        let rest = events(&again, 100 - at).await;
        let mut expected = counts(missed.texts()[at + 1..].iter().copied());
        expected.insert("live again".to_owned(), 1);
        assert_eq!(counts(rest.texts()), expected);
    }
    let from_start = Stream::open(&second, &format!("{STREAM}?after={start}"), "").await;
    assert_eq!(events(&from_start, 102).await.texts()[0], "live");
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_replay_has_the_comments_of_all_partitions_by_time() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let stream = Stream::open(&app, STREAM, "").await;
    let start = until("the stream sends its start", seconds(5), || async {
        Some(stream.seen().last_id).filter(|id| !id.is_empty())
    })
    .await;
    drop(stream);
    let mut written = Vec::new();
    // Far more in one partition than a page takes of it.
    for (partition, count) in [(0, 100), (1, 5), (0, 40), (1, 30)] {
        let texts: Vec<String> = (0..count).map(|n| format!("{} {partition}", written.len() + n)).collect();
        let values: Vec<Vec<u8>> = texts.iter().map(|text| json!({"text": text}).to_string().into_bytes()).collect();
        world.kafka.write_in(&world.topic("comments"), partition, &values).await;
        written.extend(texts);
        listed(&app, written.len()).await;
    }
    let replayed = Stream::open(&app, STREAM, &start).await;
    assert_eq!(events(&replayed, written.len()).await.texts(), written);
    app.stop().await;
}

#[tokio::test]
async fn clients_see_every_comment_once_and_in_order_while_processes_crash_and_restart() {
    let world = World::new().await.with_postgres().await;
    let start_api = || world.app().role("api").start();
    let processor = world.app().role("processor").start().await;
    let mut api = start_api().await;
    let beginning = Stream::open(&api, STREAM, "").await;
    let beginning = until("the stream sends its start", seconds(5), || async {
        Some(beginning.seen().last_id).filter(|id| !id.is_empty())
    })
    .await;
    let (sender, addresses) = address(&api);
    let posters = ["a", "b", "c"].map(|name| Poster::start(name, addresses.clone()));
    let clients: Vec<_> =
        (0..3).map(|_| tokio::spawn(follow(addresses.clone(), beginning.clone(), "the end".to_owned()))).collect();
    for round in 0..4 {
        posters[0].more(40).await;
        let next = start_api().await;
        sender.send_replace(next.api.clone());
        let old = std::mem::replace(&mut api, next);
        if round % 2 == 0 { old.stop().await } else { old.kill().await }
    }
    processor.kill().await;
    let processor = world.app().role("processor").start().await;
    posters[1].more(40).await;
    let mut expected = Vec::new();
    for poster in posters {
        expected.extend(poster.stop().await);
    }
    listed(&api, expected.len()).await;
    comment(&api, "c", "the end").await;
    expected.push("the end".to_owned());
    for client_task in clients {
        let seen = client_task.await.unwrap();
        assert_eq!(counts(seen.iter().map(String::as_str)), counts(expected.iter().map(String::as_str)));
        for name in ["a", "b", "c"] {
            let of_post: Vec<&String> = seen.iter().filter(|text| text.starts_with(&format!("{name} "))).collect();
            let sent: Vec<&String> = expected.iter().filter(|text| text.starts_with(&format!("{name} "))).collect();
            assert_eq!(of_post, sent);
        }
    }
    processor.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn without_notifications_a_comment_is_delivered_by_the_next_sweep() {
    let stack = Stack::own("nohints", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().start().await;
    let stream = Stream::open(&app, STREAM, "").await;
    comment(&app, "p", "notified").await;
    events(&stream, 1).await;
    stack.ctl(&["stop", "redis"]).await;
    for number in 2..5 {
        comment(&app, "p", "late").await;
        events(&stream, number).await;
    }
    stack.ctl(&["start", "redis"]).await;
    app.await_ready(seconds(20)).await;
    app.stop().await;
}

#[tokio::test]
async fn streams_are_limited_in_number_kept_alive_and_ended_by_a_drain() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_COMMENTS__MAX_STREAMS", "2");
    world.set("POSTRIDER_COMMENTS__STREAM_HEARTBEAT_MS", "100");
    // Longer than the streams may take to end.
    world.set("POSTRIDER_DRAIN__GRACE_MS", "120000");
    let app = world.app().role("api").start().await;
    let (one, two) = (Stream::open(&app, STREAM, "").await, Stream::open(&app, STREAM, "").await);
    app.get(STREAM).await.problem(503, "too_many_streams");
    assert_eq!(app.metric("postrider_comments_open_streams").await, Some(2.0));
    until("heartbeats", seconds(5), || async { (one.seen().heartbeats >= 3).then_some(()) }).await;
    drop(two);
    let three = until("another stream is accepted", seconds(5), || async {
        Stream::try_open(&app.client, &app.api, STREAM, "").await.ok()
    })
    .await;
    app.stop().await;
    for stream in [one, three] {
        until("the stream ends", seconds(1), || async { stream.seen().ended.then_some(()) }).await;
    }
    let app = world.app().role("api").env("POSTRIDER_COMMENTS__STREAM_MAX_AGE_MS", "300").start().await;
    let stream = Stream::open(&app, STREAM, "").await;
    until("the stream ends at its maximum age", seconds(2), || async { stream.seen().ended.then_some(()) }).await;
    app.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_disconnected() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_HTTP__WRITE_TIMEOUT_MS", "1500").start().await;
    let mut stuck = Raw::connect(&app.api).await;
    stuck.send(format!("GET {STREAM} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
    assert_eq!(stuck.answer(seconds(5)).await.unwrap().status, 200);
    let idle = Stream::open(&app, &format!("{STREAM}?after=0.0-0"), "").await;
    assert_eq!(app.metric("postrider_comments_open_streams").await, Some(2.0));
    let text = "x".repeat(60_000);
    for number in 0..250 {
        comment(&app, "p", &format!("{number} {text}")).await;
    }
    until("the stuck client is disconnected", seconds(15), || async {
        (app.metric("postrider_comments_open_streams").await == Some(1.0)).then_some(())
    })
    .await;
    // A client that has nothing to read for longer than the timeout is not stuck.
    until_now("the other client has every comment", seconds(20), || (idle.count() == 250).then_some(())).await;
    drop(stuck);
    app.stop().await;
}

#[tokio::test]
async fn a_slow_client_is_disconnected_can_resume_and_delays_nobody() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_COMMENTS__STREAM_BUFFER_RECORDS", "16");
    // Otherwise the write timeout disconnects the client first.
    world.set("POSTRIDER_HTTP__WRITE_TIMEOUT_MS", "600000");
    let app = world.app().start().await;
    let mut slow = Raw::connect(&app.api).await;
    slow.send(format!("{} {STREAM} HTTP/1.1\r\nhost: x\r\n\r\n", Method::GET)).await;
    let head = slow.answer(seconds(5)).await.unwrap();
    assert_eq!(head.status, 200);
    let fast = Stream::open(&app, STREAM, "").await;
    let text = "x".repeat(60_000);
    let mut sent = 0;
    // Enough to fill the buffers that the kernel has for the slow client, some megabytes.
    while sent < 400 {
        comment(&app, "p", &format!("{sent} {text}")).await;
        sent += 1;
        until_now("the fast client has the comment", seconds(10), || (fast.count() == sent).then_some(())).await;
    }
    let received = slow.last_chunks().await;
    let text = String::from_utf8_lossy(&received);
    let last_id = text.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap().to_owned();
    let got = text.lines().filter(|line| line.starts_with("data: ")).count();
    assert!(got < sent, "the client was not slow enough to be disconnected");
    assert!(app.metric("postrider_comments_slow_streams_total").await >= Some(1.0));
    let resumed = Stream::open(&app, STREAM, &last_id).await;
    let rest = events(&resumed, sent - got).await;
    assert!(rest.texts()[0].starts_with(&format!("{got} ")), "{:.30}", rest.texts()[0]);
    app.stop().await;
}
