//! How safe our own topics are: replicas and `min.insync.replicas`, compared with what is configured.
//!
//! A topic with too few replicas works until a broker is lost, and then records are lost with it. So it keeps nobody from
//! being ready; readiness, the log and metrics name it.

use metrics::gauge;

use super::{Config, config::Topics, topics::TopicSpec};
use crate::platform::ops::Check;

/// Replicas of a topic of ours, where nothing else is configured and there are as many brokers.
const USUAL_REPLICAS: i32 = 3;

/// What was found of one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replication {
    /// The fewest that a partition has.
    pub replicas: i32,
    /// Brokers of the cluster that answer.
    pub brokers: i32,
    /// `None` where the setting cannot be read.
    pub min_insync: Option<i32>,
}

/// Returns the `min.insync.replicas` that goes with so many replicas: one replica may be missing where there are three or
/// more, and with fewer all but one, since writes would stop with the first broker.
pub fn derived_min_insync(replicas: i32) -> i32 {
    if replicas >= 3 { 2 } else { 1 }
}

impl Topics {
    /// Returns the `min.insync.replicas` of a topic with so many replicas.
    pub fn min_insync(&self, replicas: i32) -> i32 {
        if self.min_insync_replicas > 0 { self.min_insync_replicas } else { derived_min_insync(replicas) }
    }

    /// Returns what is wrong with the replication that was found, as a sentence with what to do.
    pub fn weakness(&self, topic: &str, found: Replication) -> Option<String> {
        let Replication { replicas, brokers, min_insync } = found;
        let (wanted, because) = match self.replication_factor {
            count if count > 0 => (count, "`kafka.topics.replication_factor`".to_owned()),
            _ => (USUAL_REPLICAS.min(brokers), format!("a cluster of {brokers} brokers")),
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
                "topic `{topic}` has min.insync.replicas={min_insync} with {}, so that nothing can be written: {}",
                plural(replicas, "replica"),
                set(wanted.min(replicas)),
            )),
            () if differs => Some(format!(
                "topic `{topic}` has min.insync.replicas={min_insync}, but {wanted} is wanted: {}",
                set(wanted)
            )),
            () => None,
        }
    }
}

fn plural(count: i32, word: &str) -> String {
    if count == 1 { format!("{count} {word}") } else { format!("{count} {word}s") }
}

/// Compares our topics with the configuration, each time that it is given what was found.
pub struct Watch {
    topics: Topics,
    check: Check,
    said: String,
}

impl Watch {
    /// The check informs only: it never fails.
    pub fn new(config: &Config, check: Check) -> Self {
        check.pass();
        Self { topics: config.topics.clone(), check, said: String::new() }
    }

    /// Says what is weak in readiness, metrics, and once in the log.
    pub fn compare<'a>(&mut self, found: impl IntoIterator<Item = (&'a TopicSpec, Replication)>) {
        let mut weaknesses = Vec::new();
        for (spec, found) in found {
            let weakness = self.topics.weakness(&spec.name, found);
            let topic = || spec.name.clone();
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
            if all != self.said {
                tracing::warn!(problem = all, "a topic is replicated less than configured");
            }
            self.check.warn(all.clone());
        }
        self.said = all;
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
        assert_eq!(weakness(-1, -1, found(3, 2, 2)), None, "a broker that is away is not the topic's fault");
    }

    #[test]
    fn writes_need_two_of_three_replicas_unless_something_else_is_configured() {
        assert_eq!([1, 2, 3, 5].map(derived_min_insync), [1, 1, 2, 2]);
        assert_eq!(weakness(-1, -1, found(3, 3, 2)), None);
        assert_eq!(weakness(-1, -1, found(3, 3, 3)), None, "stricter than wanted is somebody's choice");
        assert!(weakness(-1, -1, found(3, 3, 1)).unwrap().contains("--add-config min.insync.replicas=2"));
        assert_eq!(weakness(-1, 1, found(3, 3, 1)), None);
        assert!(weakness(-1, 1, found(3, 3, 2)).unwrap().contains("but 1 is wanted"));
        assert!(weakness(-1, -1, found(1, 1, 2)).unwrap().contains("nothing can be written"));
        assert_eq!(weakness(-1, -1, Replication { min_insync: None, ..found(3, 3, 0) }), None);
    }
}
