//! The HTTP API for dead letters, under `/admin/dlq`.

use std::sync::Arc;

use postrider_dlq::EVENTS_TOPIC;
use serde_json::json;

use crate::{
    dlq::{NOW_MS, Post, outcomes},
    harness::App,
};

#[tokio::test]
async fn operators_list_show_replay_and_purge_over_http() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let app = post.world.app().role("api").start().await;
    let mut ids = Vec::new();
    for (at, key) in ["a", "b"].into_iter().enumerate() {
        let record = post.produce(&topic, 0, Some(key.as_bytes()), Some(br#"{"n":1}"#)).await;
        ids.push(post.give_up(EVENTS_TOPIC, &record, "kv", "transport", NOW_MS + at as i64).await);
    }
    let listing = app.get("/admin/dlq?topic=orders&limit=1&letters=events&since=2h").await.expect(200).json();
    assert_eq!((&listing["letters"][0]["id"], &listing["matched"]), (&json!(ids[1]), &json!(2)));
    let path = format!("/admin/dlq/{}", ids[0].replace('/', "%2F").replace('@', "%40").replace(' ', "%20"));
    let detail = app.get(&path).await.expect(200).json();
    assert_eq!((&detail["key"], &detail["value"]), (&json!("a"), &json!({"n": 1})));
    app.get("/admin/dlq/nothing").await.problem(404, "not_found");
    let chosen = app.get("/admin/dlq?key_base64=YQ%3D%3D").await.expect(200).json();
    assert_eq!((&chosen["matched"], &chosen["letters"][0]["key"]), (&json!(1), &json!("a")));
    let wrong = app.get("/admin/dlq?key_base64=%3F").await.problem(422, "invalid_field");
    assert_eq!(wrong["errors"][0]["detail"], "`key_base64` must be base64 (got `?`)");
    let both = json!({"key": "a", "key_base64": "YQ", "dry_run": true});
    let both = app.post_json("/admin/dlq/purge", &both).await.problem(422, "invalid_field");
    assert_eq!(both["errors"][0]["pointer"], "#/key_base64");
    let binary = json!({"key_base64": "YQ", "dry_run": true});
    let binary = app.post_json("/admin/dlq/purge", &binary).await.expect(200).json();
    assert_eq!(outcomes(&binary), ["would_purge"]);
    app.get("/admin/dlq?limit=0").await.problem(422, "invalid_field");
    app.get("/admin/dlq?limit=x").await.problem(400, "invalid_request");
    app.get("/admin/dlq?since=soon").await.problem(422, "invalid_field");
    app.post_json("/admin/dlq/purge", &json!({})).await.problem(422, "invalid_field");
    app.post_json("/admin/dlq/replay", &json!({"letters": "events"})).await.problem(422, "invalid_field");
    let misspelt = app.post_json("/admin/dlq/purge", &json!({"key": "a", "dryRun": true})).await;
    let detail = misspelt.problem(400, "invalid_request")["detail"].to_string();
    assert!(detail.contains("unknown field `dryRun`; did you mean `dry_run`?"), "{detail}");
    app.post_json("/admin/dlq/replay", &json!({"all": true, "topik": "x"})).await.problem(400, "invalid_request");
    app.post_json("/admin/dlq/purge?dry_run=true", &json!({"all": true})).await.problem(400, "invalid_request");
    app.get("/admin/dlq?topik=orders").await.problem(400, "invalid_request");
    assert_eq!(app.get("/admin/dlq").await.expect(200).json()["matched"], 2, "a refused request changed something");
    let form = [("content-type", "text/plain")];
    app.request(reqwest::Method::POST, "/admin/dlq/purge", &form, r#"{"all":true}"#)
        .await
        .problem(415, "unsupported_media_type");
    let dry = json!({"dry_run": true});
    let problem = app.post_json("/admin/dlq/replay", &dry).await.problem(422, "invalid_field");
    assert_eq!(problem["errors"][0]["pointer"], "#/all", "a dry run needs what the change needs");
    let dry = json!({"dry_run": true, "all": true});
    let dry = app.post_json("/admin/dlq/replay", &dry).await.expect(200).json();
    assert_eq!((&dry["matched"], &dry["done"], &dry["dry_run"]), (&json!(2), &json!(2), &json!(true)));
    assert_eq!(outcomes(&dry), ["would_replay", "would_replay"]);
    let unknown = app.post_json("/admin/dlq/purge", &json!({"ids": [ids[1], "nope"], "dry_run": true})).await;
    let unknown = unknown.expect(200).json();
    assert_eq!((outcomes(&unknown), &unknown["not_found"]), (vec!["would_purge", "not_found"], &json!(1)));
    let replayed = app.post_json("/admin/dlq/replay", &json!({"key": "a"})).await.expect(200).json();
    assert_eq!(replayed["letters"], json!([{"id": ids[0], "outcome": "replayed"}]));
    assert_eq!(post.records(&topic).await.len(), 3);
    let purged = app.post_json("/admin/dlq/purge", &json!({"all": true})).await.expect(200).json();
    assert_eq!(outcomes(&purged), ["purged"]);
    assert_eq!(app.get("/admin/dlq").await.expect(200).json()["matched"], 0);
    assert!(!app.log().contains(r#""level":"ERROR""#), "{}", app.log());
    app.stop().await;
    let without = post.world.app().role("api").env("POSTRIDER_DLQ__ADMIN", "false").start().await;
    without.get("/admin/dlq").await.problem(404, "not_found");
}

#[tokio::test]
async fn one_request_at_a_time_scans_the_dead_letters_and_only_up_to_a_timeout() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let record = post.produce(&topic, 0, Some(b"k"), Some(b"v")).await;
    post.give_up(EVENTS_TOPIC, &record, "kv", "transport", NOW_MS).await;
    let app = Arc::new(post.world.app().role("api").start().await);
    let requests: Vec<_> = (0..8).map(|_| tokio::spawn(list(app.clone()))).collect();
    let mut statuses = Vec::new();
    for request in requests {
        statuses.push(request.await.unwrap());
    }
    assert!(statuses.contains(&200) && statuses.contains(&429), "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert_eq!(list(app).await, 200, "the next scan is admitted");
    let hasty = post.world.app().role("api").env("POSTRIDER_DLQ__SCAN_TIMEOUT_MS", "1").start().await;
    hasty.get("/admin/dlq").await.problem(503, "scan_timeout");
}

async fn list(app: Arc<App>) -> u16 {
    let answer = app.get("/admin/dlq").await;
    if answer.status == 429 {
        answer.problem(429, "scan_in_progress");
    }
    answer.status
}
