//! Orders the restarts of processes for a rotated secret: one process of a role at a time, the
//! holder of a lease in Redis.
//!
//! The lease is held from before the drain until the replaced process is ready again. It belongs to
//! a host name and a process id, which a process keeps when it replaces itself, and a container
//! keeps when it is restarted. It expires `rotation.lease_ms` after it was taken.

use std::{fs, time::Duration};

use postrider_redis::{Config, Redis};
use redis::{RedisError, Script};

/// Returns 1 if this process now holds the lease, else 0; then the holder, and the milliseconds
/// until it expires.
const TAKE: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return {0, holder, redis.call('PTTL', KEYS[1])}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1, ARGV[1], tonumber(ARGV[2])}
";

/// Returns 1 if this process held the lease.
const GIVE_BACK: &str = r"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
";

/// Lease of one role of one installation, as used by this process.
#[derive(Debug, Clone)]
pub struct Lease {
    key: String,
    holder: String,
    length: Duration,
}

/// Holder of the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    Ours,
    /// Another process holds the lease, while it restarts.
    Theirs {
        holder: String,
        left: Duration,
    },
}

impl Lease {
    /// Creates the handle of this process. Installations that share a server differ in
    /// `redis.key_prefix`.
    pub fn new(redis: &Config, role: &str, length: Duration) -> Self {
        // The host name of a container is that of its pod, however often it is restarted.
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let holder = format!("{}/{}", host.trim(), std::process::id());
        Self::held_by(holder, redis, role, length)
    }

    fn held_by(holder: String, redis: &Config, role: &str, length: Duration) -> Self {
        Self { key: format!("{}rotation:{role}", redis.key_prefix), holder, length }
    }

    /// Takes the lease if no other process holds it. Taking it again renews it.
    pub async fn take(&self, redis: &mut Redis) -> Result<Turn, RedisError> {
        let length_ms = u64::try_from(self.length.as_millis()).unwrap_or(u64::MAX).max(1);
        let script = Script::new(TAKE);
        let (ours, holder, left_ms): (bool, String, i64) =
            script.key(&self.key).arg(&self.holder).arg(length_ms).invoke_async(redis).await?;
        let left = Duration::from_millis(u64::try_from(left_ms).unwrap_or(0));
        Ok(if ours { Turn::Ours } else { Turn::Theirs { holder, left } })
    }

    /// Releases the lease. Returns whether this process held it.
    pub async fn give_back(&self, redis: &mut Redis) -> Result<bool, RedisError> {
        Script::new(GIVE_BACK).key(&self.key).arg(&self.holder).invoke_async(redis).await
    }
}
