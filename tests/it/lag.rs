//! `postrider lag`: the command shows each consumer's progress and the record that blocks it.

use std::process::Output;

use serde_json::{Value, json};

use crate::{
    harness::{
        App, Stack, World,
        stack::off_runtime,
        wait::{seconds, until},
    },
    kv::push,
};

async fn lag(world: &World, words: &[&str]) -> Output {
    let mut command = world.command();
    command.arg("lag").args(words);
    off_runtime(move || command.output().unwrap()).await
}

async fn rows(world: &World, words: &[&str]) -> Vec<Value> {
    let output = lag(world, &[&["--output", "json"], words].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap().as_array().unwrap().clone()
}

async fn push_one(app: &App, key: &str) {
    push(app, key, &json!(1)).await;
}

#[tokio::test]
async fn lag_shows_the_commit_point_the_lag_and_the_record_that_blocks_a_partition() {
    let stack = Stack::own("lag", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let app = world.app().start().await;
    push_one(&app, "one").await;
    let management = app.management.clone();
    let ask = ["--management", &management];
    let kv = |rows: Vec<Value>| rows.into_iter().filter(|row| row["consumer"] == "kv").collect::<Vec<_>>();
    until("the push is committed", seconds(20), || async {
        let rows = kv(rows(&world, &ask).await);
        let done = rows.iter().any(|row| row["committed"] == 1) && rows.iter().all(|row| row["lag"] == 0);
        (done && rows.len() == 2).then_some(())
    })
    .await;
    stack.ctl(&["pause", "redis"]).await;
    push_one(&app, "one").await;
    let held = until("the blocked record is listed", seconds(30), || async {
        kv(rows(&world, &ask).await).into_iter().find(|row| row["lag"] == 1 && !row["holder"].is_null())
    })
    .await;
    assert_eq!((&held["oldest_key"], &held["oldest_offset"]), (&json!("one"), &json!(1)), "{held}");
    assert_eq!((&held["holder"]["key"], &held["holder"]["offset"]), (&json!("one"), &json!(1)), "{held}");
    let table = lag(&world, &ask).await;
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("GROUP") && table.contains("offset 1 for"), "{table}");
    stack.ctl(&["resume", "redis"]).await;
    app.stop().await;
}

#[tokio::test]
async fn an_explicit_topic_and_group_are_shown_and_an_unknown_group_is_refused_with_the_known_ones() {
    let world = World::new().await;
    let topic = world.make_topic("others", 1).await;
    let app = world.app().role("api").start().await;
    for number in 0..3 {
        let record = json!({"topic": topic, "key": "k", "payload": number});
        assert_eq!(app.post_json("/produce", &record).await.status, 200);
    }
    let rows = rows(&world, &["--topic", &topic, "--group", "nobody"]).await;
    assert_eq!(
        (&rows[0]["committed"], &rows[0]["lag"], &rows[0]["oldest_key"]),
        (&Value::Null, &json!(3), &json!("k"))
    );
    let refused = lag(&world, &["--group", "nobody"]).await;
    let problem = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && problem.contains("postrider-kv") && problem.contains("--topic"), "{problem}");
    app.stop().await;
}
