//! Feeds are trimmed to `feed.keep_rows`, and trimmed posts do not come back.

use serde_json::Value;

use crate::{
    feed::{all, cached_page, ids, shows},
    feed_writes::{follow, post, unfollow},
    harness::{App, World, stack::off_runtime, until, wait::seconds},
};

/// Runs `feed verify`, and returns its report.
async fn verified(world: &World, words: &[&str]) -> Value {
    let mut command = world.command();
    command.args(["feed", "verify", "--all", "--output", "json"]).args(words);
    serde_json::from_slice(&off_runtime(move || command.output().unwrap()).await.stdout).unwrap()
}

/// Waits until a feed is trimmed to the rows that are kept, and has this post or a newer one.
async fn trimmed(world: &World, user: &str, newest: i64) {
    until(&format!("the feed of {user} is trimmed"), seconds(30), || async {
        let of_user = |what: &str| format!("SELECT coalesce({what}, 0) FROM feed_rows WHERE user_id = '{user}'");
        let (top, rows) = (world.number(&of_user("max(post_id)")).await, world.number(&of_user("count(*)")).await);
        (top >= newest && (20..=22).contains(&rows) && world.count("feed_jobs").await == 0).then_some(())
    })
    .await;
}

async fn posts(app: &App, author: &str, count: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    for number in 0..count {
        ids.insert(0, post(app, author, &number.to_string()).await);
    }
    ids
}

#[tokio::test]
async fn feeds_are_trimmed_to_the_kept_rows_and_no_trimmed_post_comes_back() {
    let world = World::new().await.with_postgres().await;
    let settings = [("KEEP_ROWS", "20"), ("TIMELINE_IDS", "10"), ("TRIM_INTERVAL_MS", "100"), ("CHUNK_ROWS", "7")];
    let app = world.app().env("POSTRIDER_FEED__CELEBRITY_FOLLOWERS", "2");
    let app = settings.into_iter().fold(app, |app, (name, value)| app.env(&format!("POSTRIDER_FEED__{name}"), value));
    let app = app.start().await;
    let (early, old) = (posts(&app, "cid", 5).await, posts(&app, "star", 5).await);
    follow(&app, "bob", "ann").await;
    let expected = posts(&app, "ann", 60).await;
    trimmed(&world, "bob", expected[0]).await;
    let kept = all(&app, "bob", 7).await;
    assert!((20..=22).contains(&kept.len()) && expected.starts_with(&kept), "{kept:?}");
    assert_eq!(cached_page(&app, "bob", 8).await, expected[..8]);
    assert_eq!(ids(&app, "bob", "limit=20&offset=40").await, [0_i64; 0]);

    // Backfills and posts that are merged by reads stop at the floor, too.
    for (follower, followee) in [("bob", "cid"), ("dan", "star"), ("bob", "star")] {
        follow(&app, follower, followee).await;
    }
    let new = post(&app, "star", "new").await;
    let seen = [&[new], &kept[..]].concat();
    until("the new post is listed", seconds(20), || async {
        ids(&app, "bob", "limit=1").await.contains(&new).then_some(())
    })
    .await;
    trimmed(&world, "bob", expected[0]).await;
    // The oldest posts may have been trimmed to make room.
    let left = all(&app, "bob", 9).await;
    assert!(left.len() >= 20 && seen.starts_with(&left), "{left:?} should have neither {early:?} nor {old:?}");
    let dans: Vec<i64> = std::iter::once(new).chain(old).collect();
    shows(&app, "dan", &dans).await;

    let clean = |report: &Value| ["missing_rows", "surplus_rows", "wrong_timelines"].map(|what| report[what].clone());
    assert_eq!(clean(&verified(&world, &[]).await), [0, 0, 0]);
    world.sql(&format!("DELETE FROM feed_rows WHERE user_id = 'bob' AND post_id = {}", kept[0])).await;
    assert_eq!(verified(&world, &["--repair"]).await["missing_rows"], 1);
    let repaired = all(&app, "bob", 9).await;
    assert!(repaired.len() >= 20 && seen.starts_with(&repaired), "{repaired:?}");
    let trimmed_rows = app.metric("postrider_feed_trimmed_rows_total").await.unwrap_or_default();
    assert!(trimmed_rows >= 38.0, "{trimmed_rows} rows were trimmed");

    // Less than a page is left above the floor, and nothing below it: Redis can hold the whole
    // feed.
    unfollow(&app, "bob", "ann").await;
    assert_eq!(cached_page(&app, "bob", 8).await, [new]);
    app.stop().await;
}
