//! Daily partitions: rows that arrive before their partition, steps that fail, and clocks that
//! jump.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use postrider_postgres::upkeep::days::Cutoff;
use sqlx::{ConnectOptions, postgres::PgPoolOptions};

use crate::{
    harness::{App, World, inbox::message, until, wait::seconds},
    messages::{send, stored},
};

/// Inserts this many messages for `r` with increasing offsets. Without a partition of their day,
/// they go to the default partition.
async fn put(world: &World, count: usize, stored_at: &str) {
    world
        .sql(&format!(
            r#"INSERT INTO messages (receiver_id, topic_epoch, partition, "offset", prev, event_id, value, created_at, stored_at)
               SELECT 'r', 9, 0, n, n - 1, gen_random_uuid(), '{{}}', now(), {stored_at} FROM generate_series(1, {count}) AS n"#
        ))
        .await;
}

/// Returns the name of the partition that is `days` from today.
async fn partition(world: &World, table: &str, days: i32) -> String {
    let day = format!("SELECT to_char((now() AT TIME ZONE 'UTC')::date + {days}, 'YYYYMMDD')::bigint");
    format!("{table}_d{}", world.number(&day).await)
}

async fn exists(world: &World, table: &str) -> bool {
    world.number(&format!("SELECT count(to_regclass('{table}'))")).await == 1
}

async fn await_empty(world: &World, table: &str) {
    until(&format!("{table} is empty"), seconds(60), || async { (world.count(table).await == 0).then_some(()) }).await;
}

async fn gauge(app: &App, name: &str, expected: f64) {
    until(&format!("{name} is {expected}"), seconds(60), || async {
        (app.metric(name).await == Some(expected)).then_some(())
    })
    .await;
}

/// Creates partitions of a day in 2020 with a row each, and ids of the same age.
async fn make_old(world: &World) {
    world
        .sql(
            "CREATE TABLE messages_d20200101 PARTITION OF messages FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00');
             CREATE TABLE processed_events_d20200101 PARTITION OF processed_events
                 FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00');
             INSERT INTO message_ids VALUES (gen_random_uuid(), 'r', '2020-01-01 12:00+00');
             INSERT INTO feed_requests VALUES (gen_random_uuid(), NULL, '2020-01-01 12:00+00');
             INSERT INTO processed_events VALUES (gen_random_uuid(), '2020-01-01 12:00+00')",
        )
        .await;
    put(world, 1, "'2020-01-01 12:00+00'").await;
}

