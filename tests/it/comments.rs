//! Comments: posting them as JSON and as a form, validation, and the list.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{Answer, App, World, until, wait::seconds};

pub const PATH: &str = "/api/v1/comments";
const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");

/// Posts a comment with this text on a post.
pub async fn comment(app: &App, post_id: &str, text: &str) {
    app.post_json(PATH, &json!({"text": text, "post_id": post_id})).await.expect(200);
}

pub async fn raw(app: &App, headers: &[(&str, &str)], body: &str) -> Answer {
    app.request(reqwest::Method::POST, PATH, headers, body.to_owned()).await
}

/// Returns all listed comments, newest first, read page by page; `None` while Postgres is
/// unavailable.
pub async fn all(app: &App, limit: usize, query: &str) -> Option<Vec<Value>> {
    let (mut comments, mut cursor) = (Vec::new(), String::new());
    loop {
        let answer = app.get(&format!("{PATH}?limit={limit}{cursor}{query}")).await;
        if answer.status == 503 {
            answer.problem(503, "postgres_unavailable");
            return None;
        }
        let page = answer.expect(200).json();
        let found = page["comments"].as_array().unwrap();
        assert!(found.len() <= limit);
        comments.extend(found.iter().cloned());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Some(comments),
        }
    }
}

/// Waits until `count` comments are listed, and returns them. Panics if there are more.
pub async fn listed(app: &App, count: usize) -> Vec<Value> {
    let comments = until(&format!("{count} comments are listed"), seconds(40), || async {
        all(app, 100, "").await.filter(|comments| comments.len() >= count)
    })
    .await;
    assert_eq!(comments.len(), count, "{comments:?}");
    comments
}

/// Counts the occurrences of each text.
pub fn counts<'a>(texts: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    texts.into_iter().for_each(|text| *counts.entry(text.to_owned()).or_default() += 1);
    counts
}

