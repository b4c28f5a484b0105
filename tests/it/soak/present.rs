//! The rules for presence and for undelivered messages.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    events::Presence,
    ledger::{Evidence, Place, Record, Topic},
};
use crate::harness::changes::{Change, untold};

/// Settings of presence in the run, in milliseconds.
pub const LEASE_MS: u64 = 3_000;
pub const HEARTBEAT_MS: u64 = 500;
pub const LINGER_MS: u64 = 500;
/// Time after which a message counts as undelivered in the run, in milliseconds.
pub const UNDELIVERED_AFTER_MS: i64 = 3_000;

/// Checks the presence events, and what the API reports at the end.
pub fn presence(evidence: &Evidence) -> Vec<String> {
    let connected: Vec<&str> =
        evidence.connected.iter().filter(|(_, count)| **count > 0).map(|(receiver, _)| receiver.as_str()).collect();
    let wrong = untold(&with_lost_ends(evidence, &connected), &connected);
    let mut found: Vec<String> = wrong.into_iter().map(|what| with_times(evidence, what)).collect();
    for (receiver, count) in &evidence.connected {
        let expected = Some(*count).filter(|count| *count > 0);
        match evidence.present.get(receiver) {
            Some(said) if *said == expected => {}
            said => found.push(format!("{receiver} has {count} connections, but the API reports {said:?}")),
        }
    }
    found
}

/// Appends the times of a receiver's changes to a fault, which begins with the receiver.
fn with_times(evidence: &Evidence, what: String) -> String {
    let receiver = what.split(' ').next();
    let of_receiver = evidence.presence.iter().filter(|one| Some(one.change.receiver.as_str()) == receiver);
    let times: Vec<String> = of_receiver
        .map(|one| {
            format!(
                "{} {} ms ({})",
                if one.change.connected { "connected" } else { "disconnected" },
                one.at_ms,
                one.change.version
            )
        })
        .collect();
    format!("{what}: {}", times.join(", "))
}

/// Returns the changes, with disconnections added that no process can know of: if a process dies
/// and Redis loses its data before other processes have ended the connections, they have no event
/// (docs/operations.md, "Presence").
fn with_lost_ends(evidence: &Evidence, connected: &[&str]) -> Vec<Change> {
    let unknown = unknown_ends(evidence);
    let mut receivers: BTreeMap<&str, BTreeMap<i64, &Presence>> = BTreeMap::new();
    for presence in &evidence.presence {
        receivers.entry(&presence.change.receiver).or_default().entry(presence.change.version).or_insert(presence);
    }
    let mut missing: HashMap<(&str, i64), Change> = HashMap::new();
    for (receiver, changes) in &receivers {
        let changes: Vec<&Presence> = changes.values().copied().collect();
        for (number, one) in changes.iter().enumerate().filter(|(_, one)| one.change.connected) {
            let next = changes.get(number + 1);
            let ends_wrong = match next {
                Some(next) => next.change.connected,
                None => !connected.contains(receiver),
            };
            let until_ms = next.map_or(i64::MAX, |next| next.at_ms);
            if ends_wrong && unknown.iter().any(|(from_ms, to_ms)| one.at_ms <= *to_ms && until_ms >= *from_ms) {
                let (receiver, version) = ((*receiver).to_owned(), one.change.version + 1);
                let end = Change { receiver, version, connected: false, id: String::new() };
                missing.insert((&one.change.receiver, one.change.version), end);
            }
        }
    }
    let mut whole = Vec::new();
    for presence in &evidence.presence {
        whole.push(presence.change.clone());
        whole.extend(missing.remove(&(presence.change.receiver.as_str(), presence.change.version)));
    }
    whole
}