async fn await_old_dropped(world: &World) {
    until("old partitions and ids are deleted", seconds(40), || async {
        let dropped = !exists(world, "messages_d20200101").await && !exists(world, "processed_events_d20200101").await;
        let ids_left = world.number("SELECT count(*) FROM message_ids WHERE stored_at < '2021-01-01'").await
            + world.count("feed_requests").await;
        (dropped && ids_left == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn rows_of_the_default_partition_move_into_that_of_their_day() {
    let world = World::new().await.with_postgres().await;
    put(&world, 3, "now()").await;
    put(&world, 2, "now() - interval '2 days'").await;
    put(&world, 1, "now() + interval '9 days'").await;
    world.sql("INSERT INTO processed_events VALUES (gen_random_uuid()), (gen_random_uuid())").await;
    make_old(&world).await;
    let app = world.app().start().await;
    await_empty(&world, "messages_default").await;
    await_empty(&world, "processed_events_default").await;
    for (table, days, rows) in
        [("messages", 0, 3), ("messages", -2, 2), ("messages", 9, 1), ("processed_events", 0, 2), ("messages", 1, 0)]
    {
        let partition = partition(&world, table, days).await;
        assert_eq!(world.count(&partition).await, rows, "{partition}");
        // Its indexes are attached to those of the table.
        let loose = format!(
            "SELECT count(*) FROM pg_index WHERE indrelid = '{partition}'::regclass
             AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = indexrelid)"
        );
        assert_eq!(world.number(&loose).await, 0, "{partition}");
        let checks =
            format!("SELECT count(*) FROM pg_constraint WHERE conrelid = '{partition}'::regclass AND contype = 'c'");
        assert_eq!(world.number(&checks).await, 0, "{partition}");
    }
    await_old_dropped(&world).await;
    for table in ["messages", "processed_events"] {
        gauge(&app, &format!("postrider_default_partition_rows{{table=\"{table}\"}}"), 0.0).await;
    }
    send(&app, &message("a", "s", 0)).await;
    stored(&app, "a", 1).await;
    assert_eq!(world.count("messages_default").await, 0);
    app.stop().await;
}

#[tokio::test]
async fn a_partition_that_cannot_be_created_stops_neither_other_days_nor_the_deletion_of_old_ones() {
    let world = World::new().await.with_postgres().await;
    put(&world, 1, "now()").await;
    make_old(&world).await;
    // A type with the partition's name makes its creation fail.
    let today = partition(&world, "messages", 0).await;
    let events_tomorrow = partition(&world, "processed_events", 1).await;
    world.sql(&format!("CREATE TYPE {today} AS ENUM (); CREATE TYPE {events_tomorrow} AS ENUM ()")).await;
    let app = world.app().start().await;
    await_old_dropped(&world).await;
    for (table, days) in [("messages", 1), ("messages", 3), ("processed_events", 2)] {
        let partition = partition(&world, table, days).await;
        assert!(exists(&world, &partition).await, "{partition}");
    }
    gauge(&app, "postrider_default_partition_rows{table=\"messages\"}", 1.0).await;
    for area in ["messages", "feed"] {
        let failures = format!("postrider_upkeep_failures_total{{area=\"{area}\",step=\"create\"}}");
        until(&format!("{area} counts its failures"), seconds(40), || async {
            app.metric(&failures).await.filter(|failures| *failures >= 1.0)
        })
        .await;
        let others = format!("postrider_upkeep_failures_total{{area=\"{area}\",step=\"expire\"}}");
        gauge(&app, &others, 0.0).await;
    }
    world.sql(&format!("DROP TYPE {today}; DROP TYPE {events_tomorrow}")).await;
    await_empty(&world, "messages_default").await;
    assert_eq!(world.count(&today).await, 1);
    app.stop().await;
}

#[tokio::test]
async fn readers_see_every_row_once_and_writers_continue_while_rows_move() {
    const ROWS: i64 = 60_000;
    let world = Arc::new(World::new().await.with_postgres().await);
    put(&world, usize::try_from(ROWS).unwrap(), "now()").await;
    let moved = Arc::new(AtomicBool::new(false));
    let reader = {
        let (world, moved) = (world.clone(), moved.clone());
        tokio::spawn(async move {
            let mut connection = world.connect().await.unwrap();
            let (mut reads, count) = (0, "SELECT count(*) FROM messages WHERE topic_epoch = 9");
            while !moved.load(Ordering::Relaxed) {
                // Planned for each read: a plan made while the partition is attached must not miss
                // its rows.
                let found: i64 = sqlx::query_scalar(count).persistent(false).fetch_one(&mut connection).await.unwrap();
                assert_eq!(found, ROWS, "after {reads} reads");
                reads += 1;
            }
            reads
        })
    };
    let app = world.app().start().await;
    let (mut sent, begun) = (0, Instant::now());
    while world.count("messages_default").await > 0 {
        send(&app, &message("w", "s", sent)).await;
        sent += 1;
        assert!(!reader.is_finished(), "the reader has failed");
        assert!(begun.elapsed() < seconds(90), "the rows are still in the default partition");
    }
    moved.store(true, Ordering::Relaxed);
    assert!(reader.await.unwrap() > 0);
    send(&app, &message("w", "s", sent)).await;
    until("all sent messages are stored", seconds(40), || async {
        let count = "SELECT count(*) FROM messages WHERE receiver_id = 'w'";
        (world.number(count).await == i64::try_from(sent + 1).unwrap()).then_some(())
    })
    .await;
    app.stop().await;
}

/// Simulates a clock that jumps ahead by 40 days: by the clock, the stored rows and the days in use
/// are 40 days old.
#[tokio::test]
async fn a_clock_that_runs_ahead_of_the_days_in_use_drops_nothing_until_they_follow() {
    let world = World::new().await.with_postgres().await;
    let jumped = "DO $$ BEGIN IF to_regclass('days_in_use') IS NOT NULL THEN
        DELETE FROM days_in_use WHERE day > (now() AT TIME ZONE 'UTC')::date - 40; END IF; END $$";
    world.sql(jumped).await;
    let (messages, events) =
        (partition(&world, "messages", -40).await, partition(&world, "processed_events", -40).await);
    for (partition, table) in [(&messages, "messages"), (&events, "processed_events")] {
        world
            .sql(&format!(
                "DO $$ DECLARE day date := (now() AT TIME ZONE 'UTC')::date - 40; BEGIN EXECUTE format(
                     'CREATE TABLE {partition} PARTITION OF {table} FOR VALUES FROM (%L) TO (%L)',
                     day || ' 00:00+00', day + 1 || ' 00:00+00'); END $$"
            ))
            .await;
    }
    put(&world, 5, "now() - interval '40 days'").await;
    world
        .sql(
            "INSERT INTO message_ids VALUES (gen_random_uuid(), 'r', now() - interval '40 days');
             INSERT INTO message_receivers VALUES ('r', 9, 0, 5, now() - interval '70 days');
             INSERT INTO feed_requests VALUES (gen_random_uuid(), NULL, now() - interval '40 days');
             INSERT INTO posts VALUES (1, 'a', '', now(), now() - interval '40 days');
             INSERT INTO processed_events VALUES (gen_random_uuid(), now() - interval '40 days')",
        )
        .await;
    let all = || async {
        let mut rows = Vec::new();
        for table in ["messages", "message_ids", "message_receivers", "feed_requests", "posts", "processed_events"] {
            rows.push(world.count(table).await);
        }
        rows
    };
    // The second start shows that this does not depend on the first process's memory.
    for _ in 0..2 {
        let app = world.app().start().await;
        let areas = [("messages", "receivers"), ("feed", "posts")];
        for (area, last_step) in areas {
            gauge(&app, &format!("postrider_upkeep_failures_total{{area=\"{area}\",step=\"{last_step}\"}}"), 0.0).await;
        }
        assert_eq!(all().await, [5, 1, 1, 1, 1, 1]);
        for table in ["messages", "processed_events"] {
            gauge(&app, &format!("postrider_retention_held_partitions{{table=\"{table}\"}}"), 1.0).await;
        }
        let said = "partitions past their retention by the clock of Postgres kept, too few days in use since";
        app.await_log(said, seconds(20)).await;
        app.stop().await;
    }
    // As if an operator had added the days because the clock is right, or the days had passed.
    world
        .sql(
            "INSERT INTO days_in_use (day) SELECT generate_series(
                 (SELECT max(day) FROM days_in_use WHERE day < (now() AT TIME ZONE 'UTC')::date),
                 (now() AT TIME ZONE 'UTC')::date, interval '1 day')::date ON CONFLICT DO NOTHING",
        )
        .await;
    let app = world.app().start().await;
    until("all rows past their retention are deleted", seconds(40), || async {
        (all().await == [0, 0, 0, 0, 0, 0]).then_some(())
    })
    .await;
    assert!(!exists(&world, &messages).await && !exists(&world, &events).await);
    gauge(&app, "postrider_retention_held_partitions{table=\"messages\"}", 0.0).await;
    app.stop().await;
}

#[tokio::test]
async fn the_first_day_after_a_gap_is_not_counted_and_later_ones_are() {
    let world = World::new().await.with_postgres().await;
    let pool = PgPoolOptions::new().max_connections(1).connect_with(world.database()).await.unwrap();
    let cutoff = async |days| Cutoff::of(&pool, days).await.unwrap();
    let ordinary = cutoff(3).await;
    assert_eq!(ordinary.day, ordinary.day_by_clock);
    // The last day in use is 31 days ago: the clock has jumped.
    let note = |days: &str| {
        format!("INSERT INTO days_in_use (day) SELECT (now() AT TIME ZONE 'UTC')::date - ago FROM {days} AS ago")
    };
    let day = async |ago: i64| {
        let day = format!("SELECT ((now() AT TIME ZONE 'UTC')::date - {ago})::text");
        let mut connection = world.database().connect().await.unwrap();
        sqlx::query_scalar::<_, String>(sqlx::AssertSqlSafe(day)).fetch_one(&mut connection).await.unwrap()
    };
    world.sql(&format!("DELETE FROM days_in_use; {}", note("generate_series(31, 60)"))).await;
    assert_eq!(cutoff(3).await.day, day(34).await);
    world.sql(&note("generate_series(2, 2)")).await;
    assert_eq!(cutoff(3).await.day, day(34).await, "the first day after the jump was counted");
    world.sql(&note("generate_series(0, 1)")).await;
    assert_eq!(cutoff(3).await.day, day(32).await, "two more days were not counted");
    // Only recent days are in use, too few for the retention.
    world.sql("DELETE FROM days_in_use WHERE day < (now() AT TIME ZONE 'UTC')::date - 2").await;
    assert_eq!(cutoff(3).await.day, "-infinity");
    assert_eq!(cutoff(3).await.time, "-infinity");
    // A retention above all limits never ends.
    assert_eq!(cutoff(u32::MAX).await.day, "-infinity");
}
