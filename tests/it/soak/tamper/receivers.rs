//! Tampering with messages to receivers, with presence, and with undelivered messages.

use std::collections::HashMap;

use super::{Named, acknowledged, log, new_id};
use crate::{
    harness::{
        mailbox::Noted,
        sessions::{Got, Name, Session},
    },
    soak::{
        check,
        events::{Presence, Undelivered},
        ledger::{Evidence, Kind, Place, Record, Topic},
        present::{UNDELIVERED_AFTER_MS, unknown_ends},
    },
};

pub const TAMPERS: [Named; 19] = [
    ("an acknowledged message is not in the log", check::LOST, |evidence| {
        let write = evidence.writes[acknowledged(evidence, Kind::Message)].clone();
        log(evidence, Topic::Chat).retain(|record| record.number != Some(write.number) || record.key != write.key);
    }),
    ("a device does not get a message", check::MAILBOX, |evidence| {
        middle(evidence, true).got.remove(1);
    }),
    ("a plain client does not get a message", check::MAILBOX, |evidence| {
        middle(evidence, false).got.remove(1);
    }),
    ("a device gets a message twice", check::MAILBOX, |evidence| {
        let got = &mut middle(evidence, true).got;
        got.insert(1, got[1].clone());
    }),
    ("a device gets two messages in the other order", check::MAILBOX, |evidence| middle(evidence, true).got.swap(0, 1)),
    ("a device is notified of a gap that does not exist", check::MAILBOX, |evidence| {
        let got = &mut middle(evidence, true).got;
        got.insert(1, Got { name: None, at_ms: got[1].at_ms });
    }),
    ("a device gets a message of another receiver", check::FOREIGN, |evidence| {
        let device = middle(evidence, true);
        let receiver = device.receiver.clone();
        let other = evidence.sessions.iter().find(|other| other.receiver != receiver && !other.got.is_empty());
        let strange = other.expect("devices of several receivers").got[0].clone();
        middle(evidence, true).got.insert(1, strange);
    }),
    ("a plain client begins after a message that no device got", check::PLACE, |evidence| {
        let begin = |session: &&Session| {
            let first = session.got.first().and_then(|got| got.name.as_ref())?;
            before(evidence, first)
        };
        let plain = evidence.sessions.iter().rev().filter(|session| !session.style.has_own_place());
        let missed =
            plain.filter_map(|session| begin(&session)).next().expect("a message before a plain client's first");
        for session in evidence.sessions.iter_mut().filter(|session| session.style.moves_cursor()) {
            session.got.retain(|got| got.name.as_ref() != Some(&missed));
        }
    }),
    ("a plain client gets a message before its cursor again", check::PLACE, |evidence| {
        let plain = evidence.sessions.iter().rev().filter(|session| !session.style.has_own_place());
        let first = plain.filter_map(|session| Some((session.asked_ms, session.got.first()?.name.clone()?))).next();
        let (at_ms, name) = first.expect("a plain client with messages");
        let (_, offset) = place(evidence, &name).expect("its position");
        let at = evidence.noted.partition_point(|noted| noted.at_ms <= at_ms);
        let mut places = at.checked_sub(1).map(|at| evidence.noted[at].places.clone()).unwrap_or_default();
        places.insert(name.receiver, offset);
        evidence.noted.insert(at, Noted { at_ms, places });
    }),
    ("the history has a message twice", check::HISTORY, |evidence| {
        let history = evidence.mailboxes.values_mut().find(|history| !history.is_empty()).expect("a history");
        history.insert(1, history[0].clone());
    }),
    ("a disconnection has no event", check::PRESENCE, |evidence| {
        let unknown = unknown_ends(evidence);
        let mut before: HashMap<&str, i64> = HashMap::new();
        let mut missing = None;
        for one in &evidence.presence {
            let receiver = one.change.receiver.as_str();
            // Skip disconnections that no process can know of.
            let since_ms = before.insert(receiver, one.at_ms);
            let known = since_ms.is_some_and(|since_ms| unknown.iter().all(|(_, to_ms)| since_ms > *to_ms));
            if known && !one.change.connected {
                missing = Some(one.change.id.clone());
            }
        }
        let missing = missing.expect("a disconnection");
        evidence.presence.retain(|one| one.change.id != missing);
    }),
    ("a connection has no event", check::PRESENCE, |evidence| {
        let connected = |one: &&Presence| one.change.connected;
        let last = evidence.presence.iter().rfind(connected).cloned().expect("a connection").change;
        evidence.presence.retain(|one| one.change.id != last.id);
    }),
    ("a duplicate of a presence change has another id", check::PRESENCE, |evidence| {
        let mut again = evidence.presence.last().cloned().expect("a change");
        again.change.id = new_id();
        evidence.presence.push(again);
    }),
    ("a disconnected receiver counts as connected", check::PRESENCE, |evidence| {
        let away = evidence.present.values_mut().find(|said| said.is_none());
        *away.expect("a disconnected receiver") = Some(1);
    }),
    ("a connection that has ended is still counted", check::PRESENCE, |evidence| {
        let count = evidence.present.values_mut().flatten().next();
        *count.expect("a receiver that is connected") += 1;
    }),
    ("a message that no device got is not announced", check::UNDELIVERED, |evidence| {
        let message = sure(evidence).expect("a message that must be announced").message_id.clone();
        evidence.undelivered.retain(|event| event.message_id != message);
    }),
    ("a message is announced under two ids", check::UNDELIVERED, |evidence| {
        let again = evidence.undelivered.last().cloned().expect("an event");
        evidence.undelivered.push(Undelivered { id: new_id(), ..again });
    }),
    ("a message is announced before its time", check::UNDELIVERED, |evidence| {
        let event = evidence.undelivered.last_mut().expect("an event");
        event.at_ms = event.stored_ms + UNDELIVERED_AFTER_MS - 20;
    }),
    ("a message that was delivered in time is announced", check::UNDELIVERED, |evidence| {
        // Announces the first delivered message of a receiver, as if it had been stored after its delivery.
        let (at_ms, receiver, offset) = noted(evidence).expect("a receiver whose messages were delivered");
        let of_receiver =
            |record: &&Record| record.key.split(' ').next() == Some(&receiver) && record.place.1 <= offset;
        let record = log(evidence, Topic::Chat).iter().find(of_receiver).cloned().expect("its message");
        let (key, stored_ms) = (record.key.clone(), at_ms as i64);
        let name = key.split_once(' ').zip(record.number);
        let name = name.map(|((receiver, sender), number)| Name {
            receiver: receiver.to_owned(),
            sender: sender.to_owned(),
            number,
        });
        evidence.undelivered.push(Undelivered {
            id: new_id(),
            message_id: record.id,
            receiver,
            place: record.place,
            name,
            stored_ms,
            at_ms: stored_ms + UNDELIVERED_AFTER_MS + 1_000,
        });
    }),
];

