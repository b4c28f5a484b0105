//! Checker: presence publishes every change once and in order, and the last one matches the current
//! state.

use std::collections::{BTreeMap, BTreeSet};

use super::{World, kafka::Stored};

/// A presence change from the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub receiver: String,
    pub version: i64,
    pub connected: bool,
    pub id: String,
}

impl Change {
    fn read(record: &Stored) -> Self {
        let value = record.json();
        let text = |name: &str| value[name].as_str().unwrap().to_owned();
        let (receiver, state) = (text("receiver_id"), text("state"));
        assert!(text("at").ends_with('Z'), "{value}");
        assert_eq!(record.key(), receiver);
        assert_eq!(record.header("ce_type"), Some(&*format!("postrider.presence.{state}")));
        assert_eq!(record.header("ce_source"), Some("/presence"));
        let connected = state == "connected";
        assert_eq!(connected, value["connections"].as_i64().unwrap() > 0, "{value}");
        let (version, id) = (value["version"].as_i64().unwrap(), record.header("ce_id").unwrap().to_owned());
        Self { receiver, version, connected, id }
    }
}

/// Reads all changes in a world's topic.
pub async fn changes(world: &World) -> Vec<Change> {
    world.kafka.read(&world.topic("presence")).await.iter().map(Change::read).collect()
}

/// Counts the distinct changes.
pub fn count(changes: &[Change]) -> usize {
    changes.iter().map(|change| &change.id).collect::<BTreeSet<_>>().len()
}

/// Returns the states of a receiver in the order of their versions.
pub fn states(changes: &[Change], receiver: &str) -> Vec<bool> {
    let own = changes.iter().filter(|change| change.receiver == receiver);
    own.map(|change| (change.version, change.connected)).collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Returns the faults in the changes, given the receivers that are connected now.
pub fn faults(changes: &[Change], connected: &[&str]) -> Vec<String> {
    let mut faults = untold(changes, connected);
    for receiver in receivers(changes, connected) {
        // A duplicate may come late.
        let mut in_log: Vec<i64> = Vec::new();
        for change in changes.iter().filter(|change| change.receiver == receiver) {
            if !in_log.contains(&change.version) {
                in_log.push(change.version);
            }
        }
        if !in_log.is_sorted() {
            faults.push(format!("{receiver} has versions {in_log:?}"));
        }
    }
    faults
}

/// Like [`faults`], but checks the order of versions instead of the order in the log: after a Kafka
/// outage, an event may come late.
pub fn untold(changes: &[Change], connected: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut ids: BTreeMap<(&str, i64), &Change> = BTreeMap::new();
    for change in changes {
        let known = ids.entry((&change.receiver, change.version)).or_insert(change);
        if *known != change {
            faults.push(format!("{} has two changes of one version: {known:?} and {change:?}", change.receiver));
        }
    }
    for receiver in receivers(changes, connected) {
        let states = states(changes, receiver);
        if states.windows(2).any(|pair| pair[0] == pair[1]) || states.first() == Some(&false) {
            faults.push(format!("{receiver} went through {states:?}"));
        }
        if states.last().copied().unwrap_or(false) != connected.contains(&receiver) {
            faults.push(format!("{receiver} ends with {states:?}"));
        }
    }
    faults
}

fn receivers<'a>(changes: &'a [Change], connected: &[&'a str]) -> BTreeSet<&'a str> {
    changes.iter().map(|change| &*change.receiver).chain(connected.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(version: i64, connected: bool) -> Change {
        Change { receiver: "r".to_owned(), version, connected, id: version.to_string() }
    }

    #[test]
    fn every_fault_that_it_exists_for_is_found() {
        let (up, down, up_again) = (change(1, true), change(2, false), change(5, true));
        let none: [String; 0] = [];
        assert_eq!(faults(&[up.clone(), down.clone(), down.clone(), up_again.clone()], &["r"]), none);
        assert_eq!(faults(&[up.clone(), down.clone(), up.clone()], &[]), none);
        let found = |changes: &[Change], connected: &[&str]| faults(changes, connected).len();
        assert_eq!(found(&[up.clone(), down.clone()], &["r"]), 1, "the last one is missing");
        assert_eq!(found(std::slice::from_ref(&up), &[]), 1, "the end is missing");
        assert_eq!(found(&[], &["r"]), 1, "all are missing");
        assert_eq!(found(&[up.clone(), up_again.clone()], &["r"]), 1, "one in between is missing");
        assert_eq!(found(std::slice::from_ref(&down), &[]), 1, "the first is missing");
        assert_eq!(found(&[up.clone(), up_again, down], &["r"]), 1, "disordered");
        assert_eq!(found(&[up.clone(), Change { id: "x".to_owned(), ..up }], &["r"]), 1, "another id");
    }
}
