//! The rules for comments and for messages that readers received.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    check::describe,
    ledger::{Evidence, Kind, Topic, Verdict},
};
use crate::harness::{
    mailbox::{self, Breach, Sent, Truth},
    sessions::Name,
};

/// Checks the list of comments at the end.
pub fn comments(evidence: &Evidence) -> Vec<String> {
    let mut listed: HashMap<(&str, u64), usize> = HashMap::new();
    for (key, number) in &evidence.listed {
        *listed.entry((key, *number)).or_default() += 1;
    }
    let mut faults = Vec::new();
    for write in evidence.writes.iter().filter(|write| write.kind == Kind::Comment) {
        let count = listed.remove(&(write.key.as_str(), write.number)).unwrap_or(0);
        let fits = match write.verdict() {
            Verdict::Acknowledged => count == 1,
            Verdict::Refused => count == 0,
            Verdict::Unknown => count <= 1,
        };
        if !fits {
            faults.push(format!("{}, but it is listed {count} times", describe(write)));
        }
    }
    faults.extend(listed.into_keys().map(|comment| format!("no client wrote {comment:?}, which is listed")));
    faults
}

/// Checks the comments that readers of live streams received.
pub fn streamed(evidence: &Evidence) -> Vec<String> {
    let mut faults = Vec::new();
    let listed: HashSet<&(String, u64)> = evidence.listed.iter().collect();
    for (reader, comments) in &evidence.streamed {
        let (mut seen, mut last): (HashSet<_>, HashMap<&str, u64>) = Default::default();
        for comment in comments {
            if !seen.insert(comment) {
                faults.push(format!("{reader} got {comment:?} twice"));
            } else if let Some(before) = last.insert(&comment.0, comment.1).filter(|before| *before > comment.1) {
                faults.push(format!("{reader} got {comment:?} after {before}"));
            }
        }
        // The reader began before the first comment, so it must have all of them.
        let missed = listed.iter().filter(|comment| !seen.contains(**comment));
        faults.extend(missed.map(|comment| format!("{reader} did not get {comment:?}")));
    }
    faults
}

/// Finds messages that reached devices of other receivers.
pub fn foreign(evidence: &Evidence) -> Vec<String> {
    mailbox::foreign(&evidence.sessions).into_iter().map(|(_, what)| what).collect()
}

/// Checks the sequence of messages at devices, and the position at which each connection began.
pub fn messages(evidence: &Evidence) -> (Vec<String>, Vec<String>) {
    let found = mailbox::breaches(&evidence.sessions, &truth(evidence), &evidence.noted);
    let (place, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(|(breach, _)| *breach == Breach::Place);
    let sequence = rest.into_iter().filter(|(breach, _)| *breach == Breach::Sequence);
    (sequence.map(|(_, what)| what).collect(), place.into_iter().map(|(_, what)| what).collect())
}

/// Checks the receivers' histories at the end.
pub fn history(evidence: &Evidence) -> Vec<String> {
    let (truth, none) = (truth(evidence), Vec::new());
    let mut faults = Vec::new();
    for (receiver, sent) in &truth {
        let found = evidence.mailboxes.get(receiver).unwrap_or(&none);
        let differs = sent.iter().zip(found).position(|(sent, found)| sent.name != *found);
        let at = differs.unwrap_or(sent.len().min(found.len()));
        if differs.is_some() || sent.len() != found.len() {
            let (expected, found) = (sent.get(at).map(|sent| &sent.name), found.get(at));
            faults.push(format!("the history of {receiver} has {found:?} at {at}, expected {expected:?}"));
        }
    }
    let strange =
        evidence.mailboxes.iter().filter(|(receiver, found)| !found.is_empty() && !truth.contains_key(*receiver));
    faults.extend(strange.map(|(receiver, found)| format!("no client wrote to {receiver}, who has {:?}", found[0])));
    faults
}

/// Returns the messages in the topic for each receiver; of duplicates, the first.
fn truth(evidence: &Evidence) -> Truth {
    let (mut truth, mut ids) = (BTreeMap::new(), HashSet::new());
    for record in evidence.logs.get(&Topic::Chat).into_iter().flatten().filter(|record| ids.insert(&record.id)) {
        let Some(((receiver, sender), number)) = record.key.split_once(' ').zip(record.number) else { continue };
        let name = Name { receiver: receiver.to_owned(), sender: sender.to_owned(), number };
        let sent: &mut Vec<Sent> = truth.entry(receiver.to_owned()).or_default();
        sent.push(Sent { name, offset: record.place.1, gone: false });
    }
    truth
}
