//! Hot statements use their indexes.

use postrider::feed;
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, Row};

use crate::harness::World;

/// How Postgres does a statement when it knows nothing of the values.
async fn plan(connection: &mut sqlx::PgConnection, statement: &str, values: &str) -> String {
    let prepare = format!("SET plan_cache_mode = force_generic_plan; DEALLOCATE ALL; PREPARE hot AS {statement}");
    connection.execute(sqlx::raw_sql(AssertSqlSafe(prepare))).await.unwrap();
    let explain = format!("EXPLAIN EXECUTE hot({values})");
    let rows = connection.fetch_all(sqlx::raw_sql(AssertSqlSafe(explain))).await.unwrap();
    rows.iter().map(|row| row.get::<String, _>(0)).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn hot_statements_scan_no_large_table() {
    let world = World::new().await.with_postgres().await;
    let seed = ["feed", "seed", "--users", "2000", "--follows", "15", "--posts", "4000", "--shape", "zipf"];
    let output = world.command().args(seed).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut connection = world.database().connect().await.unwrap();
    let large = ["posts", "follows", "feed_rows", "feed_authors"].map(|table| format!("Seq Scan on {table}"));
    for (statement, values) in feed::hot_statements() {
        let plan = plan(&mut connection, statement, values).await;
        for scan in &large {
            assert!(!plan.contains(scan), "{statement}\n{plan}");
        }
    }
    let all = plan(&mut connection, "SELECT count(*) FROM posts WHERE content = $1", "'x'").await;
    assert!(all.contains(&large[0]), "the check sees a scan where there is one: {all}");
}
