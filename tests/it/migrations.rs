//! Database schemas of other versions: the previous version's schema, and schemas that are newer
//! than the program.

use serde_json::json;
use sqlx::Row;

use crate::{
    feed::shows,
    harness::{World, inbox::message, until, wait::seconds},
    messages::{history, send, stored},
};

/// The schema of 0.1 with a few rows, from `pg_dump --inserts`. Do not change it: the next version
/// adds a file.
const FROZEN: &str = include_str!("schemas/0.1.sql");

/// Describes the columns, indexes and constraints of all tables but the daily partitions.
async fn shape(world: &World) -> Vec<String> {
    let query = "
        SELECT format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable, collation_name) AS line
        FROM information_schema.columns
        WHERE table_schema = current_schema() AND table_name !~ '_d[0-9]{8}$'
        UNION ALL
        SELECT replace(indexdef, current_schema() || '.', '') FROM pg_indexes
        WHERE schemaname = current_schema() AND tablename !~ '_d[0-9]{8}$'
        UNION ALL
        SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = current_schema()::regnamespace AND conrelid::regclass::text !~ '_d[0-9]{8}$'
        ORDER BY line";
    let mut connection = world.connect().await.unwrap();
    let rows = sqlx::query(query).fetch_all(&mut connection).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn the_previous_versions_schema_is_migrated_and_its_data_is_served() {
    let fresh = World::new().await.with_postgres().await;
    let mut world = World::new().await;
    world.without_migration();
    let schema = world.prefix.trim_end_matches('_').to_owned();
    world.sql(&format!("CREATE SCHEMA {schema}; {}", FROZEN.replace("@schema@", &schema))).await;
    world.migrate().await;
    let shapes = (shape(&world).await, shape(&fresh).await);
    assert!(!shapes.0.is_empty());
    assert_eq!(shapes.0, shapes.1);

    let app = world.app().env("POSTRIDER_MESSAGES__EPOCH", "1").start().await;
    let texts = |history: &[serde_json::Value]| -> Vec<String> {
        history.iter().map(|message| message["content"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(&history(&app, "ann", 10).await), ["first", "second"]);
    send(&app, &message("ann", "s", 0)).await;
    stored(&app, "ann", 3).await;
    let comments = app.get("/api/v1/comments").await.expect(200).text();
    assert!(comments.contains("a comment"), "{comments}");
    shows(&app, "ann", &[1]).await;
    app.stop().await;
}

#[tokio::test]
async fn the_program_runs_and_migrates_on_a_schema_with_an_unknown_newer_migration() {
    let world = World::new().await.with_postgres().await;
    world
        .sql(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (9999, 'of the next version', true, '\\x00', 1);
             CREATE TABLE of_the_next_version (id bigint PRIMARY KEY);
             ALTER TABLE messages ADD COLUMN of_the_next_version text;
             ALTER TABLE processed_events ADD COLUMN of_the_next_version bigint NOT NULL DEFAULT 0",
        )
        .await;
    world.migrate().await;
    let app = world.app().start().await;
    assert_eq!(app.failing("postgres").await, None);
    send(&app, &message("r", "s", 0)).await;
    stored(&app, "r", 1).await;
    let body = json!({"author_id": "bob", "content": "a post"});
    app.post_json("/posts", &body).await.expect(202);
    until("the event of the post is processed", seconds(40), || async {
        (world.count("processed_events").await == 1).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn a_migration_that_is_missing_below_a_newer_one_is_detected() {
    let world = World::new().await.with_postgres().await;
    world
        .sql(
            "UPDATE _sqlx_migrations SET version = 9999, checksum = '\\x00'
             WHERE version = (SELECT max(version) FROM _sqlx_migrations)",
        )
        .await;
    let app = world.app().even_if_not_ready().start().await;
    until("the readiness check names the command", seconds(20), || async {
        app.failing("postgres").await.filter(|detail| detail.contains("postrider migrate"))
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn statements_of_the_previous_program_move_the_progress_through_the_former_tables() {
    let world = World::new().await.with_postgres().await;
    for projection in ["comments", "messages", "feed"] {
        let table = format!("{projection}_progress");
        let begin = format!(
            "WITH made AS (
                INSERT INTO {table} (topic_epoch, partition, next) VALUES (7, 1, 5) ON CONFLICT DO NOTHING RETURNING next
             )
             SELECT next FROM made UNION ALL SELECT next FROM {table} WHERE topic_epoch = 7 AND partition = 1"
        );
        assert_eq!(world.number(&begin).await, 5);
        assert_eq!(world.number(&begin).await, 5, "it exists already");
        let advance = format!(
            "WITH moved AS (
                UPDATE {table} AS progress SET next = batch.next FROM unnest('{{1}}'::int[], '{{9}}'::bigint[]) AS batch (partition, next)
                WHERE topic_epoch = 7 AND progress.partition = batch.partition AND progress.next = 5 RETURNING progress.next
             )
             SELECT count(*) FROM moved"
        );
        assert_eq!(world.number(&advance).await, 1);
        assert_eq!(world.number(&advance).await, 0, "it has moved on");
        let stored =
            format!("SELECT next FROM projection_progress WHERE projection = '{projection}' AND partition = 1");
        assert_eq!(world.number(&stored).await, 9);
    }
    let marks = "WITH moved AS (
            UPDATE messages_progress SET next = 10, marked_at = now() WHERE topic_epoch = 7 RETURNING marked_at
        ) SELECT count(*) FROM moved WHERE marked_at = now()";
    assert_eq!(world.number(marks).await, 1);
    assert_eq!(world.number("SELECT count(*) FROM projection_progress WHERE next = 10").await, 1);
}
