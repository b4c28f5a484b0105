//! Frequent statements use their indexes.

use postrider_feed as feed;
use sqlx::postgres::PgPoolOptions;

use crate::harness::World;

#[tokio::test]
async fn frequent_statements_scan_no_large_table() {
    let world = World::new().await.with_postgres().await;
    let run = |words: &[&str]| {
        let output = world.command().arg("feed").args(words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["seed", "--users", "2000", "--follows", "15", "--posts", "4000", "--shape", "zipf"]);
    run(&["plans"]);
    let pool = PgPoolOptions::new().connect_lazy_with(world.database());
    let sql = "SELECT count(*) FROM posts WHERE content = $1";
    let all = feed::explain(&pool, "all", sql, "'x'").await.unwrap();
    assert_eq!(all.scanned, ["posts"], "the check must detect a scan: {}", all.plan);
}
