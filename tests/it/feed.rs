//! Feeds as clients read them.

use serde_json::{Value, json};

use crate::{
    feed_writes::{delete, follow, post, unfollow},
    harness::{App, World, until, wait::seconds},
};

/// Reads a page: its post ids, whether Redis served it, and its body. `None` while it cannot be
/// read.
pub async fn page(app: &App, user: &str, query: &str) -> Option<(Vec<i64>, bool, Value)> {
    let answer = app.get(&format!("/feeds/{user}?{query}")).await;
    if answer.status == 503 {
        return None;
    }
    let answer = answer.expect(200);
    let hit = answer.header("x-cache") == "HIT";
    let body = answer.json();
    assert_eq!(body["user_id"], user);
    let ids = body["post_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
    Some((ids, hit, body))
}

pub async fn ids(app: &App, user: &str, query: &str) -> Vec<i64> {
    page(app, user, query).await.map(|(ids, ..)| ids).unwrap_or_default()
}

/// Reads a whole feed by its cursors.
pub async fn all(app: &App, user: &str, limit: usize) -> Vec<i64> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let (ids, _, body) = page(app, user, &format!("limit={limit}{cursor}")).await.expect("readable");
        found.extend(ids);
        match body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return found,
        }
    }
}

/// Waits until the first page has exactly the posts in `expected`.
pub async fn shows(app: &App, user: &str, expected: &[i64]) {
    until(&format!("{user} sees {expected:?}"), seconds(20), || async {
        (ids(app, user, "limit=100").await == expected).then_some(())
    })
    .await;
}

/// Waits until Redis serves the first page, and returns its post ids.
pub async fn cached(app: &App, user: &str) -> Vec<i64> {
    cached_page(app, user, 20).await
}

/// Waits until Redis serves a first page of this size, and returns its post ids.
pub async fn cached_page(app: &App, user: &str, limit: usize) -> Vec<i64> {
    // Longer than a timeline is distrusted after an unfollow whose job a crashed process had
    // claimed.
    until(&format!("{user}'s feed is in Redis"), seconds(120), || async {
        page(app, user, &format!("limit={limit}")).await.filter(|(_, hit, _)| *hit).map(|(ids, ..)| ids)
    })
    .await
}

#[tokio::test]
async fn a_timeline_with_many_deleted_posts_is_rebuilt() {
    let world = World::new().await.with_postgres().await;
    let small = [("TIMELINE_IDS", "6"), ("CELEBRITY_FOLLOWERS", "2")];
    let app =
        small.into_iter().fold(world.app(), |app, (name, value)| app.env(&format!("POSTRIDER_FEED__{name}"), value));
    let app = app.start().await;
    for (follower, followee) in [("bob", "ann"), ("bob", "star"), ("dan", "star")] {
        follow(&app, follower, followee).await;
    }
    for author in ["ann", "star"] {
        let mut posts = Vec::new();
        for number in 0..20 {
            posts.insert(0, post(&app, author, &number.to_string()).await);
        }
        until("bob sees the newest", seconds(20), || async {
            (ids(&app, "bob", "limit=4").await == posts[..4]).then_some(())
        })
        .await;
        assert_eq!(cached_page(&app, "bob", 4).await, posts[..4]);
        for id in posts.drain(..4) {
            delete(&app, &format!("/posts/{id}")).await.expect(200);
        }
        assert_eq!(cached_page(&app, "bob", 4).await, posts[..4]);
    }
    app.stop().await;
}

