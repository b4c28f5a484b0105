//! Tries settings before they are put to use.

use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerErrorKind};
use tokio::time::timeout;

use super::{Config, Redis};
use crate::platform::trial::Fault;

/// Time for all of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the key that is written stays, in milliseconds.
const KEY_MS: u64 = 1_000;

/// Connects, and writes a key of ours that expires at once. Returns the connection.
pub async fn try_out(config: &Config) -> Result<Redis, Fault> {
    let attempt = async {
        let mut redis = Redis::connect(config).await?;
        redis::cmd("PING").query_async::<()>(&mut redis).await?;
        let key = format!("{}rotation:tried", config.key_prefix);
        redis::cmd("SET").arg(key).arg(1).arg("PX").arg(KEY_MS).query_async::<()>(&mut redis).await?;
        Ok(redis)
    };
    match timeout(PATIENCE, attempt).await {
        Ok(tried) => tried.map_err(|error| fault(config, &error)),
        Err(_) => Err(Fault::Unreachable(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
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
