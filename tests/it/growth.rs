//! Stores that grow with client writes are bounded, and a write over a bound is rejected before
//! anything is stored.

use serde_json::{Value, json};

use crate::{
    feed::{cached, shows},
    feed_writes::{delete, follow, post},
    harness::{Answer, App, Stack, World, inbox::message, redis, socket::Socket, until, wait::seconds},
    kv::{await_complete, pull_after, push, running},
    messages::{PATH, send, stored},
    presence::{await_connections, quick, settled},
};

/// Waits until a bound's metric exists, and returns its value.
async fn bound(app: &App, metric: &str, bound: &str) -> f64 {
    let name = format!(r#"{metric}{{bound="{bound}"}}"#);
    until(&format!("{name} exists"), seconds(20), || app.metric(&name)).await
}

async fn await_used(app: &App, name: &str, is: impl Fn(f64) -> bool) {
    until(&format!("{name} is as expected"), seconds(30), || async {
        is(bound(app, "postrider_bound_used", name).await).then_some(())
    })
    .await;
}

async fn try_post(app: &App, author: &str, content: &str) -> Answer {
    app.post_json("/posts", &json!({"author_id": author, "content": content})).await
}

/// Asserts that a write is rejected with 503, this code, and a `retry-after` header.
fn assert_rejected(answer: Answer, code: &str) {
    let after = answer.header("retry-after");
    assert!(after.parse::<u32>().is_ok_and(|after| after >= 1), "{after:?}");
    answer.problem(503, code);
}

#[tokio::test]
async fn while_kafka_is_down_the_outbox_fills_up_to_its_bound_and_accepts_writes_again_once_drained() {
    let stack = Stack::own("full-outbox", &["--only", "kafka"]).await;
    let mut world = World::on(&stack).await.with_postgres().await;
    world.set("POSTRIDER_OUTBOX__MAX_ROWS", "30");
    let app = world.app().start().await;
    let first = post(&app, "ann", "before").await;
    stack.ctl(&["kill", "kafka"]).await;
    app.await_failing("kafka", seconds(20)).await;
    // Rows stored since the last measurement may count twice until the next one.
    let full = until("a post is rejected and the outbox is full", seconds(60), || async {
        let answer = try_post(&app, "ann", "x").await;
        (answer.status != 202 && world.count("outbox").await == 30).then_some(answer)
    });
    assert_rejected(full.await, "outbox_full");
    let (stored, waiting) = (world.count("posts").await, world.count("outbox").await);
    assert!(waiting == 30 && stored >= waiting, "{stored} posts, {waiting} rows");
    await_used(&app, "outbox_rows", |rows| rows == waiting as f64).await;
    assert!(bound(&app, "postrider_bound_used", "outbox_bytes").await > 30.0 * 256.0);
    assert_eq!(bound(&app, "postrider_bound_limit", "outbox_rows").await, 30.0);
    for (path, body) in [
        ("/posts", json!({"author_id": "late", "content": "x"})),
        ("/follow", json!({"follower_id": "late", "followee_id": "ann"})),
        ("/unfollow", json!({"follower_id": "late", "followee_id": "ann"})),
    ] {
        assert_rejected(app.post_json(path, &body).await, "outbox_full");
    }
    assert_rejected(delete(&app, &format!("/posts/{first}")).await, "outbox_full");
    assert_rejected(delete(&app, "/users/ann").await, "outbox_full");
    assert_eq!(world.count("posts").await, stored, "no rejected write is stored");
    assert_eq!(world.count("follows").await + world.count("feed_erasures").await, 0);
    assert!(bound(&app, "postrider_bound_refused_total", "outbox_rows").await >= 6.0);
    stack.ctl(&["start", "kafka"]).await;
    until("writes are accepted again", seconds(60), || async {
        (try_post(&app, "ann", "after").await.status == 202).then_some(())
    })
    .await;
    await_used(&app, "outbox_rows", |rows| rows < 30.0).await;
    let posts = world.count("posts").await as usize;
    until("everything is in Kafka", seconds(60), || async {
        (world.kafka.read(&world.topic("post-events")).await.len() >= posts).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn the_outbox_is_bounded_in_bytes_and_the_events_of_one_author_cannot_fill_its_quarantine() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_OUTBOX__MAX_BYTES", "400000");
    world.set("POSTRIDER_OUTBOX__MAX_QUARANTINED_ROWS_PER_KEY", "3");
    let app = world.app().role("api").start().await;
    world
        .sql(
            "INSERT INTO outbox_quarantine (id, topic, key, event_id, kind, source, value, created_at)
             SELECT -n, 'post-events', CASE WHEN n < 4 THEN 'bad' ELSE 'poor' END, gen_random_uuid(), 'k', 's', '{}', now()
             FROM generate_series(1, 5) AS n",
        )
        .await;
    until("the author with a full quarantine is rejected", seconds(20), || async {
        let answer = try_post(&app, "bad", "x").await;
        (answer.status == 503).then(|| assert_rejected(answer, "outbox_full"))
    })
    .await;
    for author in ["poor", "good"] {
        post(&app, author, "x").await;
    }
    // No relay drains the outbox.
    let content = "x".repeat(10_000);
    until("the outbox is full", seconds(20), || async {
        let answer = try_post(&app, "good", &content).await;
        (answer.status == 503).then(|| assert_rejected(answer, "outbox_full"))
    })
    .await;
    let waiting = world.number("SELECT sum(octet_length(value))::bigint FROM outbox").await;
    assert!(waiting <= 400_000, "{waiting} bytes");
    app.stop().await;
}

async fn push_with(app: &App, idempotency_key: &str, key: &str, value: u32) -> Answer {
    app.post_with("/push", &[("idempotency-key", idempotency_key)], &json!({"key": key, "value": value})).await
}

/// Returns the keys of this world in Redis that match a pattern.
async fn keys(world: &World, pattern: &str) -> Vec<String> {
    redis::run(&world.redis_url, &["KEYS", &format!("{}:{pattern}", world.prefix)]).await
}

async fn ttl_s(world: &World, key: &str) -> i64 {
    redis::run(&world.redis_url, &["TTL", key]).await
}

#[tokio::test]
async fn idempotency_keys_are_remembered_up_to_a_bound_and_none_is_evicted() {
    let mut world = World::new().await;
    world.set("POSTRIDER_KV__MAX_IDEMPOTENCY_IDS", "6");
    let app = running(&world).await;
    for number in 0..6 {
        // A write may count twice until the next measurement.
        until("a write below the bound is accepted", seconds(20), || async {
            let answer = push_with(&app, &format!("i{number}"), &format!("k{number}"), number).await;
            (answer.status == 202).then_some(())
        })
        .await;
    }
    assert_rejected(push_with(&app, "i6", "k6", 6).await, "too_many_idempotency_keys");
    await_used(&app, "idempotency_ids", |ids| ids == 6.0).await;
    assert_eq!(keys(&world, "kv:*:id:*").await.len(), 6);
    // Writes without an idempotency key, and retries with a remembered one, are accepted.
    push(&app, "k0", &json!("newer")).await;
    let retried = push_with(&app, "i0", "k0", 0).await.expect(202);
    let position = retried.header("postrider-position").to_owned();
    let found = pull_after(&app, "k0", &position).await.expect(200).json();
    assert_eq!(found["value"], "newer", "the retry must change nothing");
    assert_rejected(push_with(&app, "other", "k0", 0).await, "too_many_idempotency_keys");
    assert_eq!(pull_after(&app, "k6", &position).await.status, 404, "no rejected write is stored");
    assert_eq!(bound(&app, "postrider_bound_limit", "idempotency_ids").await, 6.0);
    // Keys that expire make room.
    for key in keys(&world, "kv:*:id*").await {
        redis::run::<u64>(&world.redis_url, &["DEL", &key]).await;
    }
    until("a write is accepted again", seconds(30), || async {
        (push_with(&app, "later", "k6", 6).await.status == 202).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn a_redis_out_of_memory_loses_nothing_and_is_reported_until_it_has_more() {
    let stack = Stack::own("no-memory", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let processor = world.app().role("processor").start().await;
    let relay = world.app().role("relay").start().await;
    await_complete(&api).await;
    follow(&api, "bob", "ann").await;
    let first = post(&api, "ann", "1").await;
    shows(&api, "bob", &[first]).await;
    assert_eq!(cached(&api, "bob").await, [first]);
    let position = push(&api, "a", &json!(1)).await;
    assert_eq!(pull_after(&api, "a", &position).await.json()["value"], 1);
    redis::run::<()>(&world.redis_url, &["CONFIG", "SET", "maxmemory", "1"]).await;
    let mut positions = Vec::new();
    for number in 0..20 {
        let key = format!("b{number}");
        positions.push((push(&api, &key, &json!(number)).await, key));
    }
    push_with(&api, "once", "a", 2).await.expect(202);
    let detail = processor.await_failing("redis memory", seconds(30)).await;
    assert!(detail.contains("out of memory"), "{detail}");
    until("the writes that Redis rejects are counted", seconds(30), || async {
        processor.metric("postrider_redis_out_of_memory_total").await.filter(|&count| count > 0.0)
    })
    .await;
    until("the API process reports a warning", seconds(30), || async {
        let report: Value = api.manage("/readyz?verbose").await.json();
        (report["checks"]["redis memory"]["status"] == "warning").then_some(())
    })
    .await;
    assert!(api.is_ready().await);
    assert_eq!(api.get("/pull/a").await.expect(200).json()["value"], 1, "the view is unchanged");
    assert_eq!(api.get("/pull/b0").await.status, 404);
    let second = post(&api, "ann", "2").await;
    shows(&api, "bob", &[second, first]).await;
    delete(&api, &format!("/posts/{first}")).await.expect(200);
    shows(&api, "bob", &[second]).await;
    redis::run::<()>(&world.redis_url, &["CONFIG", "SET", "maxmemory", "0"]).await;
    for (number, (position, key)) in positions.iter().enumerate() {
        assert_eq!(pull_after(&api, key, position).await.expect(200).json()["value"], number);
    }
    let again = push_with(&api, "once", "a", 2).await.expect(202).header("postrider-position").to_owned();
    assert_eq!(pull_after(&api, "a", &again).await.expect(200).json()["value"], 2);
    cached(&api, "bob").await;
    shows(&api, "bob", &[second]).await;
    processor.await_ready(seconds(30)).await;
    relay.stop().await;
    processor.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn reading_creates_no_receiver_and_new_receivers_over_the_bound_are_rejected() {
    let mut world = quick().await;
    world.set("POSTRIDER_MESSAGES__MAX_RECEIVERS", "3");
    let app = world.app().start().await;
    let mut sockets = Vec::new();
    for number in 0..20 {
        let name = format!("asking{number}");
        sockets.push(Socket::cursors(&app.api, &name, "").await);
        for path in ["messages", "messages/unread"] {
            app.get(&format!("/api/v1/{path}?receiverId={name}")).await;
        }
        app.get(&format!("/feeds/{name}")).await.expect(200);
    }
    for receiver in ["a", "b", "c"] {
        send(&app, &message(receiver, "s", 0)).await;
        stored(&app, receiver, 1).await;
    }
    assert_eq!(world.count("message_receivers").await, 3);
    assert_eq!(world.number("SELECT count(*) FROM message_cursors WHERE receiver_id LIKE 'asking%'").await, 0);
    for feed in keys(&world, "feed:*:u:asking*").await {
        assert!(ttl_s(&world, &feed).await <= 60, "an empty timeline expires soon");
    }
    await_used(&app, "receivers", |rows| rows == 3.0).await;
    assert_rejected(app.post_json(PATH, &message("d", "s", 0)).await, "too_many_receivers");
    send(&app, &message("a", "s", 1)).await;
    stored(&app, "a", 2).await;
    let log = world.kafka.read(&world.topic("message")).await;
    assert_eq!(log.len(), 4, "the rejected message is not in Kafka");
    world.sql("DELETE FROM message_receivers WHERE receiver_id = 'b'").await;
    until("a new receiver is accepted", seconds(30), || async {
        let answer = app.post_json(PATH, &message("d", "s", 0)).await;
        (answer.status == 200).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn disconnected_receivers_are_remembered_up_to_a_bound_and_the_others_for_a_minute() {
    let mut world = quick().await;
    // One receiver in each bucket.
    world.set("POSTRIDER_MESSAGES__PRESENCE__MAX_REMEMBERED", "16");
    let app = world.app().start().await;
    settled(&world).await;
    let names: Vec<String> = (0..60).map(|number| format!("p{number}")).collect();
    let mut sockets = Vec::new();
    for name in &names {
        sockets.push(Socket::cursors(&app.api, name, "").await);
    }
    for name in &names {
        await_connections(&app, name, 1).await;
    }
    drop(sockets);
    for name in &names {
        await_connections(&app, name, 0).await;
    }
    let mut remembered = Vec::new();
    for key in keys(&world, "presence:*:is:p*").await {
        let ttl = ttl_s(&world, &key).await;
        assert!(ttl > 0, "{key} never expires");
        if ttl > 60 {
            remembered.push(key.rsplit(':').next().unwrap().to_owned());
        }
    }
    assert!((8..=16).contains(&remembered.len()), "{} of 60 are remembered", remembered.len());
    let count = remembered.len() as f64;
    await_used(&app, "remembered_receivers", |used| used == count).await;
    assert_eq!(bound(&app, "postrider_bound_limit", "remembered_receivers").await, 16.0);
    let back = Socket::cursors(&app.api, &remembered[0], "").await;
    await_connections(&app, &remembered[0], 1).await;
    await_used(&app, "remembered_receivers", |used| used == count - 1.0).await;
    drop(back);
    app.stop().await;
}

#[tokio::test]
async fn tables_that_are_too_large_to_count_are_estimated_from_a_sample() {
    let world = World::new().await.with_postgres().await;
    // About 40 and 30 MiB; half of the rows are dead.
    world
        .sql(
            "INSERT INTO outbox (topic, key, event_id, kind, source, value)
             SELECT 'post-events', 'k' || n % 10, gen_random_uuid(), 'test', '/test', repeat('x', 400) FROM generate_series(1, 80000) AS n;
             DELETE FROM outbox WHERE id % 2 = 0;
             INSERT INTO message_receivers (receiver_id, topic_epoch, partition, last)
             SELECT 'receiver' || n, 0, 0, 1 FROM generate_series(1, 300000) AS n",
        )
        .await;
    let app = world.app().role("api").start().await;
    for (name, expected) in [("outbox_rows", 40_000.0), ("outbox_bytes", 40_000.0 * 658.0), ("receivers", 300_000.0)] {
        await_used(&app, name, |used| used > 0.0 && (used / expected - 1.0).abs() < 0.15).await;
    }
    app.stop().await;
}
