//! Compares the replication of postrider's own topics, replicas and `min.insync.replicas`, with the
//! configuration.
//!
//! A topic with too few replicas works until a broker is lost, and its records may be lost with the
//! broker. A finding therefore does not fail readiness; readiness, the log and metrics only report
//! it.

use metrics::gauge;
use postrider_health::Check;

use super::{Config, config::Topics};

/// Expected replicas of a topic if none are configured and the cluster has at least as many
/// brokers.
const DEFAULT_REPLICAS: i32 = 3;

/// Replication of one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replication {
    /// Smallest number of replicas of any partition.
    pub replicas: i32,
    /// Number of brokers in the cluster that answer.
    pub brokers: i32,
    /// `None` if the setting cannot be read.
    pub min_insync: Option<i32>,
}

/// Returns the `min.insync.replicas` derived from a number of replicas: 2 for three or more, so
/// that one replica may be missing; otherwise 1, because a higher value would stop writes when the
/// first broker is lost.
pub fn derived_min_insync(replicas: i32) -> i32 {
    if replicas >= 3 { 2 } else { 1 }
}

impl Topics {
    /// Returns the `min.insync.replicas` expected of a topic with this many replicas.
    pub fn min_insync(&self, replicas: i32) -> i32 {
        if self.min_insync_replicas > 0 { self.min_insync_replicas } else { derived_min_insync(replicas) }
    }

    /// Returns what is wrong with a topic's replication and how to fix it; `None` if nothing is.
    pub fn weakness(&self, topic: &str, found: Replication) -> Option<String> {
        let Replication { replicas, brokers, min_insync } = found;
        let (wanted, because) = match self.replication_factor {
            count if count > 0 => (count, "`kafka.topics.replication_factor`".to_owned()),
            _ => (DEFAULT_REPLICAS.min(brokers), format!("a cluster of {brokers} brokers")),
        };
        if replicas < wanted {
            let replicas = plural(replicas, "replica");
            return Some(format!(
                "topic `{topic}` has {replicas}, and {because} asks for {wanted}: add replicas with kafka-reassign-partitions.sh"
            ));
        }
        let min_insync = min_insync?;
        let set = |wanted: i32| {
            format!(
                "set it with kafka-configs.sh --alter --entity-type topics --entity-name {topic} --add-config min.insync.replicas={wanted}"
            )
        };
        let wanted = self.min_insync(replicas);
        let differs = if self.min_insync_replicas > 0 { min_insync != wanted } else { min_insync < wanted };
        match () {
            () if min_insync > replicas => Some(format!(
                "topic `{topic}` has min.insync.replicas={min_insync} with {}, so nothing can be written: {}",
                plural(replicas, "replica"),
                set(wanted.min(replicas)),
            )),
            () if differs => Some(format!(
                "topic `{topic}` has min.insync.replicas={min_insync}, but should have min.insync.replicas={wanted}: {}",
                set(wanted)
            )),
            () => None,
        }
    }
}

fn plural(count: i32, word: &str) -> String {
    if count == 1 { format!("{count} {word}") } else { format!("{count} {word}s") }
}

/// Compares topics with the configuration whenever it gets new findings.
pub struct Watch {
    topics: Topics,
    check: Check,
    reported: String,
}

impl Watch {
    /// Creates a watch whose check only warns and never fails.
    pub fn new(config: &Config, check: Check) -> Self {
        check.pass();
        Self { topics: config.topics.clone(), check, reported: String::new() }
    }

    /// Reports deviations of topics in readiness and metrics, and each change once in the log.
    pub fn compare<'a>(&mut self, found: impl IntoIterator<Item = (&'a str, Replication)>) {
        let mut weaknesses = Vec::new();
        for (topic, found) in found {
            let weakness = self.topics.weakness(topic, found);
            let topic = || topic.to_owned();
            gauge!("postrider_topic_replicas", "topic" => topic()).set(f64::from(found.replicas));
            if let Some(min_insync) = found.min_insync {
                gauge!("postrider_topic_min_insync_replicas", "topic" => topic()).set(f64::from(min_insync));
            }
            gauge!("postrider_topic_replication_ok", "topic" => topic()).set(f64::from(u8::from(weakness.is_none())));
            weaknesses.extend(weakness);
        }
        let all = weaknesses.join("; ");
        if all.is_empty() {
            self.check.pass();
        } else {
            if all != self.reported {
                tracing::warn!(problem = all, "topic replication below configuration");
            }
            self.check.warn(all.clone());
        }
        self.reported = all;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(replicas: i32, brokers: i32, min_insync: i32) -> Replication {
        Replication { replicas, brokers, min_insync: Some(min_insync) }
    }

    fn weakness(replication_factor: i32, min_insync_replicas: i32, found: Replication) -> Option<String> {
        Topics { create: true, replication_factor, min_insync_replicas }.weakness("t", found)
    }

    #[test]
    fn one_replica_is_fine_on_one_broker_and_named_on_three() {
        assert_eq!(weakness(-1, -1, found(1, 1, 1)), None);
        assert!(weakness(-1, -1, found(1, 3, 1)).unwrap().contains("1 replica, and a cluster of 3 brokers asks for 3"));
        assert!(weakness(3, -1, found(1, 1, 1)).unwrap().contains("`kafka.topics.replication_factor` asks for 3"));
        assert_eq!(weakness(-1, -1, found(3, 2, 2)), None, "a broker that is down does not count against the topic");
    }

    #[test]
    fn writes_need_two_of_three_replicas_unless_something_else_is_configured() {
        assert_eq!([1, 2, 3, 5].map(derived_min_insync), [1, 1, 2, 2]);
        assert_eq!(weakness(-1, -1, found(3, 3, 2)), None);
        assert_eq!(weakness(-1, -1, found(3, 3, 3)), None, "a stricter setting is allowed");
        assert!(weakness(-1, -1, found(3, 3, 1)).unwrap().contains("--add-config min.insync.replicas=2"));
        assert_eq!(weakness(-1, 1, found(3, 3, 1)), None);
        assert!(weakness(-1, 1, found(3, 3, 2)).unwrap().contains("but should have min.insync.replicas=1"));
        assert!(weakness(-1, -1, found(1, 1, 2)).unwrap().contains("nothing can be written"));
        assert_eq!(weakness(-1, -1, Replication { min_insync: None, ..found(3, 3, 0) }), None);
    }
}
