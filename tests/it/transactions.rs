//! Postgres transactions that their caller gives up.

use futures_util::FutureExt;
use postrider_postgres::{Config, transaction::Transaction};

use crate::harness::{World, until, wait::seconds};

/// Returns a pool with one connection, which is open.
async fn pool(world: &World) -> sqlx::PgPool {
    let config = Config {
        url: postrider_config::SecretUrl::new(world.database_url()),
        schema: world.prefix.trim_end_matches('_').to_owned(),
        max_connections: 1,
        ..Config::default()
    };
    let pool = postrider_postgres::pool(&config).unwrap();
    sqlx::query("SELECT 1").execute(&pool).await.unwrap();
    pool
}

/// Writes with a statement of its own, and checks that other sessions see it.
async fn write_is_stored(world: &World, pool: &sqlx::PgPool, number: i64) {
    sqlx::query("INSERT INTO written VALUES ($1)").bind(number).execute(pool).await.unwrap();
    let stored = world.number(&format!("SELECT count(*) FROM written WHERE number = {number}")).await;
    assert_eq!(stored, 1, "write {number} succeeded, but was not committed");
}

#[tokio::test]
async fn no_statement_joins_a_transaction_that_was_given_up() {
    let world = World::new().await.with_postgres().await;
    world.sql("CREATE TABLE written (number bigint)").await;
    let pool = pool(&world).await;
    let mut abandoned = 0;
    for number in 0..20 {
        // The server receives `BEGIN`, and nobody waits for its answer.
        abandoned += i64::from(Transaction::begin(&pool).now_or_never().is_none());
        write_is_stored(&world, &pool, number).await;
    }
    assert!(abandoned > 10, "`BEGIN` was answered at once, or there was no connection: {abandoned}");
    // Given up in the middle, and while it was being committed.
    let mut transaction = Transaction::begin(&pool).await.unwrap();
    sqlx::query("INSERT INTO written VALUES (-1)").execute(&mut *transaction).await.unwrap();
    drop(transaction);
    write_is_stored(&world, &pool, 21).await;
    let mut transaction = Transaction::begin(&pool).await.unwrap();
    sqlx::query("INSERT INTO written VALUES (-2)").execute(&mut *transaction).await.unwrap();
    let _ = transaction.commit().now_or_never();
    write_is_stored(&world, &pool, 22).await;
    assert_eq!(world.count("written WHERE number = -1").await, 0);
    pool.close().await;
}

#[tokio::test]
async fn a_transaction_that_ends_keeps_its_connection() {
    let world = World::new().await.with_postgres().await;
    world.sql("CREATE TABLE written (number bigint)").await;
    let pool = pool(&world).await;
    let session = || async { sqlx::query_scalar::<_, i32>("SELECT pg_backend_pid()").fetch_one(&pool).await.unwrap() };
    let first = session().await;
    let mut transaction = Transaction::begin(&pool).await.unwrap();
    sqlx::query("INSERT INTO written VALUES (1)").execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let mut transaction = Transaction::begin(&pool).await.unwrap();
    sqlx::query("INSERT INTO written VALUES (2)").execute(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(session().await, first);
    assert_eq!((world.count("written").await, world.count("written WHERE number = 2").await), (1, 0));
    drop(Transaction::begin(&pool).await.unwrap());
    until("the session of the dropped transaction has ended", seconds(10), || async {
        (world.number(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {first}")).await == 0).then_some(())
    })
    .await;
    pool.close().await;
}