pub fn texts(comments: &[Value]) -> Vec<&str> {
    comments.iter().map(|comment| comment["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_comment_is_answered_stored_listed_and_logged() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let plain = r#"{"success":true,"message":"Comment pushed successfully","comment":{"text":"nice"}}"#;
    for (headers, body) in [
        (&[("content-type", "application/json; charset=utf-8")][..], r#"{ "text": "nice", "mood": 1 }"#),
        (&[FORM], "text=nice"),
        // As `curl -d '{…}'` sends it, and without a content type.
        (&[FORM], "\n{\"text\":\"nice\"}"),
        (&[], r#"{"text":"nice"}"#),
    ] {
        let answer = raw(&app, headers, body).await.expect(200);
        assert_eq!((answer.text().as_str(), answer.header("content-type")), (plain, "application/json"), "{body}");
    }
    let given = json!({"text": " So \"nice\"\n🎉 ", "author_id": "a", "post_id": 9_007_199_254_740_991_u64});
    let answer = app.post_json(PATH, &given).await.expect(200).json();
    assert_eq!(answer["comment"], given);
    let answer = raw(&app, &[FORM], "text=bye&author_id=b").await.expect(200).json();
    assert_eq!(answer["comment"], json!({"text": "bye", "author_id": "b"}));

    let comments = listed(&app, 6).await;
    assert_eq!(comments[0]["text"], "bye");
    assert_eq!((&comments[1]["text"], &comments[1]["post_id"]), (&given["text"], &json!("9007199254740991")));
    let log = world.kafka.read(&world.topic("comments")).await;
    assert_eq!(log.len(), 6);
    let record = log.iter().find(|record| record.key() == "9007199254740991").unwrap();
    assert_eq!((record.json(), record.header("ce_type")), (given, Some("postrider.comment.pushed")));
    assert_eq!(comments[1]["id"].as_str(), record.header("ce_id"));
    assert_eq!(log.iter().filter(|record| record.key.is_none()).count(), 4);
    assert_eq!(log.iter().find(|record| record.key() == "b").unwrap().json()["text"], "bye");
    for comment in &comments {
        assert!(comment["created_at"].as_str().unwrap().ends_with('Z'), "{comment}");
    }
    let logged = app.await_log("comment", seconds(5)).await;
    assert!(comments.iter().any(|comment| comment["id"] == logged["comment.id"]), "{logged}");
    app.stop().await;
}

#[tokio::test]
async fn an_invalid_comment_is_rejected_and_not_stored() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let json = ("content-type", "application/json");
    let long = json!({"text": "x".repeat(70_000)}).to_string();
    let large = json!({"text": "x".repeat(1 << 20)}).to_string();
    let long_id = json!({"text": "a", "post_id": "x".repeat(256)}).to_string();
    for (header, body, status, code) in [
        (json, "{}", 400, "invalid_request"),
        (json, r#"{"text":""}"#, 400, "invalid_request"),
        (json, r#"{"text":" \t\u00a0"}"#, 400, "invalid_request"),
        (json, r#"{"text":null}"#, 400, "invalid_request"),
        (json, r#"{"text":7}"#, 400, "invalid_request"),
        (json, r#"{"text":"a\u0000b"}"#, 400, "invalid_request"),
        (json, r#"{"text":"a","author_id":"\u0000"}"#, 400, "invalid_request"),
        (json, r#"{"text":"a","post_id":1.5}"#, 400, "invalid_request"),
        (json, r#"["nice"]"#, 400, "invalid_request"),
        (json, "text=nice", 400, "invalid_json"),
        (json, "", 400, "invalid_json"),
        (FORM, "", 400, "invalid_request"),
        (FORM, "text=", 400, "invalid_request"),
        (FORM, "text=%20+", 400, "invalid_request"),
        (FORM, "text=%00", 400, "invalid_request"),
        (FORM, "text=%ff", 400, "invalid_request"),
        (FORM, "{\"text\":", 400, "invalid_json"),
        (("content-type", "text/xml"), "<text>nice</text>", 415, "unsupported_media_type"),
        (json, &long, 422, "invalid_field"),
        (json, &long_id, 422, "invalid_field"),
        (json, &large, 413, "body_too_large"),
    ] {
        // The server closes the connection when it answers before it has read the request.
        let problem = raw(&app, &[header, ("connection", "close")], body).await.problem(status, code);
        assert_eq!(problem["success"], false, "{body:.60}");
    }
    let answer = raw(&app, &[json, ("idempotency-key", "")], r#"{"text":"nice"}"#).await;
    assert_eq!(answer.problem(400, "invalid_request")["success"], false);
    assert_eq!(world.kafka.read(&world.topic("comments")).await, []);
    for query in ["limit=x", "limit=", "cursor=x", "cursor=", "post_id=%00"] {
        app.get(&format!("{PATH}?{query}")).await.problem(400, "invalid_request");
    }
    for query in ["limit=0", "limit=101", "limit=-1"] {
        app.get(&format!("{PATH}?{query}")).await.problem(422, "invalid_field");
    }
    for id in ["nonsense", "7.0-0", "0.0-0-0", "0."] {
        let headers = [("last-event-id", id)];
        let answer = app.request(reqwest::Method::GET, &format!("{PATH}/stream"), &headers, "").await;
        answer.problem(400, "invalid_request");
    }
    app.stop().await;
}

#[tokio::test]
async fn without_postgres_comments_are_accepted_and_stored_once_it_is_available() {
    let mut world = World::new().await;
    let app = world.app().start().await;
    comment(&app, "p", "early").await;
    app.get(PATH).await.problem(503, "postgres_unavailable");
    app.get(&format!("{PATH}/stream")).await.problem(503, "postgres_unavailable");
    app.await_log("`postgres.url` is not set, comments are not stored", seconds(1)).await;
    app.stop().await;
    world.without_migration();
    let app = world.app().even_if_not_ready().start().await;
    app.await_failing("comments", seconds(20)).await;
    until("the topic is ready", seconds(20), || async {
        let answer = app.post_json(PATH, &json!({"text": "before the tables", "post_id": "p"})).await;
        (answer.status == 200).then_some(())
    })
    .await;
    app.get(PATH).await.problem(503, "postgres_unavailable");
    world.migrate().await;
    app.await_ready(seconds(30)).await;
    assert_eq!(texts(&listed(&app, 2).await), ["before the tables", "early"]);
    app.stop().await;
}

#[tokio::test]
async fn pages_do_not_shift_while_comments_arrive() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    for number in 0..40 {
        comment(&app, &format!("p{}", number % 4), &format!("t{number}")).await;
    }
    listed(&app, 40).await;
    let first = app.get(&format!("{PATH}?limit=7")).await.expect(200).json();
    let (mut seen, mut page) = (Vec::new(), first);
    let mut more = 0;
    loop {
        seen.extend(page["comments"].as_array().unwrap().clone());
        let Some(cursor) = page["next_cursor"].as_str().map(str::to_owned) else { break };
        comment(&app, "p1", &format!("more{more}")).await;
        more += 1;
        // Request the next page only once the new comment is listed.
        listed(&app, 40 + more).await;
        page = app.get(&format!("{PATH}?limit=7&cursor={cursor}")).await.expect(200).json();
    }
    let expected: Vec<String> = (0..40).rev().map(|number| format!("t{number}")).collect();
    assert_eq!(texts(&seen), expected);
    let of_post = all(&app, 3, "&post_id=p2").await.unwrap();
    let expected: Vec<String> =
        (0..40).rev().filter(|number| number % 4 == 2).map(|number| format!("t{number}")).collect();
    assert_eq!(texts(&of_post), expected);
    assert_eq!(all(&app, 100, "&post_id=none").await.unwrap(), Vec::<Value>::new());
    assert_eq!(app.get(PATH).await.json()["comments"].as_array().unwrap().len(), 20);
    app.stop().await;
}
