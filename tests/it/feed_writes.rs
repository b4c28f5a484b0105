//! Posts and follows as clients write them, and the events that they publish.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{App, World, kafka::Stored};

pub async fn post(app: &App, author: &str, content: &str) -> i64 {
    let answer = app.post_json("/posts", &json!({"author_id": author, "content": content})).await.expect(202);
    let body = answer.json();
    assert_eq!(body["message"], "Post created successfully");
    body["post_id"].as_i64().unwrap()
}

pub async fn follow(app: &App, follower: &str, followee: &str) {
    let answer = app.post_json("/follow", &json!({"follower_id": follower, "followee_id": followee})).await;
    assert_eq!(answer.expect(200).json(), json!({"message": "followed successfully"}));
}

pub async fn unfollow(app: &App, follower: &str, followee: &str) {
    app.post_json("/unfollow", &json!({"follower_id": follower, "followee_id": followee})).await.expect(200);
}

pub async fn delete(app: &App, path: &str) -> crate::harness::Answer {
    app.request(Method::DELETE, path, &[], "").await
}

/// Reads a whole list, page by page.
async fn list(app: &App, user: &str, side: &str, limit: usize) -> Vec<String> {
    let (mut users, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = app.get(&format!("/users/{user}/{side}?limit={limit}{cursor}")).await.expect(200).json();
        let found = page[side].as_array().unwrap();
        users.extend(found.iter().map(|user| user.as_str().unwrap().to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return users,
        }
    }
}

#[tokio::test]
async fn posts_and_follows_are_stored_and_their_events_reach_the_topic_in_order() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let first = post(&app, "ann", "It's \"1\"\n🎉").await;
    let second = post(&app, "ann", "2").await;
    assert!(first > 0 && second > first && second < 1 << 53);
    follow(&app, "bob", "ann").await;
    follow(&app, "bob", "ann").await;
    follow(&app, "cid", "ann").await;
    follow(&app, "bob", "eve").await;
    unfollow(&app, "bob", "eve").await;
    unfollow(&app, "bob", "eve").await;
    let shown = app.get(&format!("/posts/{first}")).await.expect(200).json();
    assert_eq!((&shown["author_id"], &shown["content"]), (&json!("ann"), &json!("It's \"1\"\n🎉")));
    assert_eq!(list(&app, "ann", "followers", 1).await, ["bob", "cid"]);
    assert_eq!(list(&app, "bob", "following", 20).await, ["ann"]);
    delete(&app, &format!("/posts/{second}")).await.expect(200);
    delete(&app, &format!("/posts/{second}")).await.problem(404, "post_not_found");
    app.get(&format!("/posts/{second}")).await.problem(404, "post_not_found");

    let log = world.kafka.read_at_least(&world.topic("post-events"), 7).await;
    assert_eq!(log.len(), 7, "a request that changes nothing publishes nothing: {log:?}");
    let of = |key: &str| log.iter().filter(|record| record.key() == key).collect::<Vec<_>>();
    let kinds =
        |key: &str| of(key).iter().map(|record| record.json()["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(kinds("ann"), ["POST_CREATED", "POST_CREATED", "USER_FOLLOWED", "USER_FOLLOWED", "POST_DELETED"]);
    assert_eq!(kinds("eve"), ["USER_FOLLOWED", "USER_UNFOLLOWED"]);
    let record = of("ann")[0];
    let value = record.json();
    assert_eq!(value["actor_id"], "ann");
    assert_eq!(value["payload"], json!({"post_id": first, "content": "It's \"1\"\n🎉"}));
    assert_eq!(record.header("ce_type"), Some("postrider.post.created"));
    assert_eq!(of("ann")[2].json()["payload"], json!({"followee_id": "ann"}));
    assert_eq!(of("ann")[4].json()["payload"], json!({"post_id": second}));
    app.stop().await;
}

/// A record of `post-events` as an existing consumer parses it. It has no other fields.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Consumed {
    event_id: i64,
    r#type: String,
    actor_id: String,
    payload: Value,
    timestamp: i64,
}

#[tokio::test]
async fn existing_consumers_parse_every_event_and_its_number() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let id = post(&app, "a\"n", "hi").await;
    follow(&app, "bob", "a\"n").await;
    unfollow(&app, "bob", "a\"n").await;
    delete(&app, &format!("/posts/{id}")).await.expect(200);
    delete(&app, "/users/a%22n").await.expect(202);
    let log = world.kafka.read_at_least(&world.topic("post-events"), 5).await;
    let consumed: Vec<Consumed> = log.iter().map(|record| serde_json::from_str(record.text()).unwrap()).collect();
    let exactly = |(record, event): (&Stored, &Consumed)| {
        let Consumed { event_id, r#type, timestamp, payload, .. } = event;
        assert!(*event_id > 0 && *timestamp > 1_600_000_000, "{event:?}");
        assert!(uuid::Uuid::parse_str(record.header("ce_id").unwrap()).is_ok());
        let payload = if r#type == "POST_CREATED" {
            assert_eq!(payload, &json!({"post_id": id, "content": "hi"}));
            format!(r#"{{"post_id":{id},"content":"hi"}}"#)
        } else {
            payload.to_string()
        };
        format!(
            r#"{{"event_id":{event_id},"type":"{type}","actor_id":"{}","payload":{payload},"timestamp":{timestamp}}}"#,
            event.actor_id.replace('"', "\\\"")
        )
    };
    for pair in log.iter().zip(&consumed) {
        assert_eq!(pair.0.text(), exactly(pair));
    }
    let seen: Vec<_> = consumed.iter().map(|event| (event.r#type.as_str(), event.actor_id.as_str())).collect();
    let kinds = ["POST_CREATED", "USER_FOLLOWED", "USER_UNFOLLOWED", "POST_DELETED", "USER_ERASED"];
    assert_eq!(
        seen,
        kinds
            .iter()
            .zip(["a\"n", "bob", "bob", "a\"n", "a\"n"])
            .map(|(kind, actor)| (*kind, actor))
            .collect::<Vec<_>>()
    );
    let numbers: BTreeSet<i64> = consumed.iter().map(|event| event.event_id).collect();
    assert_eq!(numbers.len(), 5, "each event has its own number");
    app.stop().await;
}

#[tokio::test]
async fn concurrent_writes_share_commits_and_each_gets_its_own_answer() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let ids = join_all((0..200).map(|number| {
        let app = &app;
        async move { (post(app, &format!("a{}", number % 7), &format!("t{number}")).await, number) }
    }))
    .await;
    let ids: BTreeMap<i64, i32> = ids.into_iter().collect();
    assert_eq!(ids.len(), 200);
    for (&id, number) in ids.iter().step_by(20) {
        let shown = app.get(&format!("/posts/{id}")).await.expect(200).json();
        assert_eq!(shown["content"], format!("t{number}"));
    }
    let groups = app.metric("postrider_feed_group_rows_count").await.unwrap();
    assert!(groups < 150.0, "{groups} groups");
    let log = world.kafka.read_at_least(&world.topic("post-events"), 200).await;
    let published: BTreeSet<i64> =
        log.iter().map(|record| record.json()["payload"]["post_id"].as_i64().unwrap()).collect();
    assert_eq!(published, ids.keys().copied().collect());
    app.stop().await;
}

#[tokio::test]
async fn a_retry_with_the_same_idempotency_key_is_the_same_write() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let headers = [("idempotency-key", "k1")];
    let body = json!({"author_id": "ann", "content": "once"});
    let answers = join_all((0..20).map(|_| app.post_with("/posts", &headers, &body))).await;
    let ids: BTreeSet<i64> =
        answers.into_iter().map(|answer| answer.expect(202).json()["post_id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let pair = json!({"follower_id": "bob", "followee_id": "ann"});
    app.post_with("/follow", &headers, &pair).await.expect(200);
    unfollow(&app, "bob", "ann").await;
    app.post_with("/follow", &headers, &pair).await.expect(200);
    assert_eq!(list(&app, "ann", "followers", 20).await, Vec::<String>::new(), "the retry must not undo the unfollow");
    let id = ids.first().unwrap();
    for _ in 0..2 {
        app.request(Method::DELETE, &format!("/posts/{id}"), &headers, "").await.expect(200);
    }
    let log = world.kafka.read_at_least(&world.topic("post-events"), 4).await;
    assert_eq!(log.len(), 4, "{log:?}");
    app.stop().await;
}

#[tokio::test]
async fn invalid_requests_are_rejected() {
    let mut world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let long = "x".repeat(256);
    for (path, body, status, code) in [
        ("/posts", json!({}), 400, "invalid_request"),
        ("/posts", json!({"author_id": "", "content": "x"}), 400, "invalid_request"),
        ("/posts", json!({"author_id": "a", "content": ""}), 400, "invalid_request"),
        ("/posts", json!({"author_id": "a", "content": "\0"}), 400, "invalid_request"),
        ("/posts", json!({"author_id": 1, "content": "x"}), 400, "invalid_request"),
        ("/posts", json!({"author_id": long, "content": "x"}), 422, "invalid_field"),
        ("/posts", json!({"author_id": "a", "content": "x".repeat(20_000)}), 422, "invalid_field"),
        ("/follow", json!({"follower_id": "a", "followee_id": "a"}), 400, "invalid_request"),
        ("/follow", json!({"follower_id": "a"}), 400, "invalid_request"),
        ("/unfollow", json!({"follower_id": "a", "followee_id": "a"}), 400, "invalid_request"),
    ] {
        app.post_json(path, &body).await.problem(status, code);
    }
    app.get("/posts/x").await.problem(400, "invalid_request");
    app.get("/posts/0").await.problem(404, "post_not_found");
    app.get("/feeds/a?cursor=x").await.problem(400, "invalid_request");
    app.get("/feeds/a?offset=10001").await.problem(422, "invalid_field");
    app.get("/feeds/a?expand=all").await.problem(400, "invalid_request");
    app.get("/users/a/followers?cursor=!").await.problem(400, "invalid_request");
    app.stop().await;
    world.set("POSTRIDER_POSTGRES__URL", "");
    let app = world.app().start().await;
    app.post_json("/posts", &json!({"author_id": "a", "content": "x"})).await.problem(503, "postgres_unavailable");
    let problem: Value = app.get("/feeds/a").await.problem(503, "postgres_unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("postgres.url"));
    app.stop().await;
}
