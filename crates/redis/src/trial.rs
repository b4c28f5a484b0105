//! Tests Redis settings before they are put into use.

use std::time::Duration;

use postrider_config::trial::Fault;
use redis::{ErrorKind, RedisError, ServerErrorKind};
use tokio::time::timeout;

use super::{Config, Redis, memory};

/// Time limit of the whole test.
const PATIENCE: Duration = Duration::from_secs(10);
/// TTL of the key that the test writes, in milliseconds.
const KEY_MS: u64 = 1_000;

/// Connects, and writes a key under `key_prefix` with a TTL of one second. Returns the connection.
pub async fn try_out(config: &Config) -> Result<Redis, Fault> {
    let attempt = async {
        let mut redis = Redis::connect(config).await?;
        redis::cmd("PING").query_async::<()>(&mut redis).await?;
        let key = format!("{}rotation:tried", config.key_prefix);
        let mut set = redis::cmd("SET");
        match set.arg(key).arg(1).arg("PX").arg(KEY_MS).query_async::<()>(&mut redis).await {
            Err(error) if !refuses_all_writes(&error) => Err(error),
            _ => Ok(redis),
        }
    };
    match timeout(PATIENCE, attempt).await {
        Ok(tried) => tried.map_err(|error| fault(config, &error)),
        Err(_) => Err(Fault::Unreachable(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

/// Returns whether the server refuses all writes at the moment, for lack of memory, disk or
/// replicas. It has then accepted the credentials.
fn refuses_all_writes(error: &RedisError) -> bool {
    memory::is_out_of_memory(error) || matches!(error.code(), Some("MISCONF" | "NOREPLICAS"))
}

fn fault(config: &Config, error: &RedisError) -> Fault {
    use ServerErrorKind as S;
    let text = config.url.mask_in(&error.to_string());
    match error.kind() {
        ErrorKind::Io
        | ErrorKind::ClusterConnectionNotFound
        | ErrorKind::Server(S::BusyLoading | S::TryAgain | S::ClusterDown | S::MasterDown | S::ReadOnly) => {
            Fault::Unreachable(text)
        }
        _ => Fault::Refused(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_refuses_all_writes_does_not_refute_the_secret() {
        let parse = |text: &[u8]| redis::parse_redis_value(text).unwrap().extract_error().unwrap_err();
        assert!(refuses_all_writes(&parse(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n")));
        assert!(refuses_all_writes(&parse(b"-MISCONF Redis is configured to save RDB snapshots\r\n")));
        assert!(refuses_all_writes(&parse(b"-NOREPLICAS Not enough good replicas to write.\r\n")));
        assert!(!refuses_all_writes(&parse(b"-NOPERM this user has no permissions\r\n")));
    }
}