#[tokio::test]
async fn the_near_cache_follows_every_change() {
    let world = World::new().await.with_postgres().await;
    let (app, other) = (world.app().start().await, world.app().role("api").start().await);
    let from_memory = async || app.metric(r#"postrider_feed_timeline_reads_total{from="memory"}"#).await.unwrap_or(0.0);
    follow(&app, "bob", "ann").await;
    let mut expected = vec![post(&app, "ann", "first").await];
    shows(&app, "bob", &expected).await;
    for round in 0..12 {
        let before = from_memory().await;
        until("the near cache serves the page", seconds(20), || async {
            assert_eq!(ids(&app, "bob", "limit=50").await, expected);
            (from_memory().await > before).then_some(())
        })
        .await;
        if round % 3 == 2 {
            // As soon as another process has confirmed the deletion, this process must not show the
            // post.
            let deleted = expected.remove(round % expected.len());
            delete(&other, &format!("/posts/{deleted}")).await.expect(200);
        } else {
            expected.insert(0, post(&other, "ann", "more").await);
            shows(&app, "bob", &expected).await;
        }
        assert_eq!(ids(&app, "bob", "limit=50").await, expected);
    }
    unfollow(&other, "bob", "ann").await;
    assert_eq!(ids(&app, "bob", "limit=50").await, [0_i64; 0]);
    app.stop().await;
    other.stop().await;
}

/// The purge of a deleted post skips users who do not follow its author at that moment, and the job
/// of an unfollow may run only after the user follows again.
#[tokio::test]
async fn a_post_deleted_between_an_unfollow_and_the_next_follow_leaves_no_row() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let (kept, deleted) = (post(&app, "ann", "kept").await, post(&app, "ann", "deleted").await);
    shows(&app, "bob", &[deleted, kept]).await;
    world
        .sql(
            "DELETE FROM follows;
             INSERT INTO feed_jobs (kind, author_id, user_id, until) VALUES ('unfollow', 'ann', 'bob', 'infinity')",
        )
        .await;
    delete(&app, &format!("/posts/{deleted}")).await.expect(200);
    let done = async |kind: &str| {
        let name = format!(r#"postrider_feed_jobs_done_total{{kind="{kind}"}}"#);
        until(&format!("the {kind} job is done"), seconds(20), || async {
            app.metric(&name).await.filter(|&count| count == 1.0)
        })
        .await;
    };
    done("purge").await;
    assert_eq!(world.count("feed_rows").await, 2, "the purge saw a follower");
    follow(&app, "bob", "ann").await;
    world.sql("UPDATE feed_jobs SET until = '-infinity'").await;
    done("unfollow").await;
    assert_eq!(world.number("SELECT sum(post_id)::bigint FROM feed_rows").await, kept);
    app.stop().await;
}

#[tokio::test]
async fn two_users_follow_post_read_delete_and_unfollow() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let early = post(&app, "ann", "before anybody follows").await;
    follow(&app, "bob", "ann").await;
    shows(&app, "bob", &[early]).await;
    let second = post(&app, "ann", "two").await;
    let third = post(&app, "cid", "not followed").await;
    shows(&app, "bob", &[second, early]).await;
    follow(&app, "bob", "cid").await;
    shows(&app, "bob", &[third, second, early]).await;
    assert_eq!(cached(&app, "bob").await, [third, second, early]);
    let fourth = post(&app, "cid", "four").await;
    shows(&app, "bob", &[fourth, third, second, early]).await;
    assert_eq!(cached(&app, "bob").await, [fourth, third, second, early]);
    let (_, _, body) = page(&app, "bob", "limit=2&expand=posts").await.unwrap();
    assert_eq!(body["post_ids"], json!([fourth, third]));
    assert_eq!((&body["posts"][0]["content"], &body["posts"][1]["author_id"]), (&json!("four"), &json!("cid")));
    assert_eq!(ids(&app, "bob", "limit=2&offset=1").await, [third, second]);
    assert_eq!(ids(&app, "bob", "limit=0&offset=-1").await.len(), 4, "values out of range fall back to the defaults");
    assert_eq!(ids(&app, "bob", "limit=101").await.len(), 4);

    // Deletions and unfollows take effect at once, whatever Redis has.
    delete(&app, &format!("/posts/{third}")).await.expect(200);
    assert_eq!(ids(&app, "bob", "limit=20").await, [fourth, second, early]);
    unfollow(&app, "bob", "ann").await;
    assert_eq!(ids(&app, "bob", "limit=20").await, [fourth]);
    unfollow(&app, "bob", "cid").await;
    assert_eq!(ids(&app, "bob", "limit=20").await, [0_i64; 0]);
    follow(&app, "bob", "ann").await;
    shows(&app, "bob", &[second, early]).await;
    until("no surplus rows are left", seconds(20), || async {
        let rows = world.count("feed_rows").await;
        (rows == 2 && world.count("feed_jobs").await == 0).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn pages_do_not_shift_while_posts_arrive_and_continue_below_the_trim() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_FEED__TIMELINE_IDS", "20").start().await;
    follow(&app, "bob", "ann").await;
    let mut posts = Vec::new();
    for number in 0..50 {
        posts.push(post(&app, "ann", &format!("t{number}")).await);
    }
    posts.reverse();
    until("all posts are listed", seconds(20), || async { (all(&app, "bob", 100).await == posts).then_some(()) }).await;
    cached(&app, "bob").await;
    assert_eq!(all(&app, "bob", 7).await, posts);
    assert_eq!(ids(&app, "bob", "limit=10&offset=15").await, posts[15..25]);
    let (first, _, body) = page(&app, "bob", "limit=7").await.unwrap();
    let cursor = body["next_cursor"].as_str().unwrap().to_owned();
    let newer = post(&app, "ann", "newer").await;
    until("the new post comes first", seconds(10), || async {
        (ids(&app, "bob", "limit=1").await == [newer]).then_some(())
    })
    .await;
    let (next, ..) = page(&app, "bob", &format!("limit=7&cursor={cursor}")).await.unwrap();
    assert_eq!([first, next].concat(), posts[..14]);
    for number in 0..30 {
        posts.insert(0, post(&app, "ann", &format!("more {number}")).await);
    }
    posts.insert(30, newer);
    until("all posts are listed again", seconds(20), || async { (all(&app, "bob", 9).await == posts).then_some(()) })
        .await;
    app.stop().await;
}

#[tokio::test]
async fn crossing_the_celebrity_threshold_in_either_direction_loses_and_repeats_no_post() {
    let world = World::new().await.with_postgres().await;
    let app = world
        .app()
        .env("POSTRIDER_FEED__CELEBRITY_FOLLOWERS", "10")
        .env("POSTRIDER_FEED__CHUNK_ROWS", "3")
        .start()
        .await;
    let state = |wanted: i64| {
        let world = &world;
        async move {
            until(&format!("the state is {wanted}"), seconds(20), || async {
                let found = world
                    .number("SELECT coalesce(max(state), 0)::bigint FROM feed_authors WHERE author_id = 'star'")
                    .await;
                (found == wanted && world.count("feed_jobs").await == 0).then_some(())
            })
            .await;
        }
    };
    let mut posts = Vec::new();
    for number in 0..9 {
        follow(&app, &format!("fan{number}"), "star").await;
        posts.insert(0, post(&app, "star", "small").await);
    }
    shows(&app, "fan0", &posts).await;
    cached(&app, "fan0").await;
    follow(&app, "fan9", "star").await;
    state(2).await;
    for _ in 0..3 {
        posts.insert(0, post(&app, "star", "great").await);
    }
    for number in 0..10 {
        shows(&app, &format!("fan{number}"), &posts).await;
    }
    assert_eq!(cached(&app, "fan9").await, posts);
    assert!(
        world.number("SELECT count(*) FROM feed_rows").await <= 9 * 9 + 9,
        "posts of celebrities are not fanned out"
    );
    for number in 8..10 {
        unfollow(&app, &format!("fan{number}"), "star").await;
        assert_eq!(ids(&app, &format!("fan{number}"), "limit=20").await, [0_i64; 0]);
    }
    state(0).await;
    posts.insert(0, post(&app, "star", "small again").await);
    for number in 0..8 {
        shows(&app, &format!("fan{number}"), &posts).await;
    }
    until("each post has its rows", seconds(10), || async {
        (world.count("feed_rows").await == 8 * posts.len() as i64).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn without_redis_feeds_are_read_from_postgres_and_timelines_are_rebuilt_afterwards() {
    let stack = crate::harness::Stack::own("feed-redis", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let first = post(&app, "ann", "1").await;
    shows(&app, "bob", &[first]).await;
    cached(&app, "bob").await;
    stack.ctl(&["pause", "redis"]).await;
    let second = post(&app, "ann", "2").await;
    until("the feed is read without Redis", seconds(20), || async {
        (ids(&app, "bob", "limit=20").await == [second, first]).then_some(())
    })
    .await;
    stack.ctl(&["resume", "redis"]).await;
    until("Redis has both posts", seconds(20), || async {
        (cached(&app, "bob").await == [second, first]).then_some(())
    })
    .await;
    stack.ctl(&["kill", "redis"]).await;
    let third = post(&app, "ann", "3").await;
    until("the feed is read without Redis", seconds(20), || async {
        (ids(&app, "bob", "limit=20").await == [third, second, first]).then_some(())
    })
    .await;
    stack.ctl(&["start", "redis"]).await;
    assert_eq!(cached(&app, "bob").await, [third, second, first]);
    app.stop().await;
}

#[tokio::test]
async fn an_erased_account_leaves_no_data_and_may_be_used_again() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_FEED__CHUNK_ROWS", "2").start().await;
    for (follower, followee) in [("ann", "cid"), ("ann", "bob"), ("bob", "ann"), ("cid", "ann"), ("bob", "cid")] {
        follow(&app, follower, followee).await;
    }
    let mut kept = Vec::new();
    for number in 0..5 {
        post(&app, "ann", &format!("a{number}")).await;
        kept.insert(0, post(&app, "cid", &format!("c{number}")).await);
    }
    until("bob sees the posts of both authors", seconds(20), || async {
        (ids(&app, "bob", "limit=20").await.len() == 10).then_some(())
    })
    .await;
    cached(&app, "bob").await;
    delete(&app, "/users/ann").await.expect(202);
    assert_eq!(ids(&app, "bob", "limit=20").await, kept, "the erasure takes effect at once");
    assert_eq!(ids(&app, "ann", "limit=20").await, [0_i64; 0]);
    until("all data of the account is deleted", seconds(20), || async {
        let left = world.number("SELECT (SELECT count(*) FROM posts WHERE author_id = 'ann') + (SELECT count(*) FROM follows WHERE 'ann' IN (follower_id, followee_id)) + (SELECT count(*) FROM feed_erasures) + (SELECT count(*) FROM feed_rows WHERE user_id = 'ann')").await;
        (left == 0).then_some(())
    })
    .await;
    assert_eq!(world.count("feed_rows").await, 5, "only bob's rows of cid's posts are left");
    assert_eq!(ids(&app, "bob", "limit=20").await, kept);
    follow(&app, "bob", "ann").await;
    let back = post(&app, "ann", "again").await;
    kept.insert(0, back);
    shows(&app, "bob", &kept).await;
    app.stop().await;
}

#[tokio::test]
async fn invalid_events_are_dead_lettered_and_duplicates_change_nothing() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    follow(&app, "bob", "ann").await;
    let id = post(&app, "ann", "1").await;
    shows(&app, "bob", &[id]).await;
    let topic = world.topic("post-events");
    let log = world.kafka.read(&topic).await;
    for record in log.iter().chain(&log) {
        world.kafka.write_in(&topic, record.partition, &[record.value.clone().unwrap()]).await;
    }
    world.kafka.write(&topic, &[Some(b"nonsense".to_vec()), None], &[]).await;
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), 2).await;
    assert_eq!(letters.len(), 2);
    for letter in &letters {
        assert_eq!(letter.header("original-topic"), Some(topic.as_str()));
        assert!(letter.header("error").is_some() && letter.header("failed-at").is_some());
    }
    let second = post(&app, "ann", "2").await;
    shows(&app, "bob", &[second, id]).await;
    assert_eq!(world.number("SELECT followers FROM feed_authors WHERE author_id = 'ann'").await, 1);
    assert_eq!(world.count("feed_rows").await, 2);
    app.stop().await;
}
