//! Direct access to Redis.

use redis::{Cmd, FromRedisValue};

/// Runs one command, such as `FLUSHALL`, on its own connection.
pub async fn run<T: FromRedisValue>(url: &str, words: &[&str]) -> T {
    let mut command = Cmd::new();
    for word in words {
        command.arg(*word);
    }
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    command.query_async(&mut connection).await.unwrap()
}