/// Returns a connection with several messages, of a device with or without its own position.
fn middle(evidence: &mut Evidence, own_place: bool) -> &mut Session {
    let several = |session: &&mut Session| session.style.has_own_place() == own_place && session.got.len() > 2;
    evidence.sessions.iter_mut().rev().find(several).expect("a connection with several messages")
}

/// Returns a message's position in the topic.
fn place(evidence: &Evidence, name: &Name) -> Option<Place> {
    let key = format!("{} {}", name.receiver, name.sender);
    let log = evidence.logs.get(&Topic::Chat)?;
    log.iter().find(|record| record.key == key && record.number == Some(name.number)).map(|record| record.place)
}

/// Returns the previous message of the same receiver.
fn before(evidence: &Evidence, name: &Name) -> Option<Name> {
    let (partition, offset) = place(evidence, name)?;
    let of_receiver = |record: &&Record| record.key.split(' ').next() == Some(&name.receiver);
    let earlier = |record: &&Record| record.place.0 == partition && record.place.1 < offset;
    let log = evidence.logs.get(&Topic::Chat)?;
    let record = log.iter().filter(of_receiver).filter(earlier).max_by_key(|record| record.place.1)?;
    let (receiver, sender) = record.key.split_once(' ')?;
    let found = Name { receiver: receiver.to_owned(), sender: sender.to_owned(), number: record.number? };
    // Skip duplicates of an earlier record.
    (place(evidence, &found) == Some(record.place)).then_some(found)
}

/// Returns the event of a message that must have one because its receiver never got it.
fn sure(evidence: &Evidence) -> Option<&Undelivered> {
    let last = &evidence.searched.last()?.cursors;
    evidence.undelivered.iter().rfind(|event| last.get(&event.receiver).is_none_or(|cursor| *cursor < event.place.1))
}

/// Returns the time at which some messages of a receiver were known to be delivered, the receiver,
/// and its cursor.
fn noted(evidence: &Evidence) -> Option<(u64, String, i64)> {
    evidence.noted.iter().find_map(|noted| {
        let (receiver, offset) = noted.places.iter().find(|(_, offset)| **offset >= 0)?;
        Some((noted.at_ms, receiver.clone(), *offset))
    })
}
