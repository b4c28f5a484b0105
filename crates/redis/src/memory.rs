//! Memory of the Redis servers: how much of `maxmemory` is used, and whether they refuse writes
//! because it is full.
//!
//! A server that is out of memory refuses every write and still answers reads. No acknowledged
//! write is lost, because Kafka and Postgres have it: projections wait, and views keep their state.

use std::{sync::atomic::Ordering, time::Duration};

use metrics::counter;
use postrider_health::Check;
use postrider_limits::bound;
use redis::{RedisError, ServerError, Value};

use super::Redis;

/// Time between two measurements.
const LOOK: Duration = Duration::from_secs(2);
/// Percentage of `maxmemory` from which the check warns.
const NEARLY_FULL: u64 = 90;

/// The memory of one server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Memory {
    used: u64,
    /// 0 means no limit.
    limit: u64,
    policy: String,
}

impl Memory {
    /// Parses the answer to `INFO memory`.
    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let of_line = |line: &str| line.trim().strip_prefix(name)?.strip_prefix(':').map(str::to_owned);
            text.lines().find_map(of_line).unwrap_or_default()
        };
        let number = |name| field(name).parse().unwrap_or(0);
        Self { used: number("used_memory"), limit: number("maxmemory"), policy: field("maxmemory_policy") }
    }

    /// Returns the percentage of the limit that is used; 0 without a limit.
    fn percent_used(&self) -> u64 {
        (self.used.saturating_mul(100)).checked_div(self.limit).unwrap_or(0)
    }

    /// Returns a sentence that names the problem and the remedy, if there is a problem.
    fn weakness(&self) -> Option<String> {
        let Self { used, limit, policy } = self;
        if *limit > 0 && !matches!(policy.as_str(), "noeviction" | "") {
            return Some(format!(
                "Redis evicts keys and may lose idempotency keys and parts of views (`maxmemory-policy` is `{policy}`); set it to `noeviction`"
            ));
        }
        (self.percent_used() >= NEARLY_FULL)
            .then(|| format!("Redis uses {used} of {limit} bytes (`maxmemory`); raise it before Redis refuses writes"))
    }
}

/// Returns whether a server refused a command because it is out of memory, directly or inside a
/// script.
pub fn is_out_of_memory(error: &RedisError) -> bool {
    error.code() == Some("OOM") || error.detail().is_some_and(|detail| detail.contains(OOM))
}

/// Like [`is_out_of_memory`], for one answer of a pipeline.
pub fn says_out_of_memory(error: &ServerError) -> bool {
    error.code() == "OOM" || error.details().is_some_and(|details| details.contains(OOM))
}

const OOM: &str = "OOM command not allowed";

impl Redis {
    /// Measures the servers' memory every two seconds; never returns. While writes are refused, the
    /// check fails if `fails` is set, and warns otherwise: a process that serves reads is useful
    /// without writes.
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
                        "Redis is out of memory and refuses writes ({used} of {limit} bytes of `maxmemory`); raise `maxmemory`: nothing is lost, but views are not updated until then"
                    );
                    if fails { check.fail(problem) } else { check.warn(problem) }
                }
                Some(weakness) => check.warn(weakness),
                None => check.pass(),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Returns the memory of the server that is closest to its limit; all fields are zero if the
    /// query fails.
    async fn memory(&mut self) -> Memory {
        let mut info = redis::cmd("INFO");
        let answer = info.arg("memory").query_async::<Value>(self).await.unwrap_or(Value::Nil);
        texts(&answer).into_iter().map(|text| Memory::parse(&text)).max_by_key(Memory::percent_used).unwrap_or_default()
    }
}

/// Returns the texts in an answer: one, or one per server of a Cluster.
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

/// Counts a write that a server refused because it is out of memory.
pub fn count_refusal() {
    counter!("postrider_redis_out_of_memory_total").increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str =
        "# Memory\r\nused_memory:950\r\nused_memory_human:950B\r\nmaxmemory:1000\r\nmaxmemory_policy:noeviction\r\n";

    #[test]
    fn a_full_memory_and_an_evicting_policy_are_reported() {
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