/// Returns the spans in which Redis lost the data of an api process that had just ended.
pub fn unknown_ends(evidence: &Evidence) -> Vec<(i64, i64)> {
    // After the lease, other processes wait for one more heartbeat, and they check once per heartbeat.
    let known_after_ms = LEASE_MS.max(LINGER_MS) + 3 * HEARTBEAT_MS;
    let ended: Vec<_> =
        evidence.faults.iter().filter(|fault| matches!(fault.kind, "api killed" | "api restarted")).collect();
    let lost = evidence.faults.iter().filter(|fault| matches!(fault.kind, "redis emptied" | "redis killed"));
    let meets = |from_ms: u64, to_ms: u64| {
        ended.iter().any(|end| end.from_ms <= to_ms && from_ms <= end.to_ms + known_after_ms)
    };
    lost.filter(|loss| meets(loss.from_ms, loss.to_ms)).map(|loss| (loss.from_ms as i64, loss.to_ms as i64)).collect()
}

/// Checks the events of undelivered messages.
pub fn undelivered(evidence: &Evidence) -> Vec<String> {
    let log = evidence.logs.get(&Topic::Chat).map_or(&[][..], Vec::as_slice);
    let by_place: HashMap<Place, &Record> = log.iter().map(|record| (record.place, record)).collect();
    let (mut faults, mut ids): (_, HashMap<&str, BTreeSet<&str>>) = (Vec::new(), HashMap::new());
    for event in &evidence.undelivered {
        ids.entry(&event.message_id).or_default().insert(&event.id);
        let receiver = |record: &Record| record.key.split(' ').next() == Some(&event.receiver);
        let named = |record: &Record| {
            let key = event.name.as_ref().map(|name| (format!("{} {}", name.receiver, name.sender), Some(name.number)));
            key.is_none_or(|(key, number)| record.key == key && record.number == number)
        };
        let fits = |record: &&Record| record.id == event.message_id && receiver(record) && named(record);
        if by_place.get(&event.place).copied().filter(fits).is_none() {
            faults
                .push(format!("{event:?} does not match the record at its position: {:?}", by_place.get(&event.place)));
        }
        let due_ms = event.stored_ms + UNDELIVERED_AFTER_MS;
        if event.at_ms < due_ms {
            faults.push(format!("{event:?} is early: it is due at {due_ms} ms"));
        }
        let known = |at: i64| at >= event.place.1;
        let delivered = evidence
            .noted
            .iter()
            .take_while(|noted| (noted.at_ms as i64) < due_ms)
            .any(|noted| noted.places.get(&event.receiver).copied().is_some_and(known));
        if delivered {
            faults.push(format!("{event:?} was known to be delivered before {due_ms} ms"));
        }
    }
    let twice = ids.iter().filter(|(_, ids)| ids.len() > 1);
    faults.extend(twice.map(|(message, ids)| format!("message {message} is announced under {ids:?}")));
    faults.extend(unannounced(evidence, log, &ids));
    faults
}

/// Finds messages without an event that the search passed while the receiver's cursor was before
/// them, and partitions that the search has not finished.
fn unannounced(evidence: &Evidence, log: &[Record], announced: &HashMap<&str, BTreeSet<&str>>) -> Vec<String> {
    let (mut faults, mut seen) = (Vec::new(), BTreeSet::new());
    for record in log.iter().filter(|record| seen.insert(record.id.as_str())) {
        let (partition, offset) = record.place;
        let passed = |next: &BTreeMap<i32, i64>| next.get(&partition).is_some_and(|next| *next > offset);
        let first = evidence.searched.partition_point(|searched| !passed(&searched.next));
        let Some(searched) = evidence.searched.get(first) else { continue };
        let receiver = record.key.split(' ').next().unwrap_or_default();
        let away = searched.cursors.get(receiver).is_none_or(|cursor| *cursor < offset);
        if away && !announced.contains_key(record.id.as_str()) {
            let cursor = searched.cursors.get(receiver);
            faults.push(format!(
                "{record:?} has no event; the cursor of {receiver} was {cursor:?} when the search passed it"
            ));
        }
    }
    let ends = evidence.ends.get(&Topic::Chat).into_iter().flatten().filter(|(_, end)| **end > 0);
    let last = evidence.searched.last().map(|searched| &searched.next);
    for (partition, end) in ends {
        let next = last.and_then(|next| next.get(partition));
        if next.is_none_or(|next| next < end) {
            faults.push(format!(
                "the search for undelivered messages is at {next:?} in partition {partition}, which ends at {end}"
            ));
        }
    }
    faults
}
