//! Values in databases and topics that this version does not know, as a newer version may write
//! them during an upgrade: they have no effect, they are counted, and other work continues.

use serde_json::json;

use crate::{
    feed::{cached, ids, shows},
    feed_writes::{delete, follow, post},
    harness::{
        App, World,
        produce::{Write, keyed, produce},
        redis, until,
        wait::seconds,
    },
    kv::push,
    presence::{ask, quick, settled},
};

/// Waits until an unknown value of this kind is counted.
async fn counted(app: &App, what: &str) {
    let name = format!(r#"postrider_unknown_values_total{{what="{what}"}}"#);
    until(&format!("{what} is counted"), seconds(30), || async { app.metric(&name).await }).await;
}

async fn keys(world: &World, ending: &str) -> Vec<String> {
    redis::run(&world.redis_url, &["KEYS", &format!("{}:*{ending}", world.prefix)]).await
}

#[tokio::test]
async fn a_job_of_an_unknown_kind_is_not_touched_and_does_not_block_others() {
    let world = World::new().await.with_postgres().await;
    world.sql("ALTER TABLE feed_jobs DROP CONSTRAINT feed_jobs_kind_check").await;
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let id = post(&app, "ann", "1").await;
    shows(&app, "bob", &[id]).await;
    world
        .sql(
            "INSERT INTO feed_jobs (kind, author_id, user_id, post_id) VALUES ('merge', 'ann', 'bob', 1), ('', 'ann', NULL, NULL),
                 ('fan_out', 'ann', 'bob', NULL), ('purge', 'ann', NULL, NULL), ('unfollow', 'ann', NULL, 1)",
        )
        .await;
    until("all unknown jobs are counted", seconds(20), || async {
        app.metric("postrider_feed_jobs_unknown").await.filter(|&jobs| jobs == 5.0)
    })
    .await;
    // More jobs than a process claims at a time, behind the unknown ones.
    for number in 0..40 {
        follow(&app, &format!("f{number}"), "ann").await;
    }
    until("the known jobs are done", seconds(30), || async {
        (world.count("feed_jobs").await == 5 && world.count("feed_rows").await == 41).then_some(())
    })
    .await;
    let untouched = "SELECT count(*) FROM feed_jobs WHERE owner IS NULL AND until = '-infinity' AND after_user IS NULL";
    assert_eq!(world.number(untouched).await, 5, "an unknown job was claimed");
    assert_eq!(ids(&app, "bob", "limit=20").await, [id], "the author was erased");
    assert_eq!(world.number("SELECT followers FROM feed_authors").await, 41);
    assert!(app.is_ready().await);
    assert_eq!(app.metric("postrider_feed_jobs_waiting").await, Some(0.0));
    // An erasure waits for all jobs of the account, and ends once a newer version has done them.
    delete(&app, "/users/ann").await.expect(202);
    until("the posts are deleted", seconds(20), || async {
        (world.number("SELECT count(*) FROM posts WHERE deleted_at IS NULL").await == 0).then_some(())
    })
    .await;
    until("only the erasure waits", seconds(20), || async { (world.count("feed_jobs").await == 6).then_some(()) })
        .await;
    assert_eq!(world.count("feed_erasures").await, 1);
    world.sql("DELETE FROM feed_jobs WHERE kind <> 'erase'").await;
    until("the account is erased", seconds(30), || async {
        (world.count("feed_jobs").await == 0 && world.count("feed_erasures").await == 0).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn an_author_in_an_unknown_state_is_neither_fanned_out_nor_backfilled() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_FEED__PARTITIONS", "1");
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let first = post(&app, "ann", "1").await;
    shows(&app, "bob", &[first]).await;
    world.sql("UPDATE feed_authors SET state = 4 WHERE author_id = 'ann'").await;
    follow(&app, "cid", "ann").await;
    counted(&app, "state of an author").await;
    let second = post(&app, "ann", "2").await;
    until("the post's event is in the topic", seconds(20), || async {
        (world.kafka.read(&world.topic("post-events")).await.len() == 4).then_some(())
    })
    .await;
    assert_eq!(world.count("feed_rows").await, 1, "the post was fanned out");
    assert_eq!(
        world.number("SELECT count(*) FROM feed_jobs WHERE kind = 'backfill'").await,
        1,
        "the backfill does not wait"
    );
    world.sql("UPDATE feed_authors SET state = 0 WHERE author_id = 'ann'").await;
    shows(&app, "bob", &[second, first]).await;
    shows(&app, "cid", &[second, first]).await;
    until("both feeds have both rows", seconds(30), || async { (world.count("feed_rows").await == 4).then_some(()) })
        .await;
    app.stop().await;
}

#[tokio::test]
async fn an_unreadable_timeline_is_not_replaced_and_deleted_posts_are_not_shown() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let (kept, deleted) = (post(&app, "ann", "1").await, post(&app, "ann", "2").await);
    shows(&app, "bob", &[deleted, kept]).await;
    // The backfill of the follow drops the timeline before its job is gone.
    until("the backfill ends", seconds(30), || async { (world.count("feed_jobs").await == 0).then_some(()) }).await;
    cached(&app, "bob").await;
    let timelines = keys(&world, ":u:bob").await;
    let [key] = timelines.as_slice() else { panic!("{timelines:?}") };
    let score = (1_u64 << 53).to_string();
    // At once: a timeline without a mark counts as missing, and is built again.
    let swap = "redis.call('ZREM', KEYS[1], redis.call('ZREVRANGE', KEYS[1], 0, 0)[1])
        return redis.call('ZADD', KEYS[1], ARGV[1], 'x9[]')";
    assert_eq!(redis::run::<i64>(&world.redis_url, &["EVAL", swap, "1", key, &score]).await, 1);
    assert_eq!(ids(&app, "bob", "limit=20").await, [deleted, kept], "the feed was not read from Postgres");
    counted(&app, "mark of a timeline").await;
    delete(&app, &format!("/posts/{deleted}")).await.expect(200);
    until("the row is deleted", seconds(20), || async { (world.count("feed_rows").await == 1).then_some(()) }).await;
    assert_eq!(ids(&app, "bob", "limit=20").await, [kept]);
    let found: Vec<String> = redis::run(&world.redis_url, &["ZREVRANGE", key, "0", "-1"]).await;
    assert_eq!(found, ["x9[]".to_owned(), deleted.to_string(), kept.to_string()], "the timeline was changed");
    redis::run::<i64>(&world.redis_url, &["DEL", key]).await;
    until("the purge ends", seconds(30), || async { (world.count("feed_jobs").await == 0).then_some(()) }).await;
    app.stop().await;
}

#[tokio::test]
async fn a_receiver_in_an_unknown_state_is_neither_answered_nor_announced_nor_changed() {
    let world = quick().await;
    let app = world.app().start().await;
    settled(&world).await;
    let heads = keys(&world, ":head").await;
    let receiver = "nobody0";
    // Only one bucket is the receiver's own, so set its fields in all of them.
    let set = async |key: &str, field: &str, value: &str| {
        redis::run::<i64>(&world.redis_url, &["HSET", key, field, value]).await;
    };
    for head in &heads {
        let key = format!("{}is:{receiver}", head.trim_end_matches("head"));
        for (field, value) in [("state", "away"), ("version", "7"), ("since", "5"), ("seen", "3"), ("p:newer", "1")] {
            set(&key, field, value).await;
        }
    }
    app.get(&format!("/api/v1/presence/{receiver}")).await.problem(503, "redis_unavailable");
    counted(&app, "state of a receiver").await;
    let socket = crate::harness::socket::Socket::plain(&app.api, receiver).await;
    counted(&app, "change of a receiver").await;
    drop(socket);
    // An event with an unknown state, and a known one behind it.
    let due = format!("{}due", heads[0].trim_end_matches("head"));
    set(&due, &format!("7 {receiver}"), &format!("7 away 5 1 {receiver}")).await;
    set(&due, "8 known", "8 connected 5 1 known").await;
    let log = world.kafka.read_at_least(&world.topic("presence"), 1).await;
    assert!(log.iter().all(|record| record.json()["receiver_id"] == "known"), "{log:?}");
    counted(&app, "due event of presence").await;
    let left: Vec<String> = redis::run(&world.redis_url, &["HVALS", &due]).await;
    assert!(left.contains(&format!("7 away 5 1 {receiver}")), "the unknown event was removed: {left:?}");
    for head in &heads {
        let key = format!("{}is:{receiver}", head.trim_end_matches("head"));
        let fields: Vec<String> = redis::run(&world.redis_url, &["HGETALL", &key]).await;
        let pairs = fields.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone()));
        let wanted = [("p:newer", "1"), ("seen", "3"), ("since", "5"), ("state", "away"), ("version", "7")];
        let found: std::collections::BTreeMap<_, _> = pairs.collect();
        assert_eq!(found, wanted.map(|(field, value)| (field.to_owned(), value.to_owned())).into());
    }
    assert_eq!(ask(&app, "nobody1").await["state"], "disconnected", "another receiver has the wrong state");
    app.stop().await;
}

