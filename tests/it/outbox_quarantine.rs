//! `postrider outbox quarantine`: the command runs next to a running outbox drain.

use serde_json::{Value, json};

use crate::{
    harness::{World, stack::off_runtime, until, wait::seconds},
    outbox::{connect, insert, values},
};

/// Runs the command and returns its result, or its error output.
pub async fn quarantine(world: &World, words: &[&str]) -> Result<Value, String> {
    let mut command = world.command();
    command.args(["outbox", "quarantine"]).args(words).args(["--output", "json"]);
    let output = off_runtime(move || command.output().unwrap()).await;
    if output.status.success() {
        Ok(serde_json::from_slice(&output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Returns id, key and whether there is a reason of each row, once there are `count` rows.
async fn listed(world: &World, count: usize) -> Vec<(i64, String, bool)> {
    until(&format!("{count} rows are in quarantine"), seconds(20), || async {
        let listing = quarantine(world, &["list"]).await.unwrap();
        let row = |row: &Value| {
            (row["id"].as_i64().unwrap(), row["key"].as_str().unwrap().to_owned(), !row["reason"].is_null())
        };
        let rows: Vec<_> = listing["rows"].as_array().unwrap().iter().map(row).collect();
        (rows.len() == count && listing["matched"] == count).then_some(rows)
    })
    .await
}

#[tokio::test]
async fn rows_of_a_key_are_released_in_order_before_later_ones_once_the_bad_row_is_dropped() {
    let world = World::new().await.with_postgres().await;
    let mut connection = connect(&world).await;
    let huge = "x".repeat(3 << 20);
    for (key, value) in [("ann", "1"), ("ann", &huge), ("ann", "3"), ("bob", &huge), ("ann", "4"), ("bob", "2")] {
        insert(&mut connection, "post-events", key, value).await;
    }
    let relay = world.app().role("relay").start().await;
    let rows = listed(&world, 5).await;
    let found: Vec<(&str, bool)> = rows.iter().map(|(_, key, bad)| (key.as_str(), *bad)).collect();
    assert_eq!(found, [("ann", true), ("ann", false), ("bob", true), ("ann", false), ("bob", false)]);
    let ann = quarantine(&world, &["list", "--key", "ann", "--limit", "1"]).await.unwrap();
    assert_eq!((&ann["matched"], &ann["rows"][0]["value_bytes"]), (&json!(3), &json!(3 << 20)));

    let outcome = |dry_run: bool, keys: i64, rows: i64| Ok(json!({"dry_run": dry_run, "keys": keys, "rows": rows}));
    assert_eq!(quarantine(&world, &["release", "--key", "ann", "--dry-run"]).await, outcome(true, 1, 3));
    assert_eq!(quarantine(&world, &["drop", "--dry-run"]).await, outcome(true, 2, 5));
    assert_eq!(listed(&world, 5).await, rows, "a dry run changed something");

    // Kafka still refuses the row.
    assert_eq!(quarantine(&world, &["release", "--key", "ann"]).await, outcome(false, 1, 3));
    assert_eq!(listed(&world, 5).await, rows, "the rows are not back in quarantine in their order");
    assert_eq!(values(&world, "ann", 1).await, ["1"]);

    let bad = rows[0].0.to_string();
    assert_eq!(quarantine(&world, &["drop", &bad]).await, outcome(false, 1, 1));
    // For up to a second, the drain still treats the key as quarantined.
    assert_eq!(quarantine(&world, &["release", "--key", "ann"]).await, outcome(false, 1, 2));
    insert(&mut connection, "post-events", "ann", "5").await;
    assert_eq!(values(&world, "ann", 4).await, ["1", "3", "4", "5"]);
    assert_eq!(listed(&world, 2).await, rows[2..].iter().filter(|row| row.1 == "bob").cloned().collect::<Vec<_>>());
    assert_eq!(quarantine(&world, &["drop", "--key", "bob"]).await, outcome(false, 1, 2));
    insert(&mut connection, "post-events", "bob", "3").await;
    assert_eq!(values(&world, "bob", 1).await, ["3"]);
    relay.stop().await;
}

#[tokio::test]
async fn a_missing_choice_or_an_unknown_row_or_key_is_a_clear_error() {
    let mut world = World::new().await;
    world.without_migration();
    assert!(quarantine(&world, &["list"]).await.unwrap_err().contains("postrider migrate"));
    world.migrate().await;
    for (words, said) in [
        (&["release"] as &[&str], "--yes"),
        (&["drop"], "--yes"),
        (&["release", "--key", "nobody"], "not in quarantine"),
        (&["drop", "17"], "not in quarantine"),
    ] {
        let problem = quarantine(&world, words).await.unwrap_err();
        assert!(problem.contains(said), "{words:?}: {problem}");
    }
    assert_eq!(quarantine(&world, &["list"]).await, Ok(json!({"matched": 0, "rows": []})));
    assert_eq!(quarantine(&world, &["release", "--yes"]).await, Ok(json!({"dry_run": false, "keys": 0, "rows": 0})));
}
