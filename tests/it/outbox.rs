//! The outbox drain: rows reach Kafka despite late commits, killed processes and rows that Kafka
//! refuses.

use std::{sync::Mutex, time::Instant};

use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use crate::{
    feed_writes::post,
    harness::{World, kafka::Stored, until, wait::seconds},
};

/// Connects to the world's tables.
pub async fn connect(world: &World) -> PgConnection {
    world.database().connect().await.unwrap()
}

/// Returns a statement that inserts a row into the outbox.
fn row(topic: &str, key: &str, value: &str) -> String {
    format!(
        "INSERT INTO outbox (topic, key, event_id, kind, source, value)
         VALUES ('{topic}', '{key}', gen_random_uuid(), 'test', '/test', '{value}')"
    )
}

pub async fn insert(connection: &mut PgConnection, topic: &str, key: &str, value: &str) {
    connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(row(topic, key, value)))).await.unwrap();
}

/// Returns the values of a key in the topic, once there are `count`.
pub async fn values(world: &World, key: &str, count: usize) -> Vec<String> {
    let topic = world.topic("post-events");
    until(&format!("{count} of {key}"), seconds(20), || async {
        let log = world.kafka.read(&topic).await;
        let values: Vec<String> =
            log.iter().filter(|record| record.key() == key).map(|record: &Stored| record.text().to_owned()).collect();
        (values.len() >= count).then_some(values)
    })
    .await
}

