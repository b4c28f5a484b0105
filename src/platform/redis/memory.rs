//! The memory of the Redis servers: how much is used of `maxmemory`, and whether they refuse writes for lack of it.
//!
//! A server without memory refuses every write and answers reads. Nothing that was acknowledged is lost, because Kafka and
//! Postgres have it: projections wait, and the view is as it was.

use std::{sync::atomic::Ordering, time::Duration};

use metrics::counter;
use redis::{RedisError, ServerError, Value};

use super::Redis;
use crate::platform::{bound, ops::Check};

/// The time between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Hundredths of `maxmemory` from which on there is a warning.
const NEARLY_FULL: u64 = 90;

/// The memory of one server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Memory {
    used: u64,
    /// 0 where there is no limit.
    limit: u64,
    policy: String,
}

impl Memory {
    /// Reads an answer to `INFO memory`.
    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let of_line = |line: &str| line.trim().strip_prefix(name)?.strip_prefix(':').map(str::to_owned);
            text.lines().find_map(of_line).unwrap_or_default()
        };
        let number = |name| field(name).parse().unwrap_or(0);
        Self { used: number("used_memory"), limit: number("maxmemory"), policy: field("maxmemory_policy") }
    }

    /// Hundredths of the limit; 0 without one.
    fn hundredths(&self) -> u64 {
        (self.used.saturating_mul(100)).checked_div(self.limit).unwrap_or(0)
    }

    /// Returns what is wrong, as a sentence with what to do.
    fn weakness(&self) -> Option<String> {
        let Self { used, limit, policy } = self;
        if *limit > 0 && !matches!(policy.as_str(), "noeviction" | "") {
            return Some(format!(
                "Redis evicts keys (`maxmemory-policy` is `{policy}`): it may forget idempotency keys and parts of views; set `noeviction`"
            ));
        }
        (self.hundredths() >= NEARLY_FULL)
            .then(|| format!("Redis uses {used} of {limit} bytes (`maxmemory`): give it more before it refuses writes"))
    }
}

/// Returns whether a server refused a command for lack of memory, by itself or within a script.
pub fn is_out_of_memory(error: &RedisError) -> bool {
    error.code() == Some("OOM") || error.detail().is_some_and(|detail| detail.contains(OOM))
}

/// The same for an answer in a pipeline.
pub fn says_out_of_memory(error: &ServerError) -> bool {
    error.code() == "OOM" || error.details().is_some_and(|details| details.contains(OOM))
}

const OOM: &str = "OOM command not allowed";

impl Redis {
    /// Looks at the servers' memory again and again; never ends by itself. While writes are refused the check fails where
    /// `fails` is set, and warns otherwise: a process that serves reads is of use without writes.
    pub async fn watch_memory(mut self, check: Check, fails: bool) {
        // An alert on the increase needs a zero to start from.
        counter!("postrider_redis_out_of_memory_total").increment(0);
        loop {
            let refused = self.0.out_of_memory.swap(false, Ordering::Relaxed);
            let memory = self.memory().await;
            bound::report("redis_memory", memory.used, memory.limit);
            match memory.weakness() {
                _ if refused => {
                    let Memory { used, limit, .. } = memory;
                    let problem = format!(
                        "Redis is out of memory and refuses writes ({used} of {limit} bytes of `maxmemory`): nothing is lost, and views stand still until it has more"
                    );
                    if fails { check.fail(problem) } else { check.warn(problem) }
                }
                Some(weakness) => check.warn(weakness),
                None => check.pass(),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The memory of the server that is nearest to its limit; all zero where it cannot be asked.
    async fn memory(&mut self) -> Memory {
        let mut info = redis::cmd("INFO");
        let answer = info.arg("memory").query_async::<Value>(self).await.unwrap_or(Value::Nil);
        texts(&answer).into_iter().map(|text| Memory::parse(&text)).max_by_key(Memory::hundredths).unwrap_or_default()
    }
}

/// The texts in an answer: one, or in a Cluster one of each server.
fn texts(answer: &Value) -> Vec<String> {
    match answer {
        Value::BulkString(bytes) => vec![String::from_utf8_lossy(bytes).into_owned()],
        Value::VerbatimString { text, .. } => vec![text.clone()],
        Value::SimpleString(text) => vec![text.clone()],
        Value::Array(items) => items.iter().flat_map(texts).collect(),
        Value::Map(pairs) => pairs.iter().flat_map(|(_, value)| texts(value)).collect(),
        _ => Vec::new(),
    }
}

/// Counts a write that a server refused for lack of memory.
pub fn count_refusal() {
    counter!("postrider_redis_out_of_memory_total").increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str =
        "# Memory\r\nused_memory:950\r\nused_memory_human:950B\r\nmaxmemory:1000\r\nmaxmemory_policy:noeviction\r\n";

    #[test]
    fn what_is_wrong_with_the_memory_is_said() {
        let full = Memory::parse(INFO);
        assert_eq!(full, Memory { used: 950, limit: 1_000, policy: "noeviction".to_owned() });
        assert!(full.weakness().is_some_and(|text| text.contains("950 of 1000")));
        assert_eq!(Memory { used: 899, ..full.clone() }.weakness(), None);
        assert_eq!(Memory { limit: 0, policy: "allkeys-lru".to_owned(), ..full.clone() }.weakness(), None);
        let evicting = Memory { used: 1, policy: "volatile-lru".to_owned(), ..full };
        assert!(evicting.weakness().is_some_and(|text| text.contains("volatile-lru")));
        assert_eq!(Memory::parse("").weakness(), None);
    }

    #[test]
    fn a_cluster_is_as_full_as_its_fullest_server() {
        let server = |text: &str| (Value::Nil, Value::BulkString(text.as_bytes().to_vec()));
        let both = Value::Map(vec![server("used_memory:1\r\nmaxmemory:10\r\n"), server(INFO)]);
        assert_eq!(texts(&both).len(), 2);
    }
}
