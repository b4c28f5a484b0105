//! Direct access to Redis.

use std::time::Duration;

use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, aio::MultiplexedConnection};

/// Runs one command, such as `FLUSHALL`, on its own connection.
pub async fn run<T: FromRedisValue>(url: &str, words: &[&str]) -> T {
    let mut command = Cmd::new();
    for word in words {
        command.arg(*word);
    }
    command.query_async(&mut connect(url).await).await.unwrap()
}

/// Connects to a server.
pub async fn connect(url: &str) -> MultiplexedConnection {
    let client = redis::Client::open(url).unwrap();
    // The client's own timeout is half a second, which a busy machine may take for any command.
    let config = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(20)));
    client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
}