async fn rows(connection: &mut PgConnection, table: &str) -> i64 {
    sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}")))
        .fetch_one(connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn an_open_transaction_delays_its_own_rows_and_none_is_skipped() {
    let world = World::new().await.with_postgres().await;
    let relay = world.app().role("relay").start().await;
    let (mut late, mut other) = (connect(&world).await, connect(&world).await);
    let mut open = late.begin().await.unwrap();
    insert(&mut open, "post-events", "late", "l1").await;
    // Enough rows that the id of the late row is far below the newest.
    let many = "INSERT INTO outbox (topic, key, event_id, kind, source, value)
        SELECT 'post-events', 'k' || n % 10, gen_random_uuid(), 'test', '/test', n::text FROM generate_series(1, 25000) AS n";
    other.execute(many).await.unwrap();
    insert(&mut other, "post-events", "prompt", "p1").await;
    assert_eq!(values(&world, "prompt", 1).await, ["p1"]);
    until("the other rows are drained", seconds(30), || async {
        let mut look = connect(&world).await;
        (rows(&mut look, "outbox").await == 0).then_some(())
    })
    .await;
    insert(&mut open, "post-events", "late", "l2").await;
    open.commit().await.unwrap();
    assert_eq!(values(&world, "late", 2).await, ["l1", "l2"]);
    let log = world.kafka.read(&world.topic("post-events")).await;
    assert_eq!(log.len(), 25_003, "rows are missing or duplicated");
    for key in 0..10 {
        let numbers: Vec<u32> = log
            .iter()
            .filter(|record| record.key() == format!("k{key}"))
            .map(|record| record.text().parse().unwrap())
            .collect();
        assert!(numbers.is_sorted() && numbers.len() == 2_500, "key {key} is out of order or incomplete");
    }
    relay.stop().await;
}

#[tokio::test]
async fn a_row_that_kafka_refuses_is_quarantined_with_its_key() {
    let world = World::new().await.with_postgres().await;
    let mut connection = connect(&world).await;
    let huge = "x".repeat(3 << 20);
    for (key, value) in [("good", "1"), ("bad", "1"), ("bad", &huge), ("bad", "3"), ("good", "2")] {
        insert(&mut connection, "post-events", key, value).await;
    }
    insert(&mut connection, "nowhere", "strange", "1").await;
    let relay = world.app().role("relay").start().await;
    assert_eq!(values(&world, "good", 2).await, ["1", "2"]);
    until("the outbox is empty", seconds(20), || async {
        let mut look = connect(&world).await;
        (rows(&mut look, "outbox").await == 0).then_some(())
    })
    .await;
    insert(&mut connection, "post-events", "bad", "4").await;
    insert(&mut connection, "post-events", "good", "3").await;
    assert_eq!(values(&world, "good", 3).await, ["1", "2", "3"]);
    assert_eq!(values(&world, "bad", 1).await, ["1"]);
    let quarantined: Vec<(String, bool)> =
        sqlx::query_as("SELECT key, reason IS NOT NULL FROM outbox_quarantine ORDER BY id")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    let quarantined: Vec<(&str, bool)> = quarantined.iter().map(|(key, reason)| (key.as_str(), *reason)).collect();
    assert_eq!(quarantined, [("bad", true), ("bad", false), ("strange", true), ("bad", false)]);
    until("the quarantined rows are counted", seconds(5), || async {
        (relay.metric("postrider_outbox_quarantined_rows").await == Some(4.0)).then_some(())
    })
    .await;
    relay.stop().await;
}

#[tokio::test]
async fn relay_processes_share_the_shards_and_take_over_those_of_a_killed_one() {
    let world = World::new().await.with_postgres().await;
    let api = world.app().role("api").start().await;
    let (first, second) = (world.app().role("relay").start().await, world.app().role("relay").start().await);
    for relay in [&first, &second] {
        until("each process owns half of the shards", seconds(10), || async {
            (relay.metric("postrider_outbox_owned_shards").await == Some(4.0)).then_some(())
        })
        .await;
    }
    for number in 0..40 {
        post(&api, &format!("a{number}"), "before").await;
    }
    let topic = world.topic("post-events");
    world.kafka.read_at_least(&topic, 40).await;
    first.kill().await;
    for number in 0..40 {
        post(&api, &format!("a{number}"), "after").await;
    }
    until("the other process owns all shards", seconds(20), || async {
        (second.metric("postrider_outbox_owned_shards").await == Some(8.0)).then_some(())
    })
    .await;
    let log = world.kafka.read_at_least(&topic, 80).await;
    assert!(log.len() < 120, "too many duplicates");
    second.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn rows_are_drained_after_a_lost_postgres_connection_and_partitions_are_truncated_in_turn() {
    let world = World::new().await.with_postgres().await;
    let relay = world.app().role("relay").start().await;
    let mut connection = connect(&world).await;
    // Old rows stay visible to this transaction, so that nothing can be vacuumed.
    let mut old = connect(&world).await;
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM posts LIMIT 1").await.unwrap();
    let (begun, grown) = (Instant::now(), Mutex::new([false; 4]));
    until("a partition with dead rows is truncated", seconds(60), || async {
        let mut writer = connect(&world).await;
        // A partition with undrained rows is not truncated at the end of its turn, so insert no
        // faster than the drain.
        if world.count("outbox").await < 3_000 {
            let many = "INSERT INTO outbox (topic, key, event_id, kind, source, value)
            SELECT 'post-events', 'k' || n % 10, gen_random_uuid(), 'test', '/test', repeat('x', 200) FROM generate_series(1, 300) AS n";
            writer.execute(many).await.unwrap();
        }
        let sizes: Vec<i64> = sqlx::query_scalar("SELECT pg_relation_size(('outbox_' || n)::regclass) FROM generate_series(0, 3) AS n").fetch_all(&mut writer).await.unwrap();
        let mut grown = grown.lock().unwrap();
        grown.iter_mut().zip(&sizes).for_each(|(grown, &size)| *grown |= size >= 100_000);
        let is_truncated = grown.iter().zip(&sizes).any(|(&grown, &size)| grown && size < 100_000);
        // After 32 s all four partitions have had their turn.
        (begun.elapsed() > seconds(32) && is_truncated).then_some(())
    })
    .await;
    world.try_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%outbox WHERE shard%' AND pid <> pg_backend_pid()").await.unwrap();
    insert(&mut connection, "post-events", "last", "1").await;
    assert_eq!(values(&world, "last", 1).await, ["1"]);
    relay.stop().await;
}