#[tokio::test]
async fn an_unreadable_entry_or_marker_of_the_view_is_neither_absent_nor_overwritten() {
    let mut world = World::new().await;
    world.set("POSTRIDER_KV__PARTITIONS", "1");
    let app = crate::kv::running(&world).await;
    let position = push(&app, "k", &json!("v")).await;
    crate::kv::pull_after(&app, "k", &position).await.expect(200);
    let views = keys(&world, ":view").await;
    let [view] = views.as_slice() else { panic!("{views:?}") };
    let ends = view.replace(":view", ":ends");
    redis::run::<i64>(&world.redis_url, &["HSET", view, "odd", "x7:1"]).await;
    redis::run::<i64>(&world.redis_url, &["ZADD", &ends, "1", "odd"]).await;
    app.get("/pull/odd").await.problem(503, "rebuilding");
    counted(&app, "entry of the view").await;
    app.get("/pull/none").await.problem(404, "key_not_found");
    until("the expiry of the entry is rescheduled", seconds(60), || async {
        let score: Option<f64> = redis::run(&world.redis_url, &["ZSCORE", &ends, "odd"]).await;
        assert!(score.is_some(), "the expiry of the entry was removed");
        score.filter(|&score| score > 1.0)
    })
    .await;
    app.stop().await;
    redis::run::<i64>(&world.redis_url, &["HSET", view, "", "M:1:2:3"]).await;
    let app = world.app().even_if_not_ready().start().await;
    counted(&app, "marker of the view").await;
    app.get("/pull/k").await.problem(503, "redis_unavailable");
    let fields: Vec<String> = redis::run(&world.redis_url, &["HKEYS", view]).await;
    assert!(fields.contains(&"k".to_owned()) && fields.contains(&"odd".to_owned()), "the view was not dropped");
    let marker: String = redis::run(&world.redis_url, &["HGET", view, ""]).await;
    assert_eq!(marker, "M:1:2:3");
    app.stop().await;
}

#[tokio::test]
async fn records_whose_postrider_headers_are_not_numbers_are_dead_lettered() {
    let mut world = World::new().await;
    world.set("POSTRIDER_KV__PARTITIONS", "1");
    let app = crate::kv::running(&world).await;
    let with = |name: &'static str| Write { headers: vec![(name, "soon".to_owned())], ..keyed("k", "\"odd\"") };
    let records = vec![with("postrider-expires-at"), with("postrider-version")];
    produce(&world.kafka.brokers, &world.topic("messages"), records).await;
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), 2).await;
    assert!(letters.iter().all(|letter| letter.header("error-class") == Some("bad_header")), "{letters:?}");
    app.get("/pull/k").await.problem(404, "key_not_found");
    app.stop().await;
}
