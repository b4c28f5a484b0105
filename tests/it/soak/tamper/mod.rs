//! Ways to tamper with good evidence so that it looks like the product's own fault. Each rule has
//! at least one.

mod feeds;
mod receivers;

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::{
    check,
    ledger::{Commit, Delivery, Evidence, Kind, Outcome, Place, Record, Sight, Topic, Verdict, Write},
};

pub type Tamper = fn(&mut Evidence);
/// A description, the rule that must report the change, and the function that makes it.
type Named = (&'static str, &'static str, Tamper);

/// Returns all tampers.
pub fn all() -> impl Iterator<Item = Named> {
    WRITES.into_iter().chain(receivers::TAMPERS).chain(feeds::TAMPERS)
}

/// Tampers with topics, the view, deliveries, commits and comments.
const WRITES: [Named; 19] = [
    ("an acknowledged push is not in the log", check::LOST, |evidence| {
        let write = acknowledged(evidence, Kind::Push);
        let place = evidence.writes[write].places().next();
        log(evidence, Topic::Messages).retain(|record| Some(record.place) != place);
    }),
    ("an acknowledged comment is not in the log", check::LOST, |evidence| {
        let write = evidence.writes[acknowledged(evidence, Kind::Comment)].clone();
        log(evidence, Topic::Comments).retain(|record| record.number != Some(write.number) || record.key != write.key);
    }),
    ("a refused push is in the log", check::LEAKED, |evidence| {
        let write = acknowledged(evidence, Kind::Push);
        evidence.writes[write].attempts = vec![Outcome::Refused];
    }),
    ("a produced record is stored and delivered once more than it was sent", check::REPEATED, |evidence| {
        let write = evidence.writes[acknowledged(evidence, Kind::Produce)].clone();
        let orders = log(evidence, Topic::Orders);
        let (mut copies, mut found) = (write.possible(), None);
        for record in orders.iter() {
            if record.key == write.key && record.number == Some(write.number) {
                (copies, found) = (copies - 1, Some(record.clone()));
            }
        }
        for _ in 0..=copies {
            store(evidence, Topic::Orders, found.clone().expect("an acknowledged record"));
        }
    }),
    ("a delete is in the log twice, with two ids", check::REPEATED, |evidence| {
        let messages = log(evidence, Topic::Messages);
        let found = messages.iter().find(|record| record.number.is_none() && record.version.is_none()).cloned();
        store(evidence, Topic::Messages, Record { id: new_id(), ..found.expect("a delete") });
    }),
    ("two records of a key are swapped in the log", check::ORDER, |evidence| {
        let [first, second] = neighbours(evidence);
        let orders = log(evidence, Topic::Orders);
        orders.iter_mut().for_each(|record| match record.place {
            place if place == first => record.place = second,
            place if place == second => record.place = first,
            _ => {}
        });
    }),
    ("a key of the view has the value before the last one", check::VIEW, |evidence| {
        let mut before: HashMap<String, Vec<u64>> = HashMap::new();
        for record in log(evidence, Topic::Messages) {
            before.entry(record.key.clone()).or_default().extend(record.number);
        }
        let shown = evidence.view.iter_mut().find_map(|(key, shown)| {
            let number = (*shown)?;
            let older = before.get(key)?.iter().copied().rev().find(|older| *older < number)?;
            Some((shown, older))
        });
        let (shown, older) = shown.expect("a key with several values");
        *shown = Some(older);
    }),
    ("a reader sees a value go back", check::SIGHT, |evidence| {
        let known = evidence.sights.iter().rposition(|sight| sight.saw.is_some_and(|number| number > 5));
        let last = evidence.sights[known.expect("a sight")].clone();
        let earlier =
            log(evidence, Topic::Messages).iter().find(|record| record.key == last.key && record.number.is_some());
        let saw = earlier.and_then(|record| record.number);
        evidence.sights.push(Sight { saw, after: None, ..last });
    }),
    ("a reader misses its own write", check::SIGHT, |evidence| {
        let mut first: BTreeMap<String, (i64, u64)> = BTreeMap::new();
        for record in log(evidence, Topic::Messages).iter().rev() {
            first.extend(record.number.map(|number| (record.key.clone(), (record.place.1, number))));
        }
        let older = |sight: &&mut Sight| first.get(&sight.key).is_some_and(|(offset, _)| Some(*offset) < sight.after);
        let own = evidence.sights.iter_mut().rev().find(older).expect("a reader of its own writes");
        own.saw = Some(first[&own.key].1);
    }),
    ("a delivery is missing", check::DELIVERED, |evidence| {
        let place = evidence.deliveries.iter().rev().find(|delivery| delivery.taken).expect("a delivery").place;
        evidence.deliveries.retain(|delivery| delivery.place != place);
    }),
    ("two deliveries of a key are swapped", check::DELIVERY_ORDER, |evidence| {
        let (mut first, mut taken): (HashMap<Place, usize>, HashMap<Place, usize>) = Default::default();
        for (at, delivery) in evidence.deliveries.iter().enumerate() {
            first.entry(delivery.place).or_insert(at);
            if delivery.taken {
                taken.entry(delivery.place).or_insert(at);
            }
        }
        let later = |(one, at): (&Place, &usize)| {
            let of_key = |other: &&Place| {
                let key = |place: &Place| &evidence.deliveries[first[place]].key;
                other.0 == one.0 && other.1 > one.1 && key(other) == key(one) && first[*other] > *at
            };
            let other = taken.keys().find(of_key)?;
            Some((*at, first[other]))
        };
        let (one, other) = taken.iter().find_map(later).expect("two deliveries of a key");
        evidence.deliveries.swap(one, other);
    }),
    ("a commit is ahead of the target", check::COMMITTED, |evidence| {
        let commit = evidence.commits.iter_mut().rev().find(|commit| commit.topic == Topic::Orders);
        commit.expect("a sample").offsets.values_mut().for_each(|offset| *offset += 1);
    }),
    ("a commit is ahead of the view", check::COMMITTED, |evidence| {
        let sampled = |commit: &&mut Commit| commit.topic == Topic::Messages && !commit.reached.is_empty();
        let commit = evidence.commits.iter_mut().rev().find(sampled).expect("a sample");
        commit.offsets.clone_from(&commit.reached);
        commit.offsets.values_mut().for_each(|offset| *offset += 1);
    }),
    ("a record stays uncommitted", check::CAUGHT_UP, |evidence| {
        let end = evidence.ends.values_mut().flat_map(BTreeMap::values_mut).find(|end| **end > 0);
        *end.expect("a topic with records") += 1;
    }),
    ("the end offsets of topics are unknown", check::CAUGHT_UP, |evidence| evidence.ends.clear()),
    ("a comment is listed twice", check::COMMENTS, |evidence| {
        let first = evidence.listed[0].clone();
        evidence.listed.insert(0, first);
    }),
    ("a live stream lacks a comment", check::STREAMED, |evidence| {
        let listed = evidence.listed[0].clone();
        let streamed = evidence.streamed.values_mut().next().expect("a reader of a live stream");
        streamed.retain(|comment| *comment != listed);
    }),
    ("a push is among the dead letters", check::LETTERS, |evidence| {
        let push = log(evidence, Topic::Messages).last().cloned().expect("a push");
        let letter = Record { place: (0, 0), origin: Some(push.place), ..push };
        evidence.logs.entry(Topic::Events).or_default().push(letter);
    }),
    ("a process dies", check::INCIDENT, |evidence| {
        evidence.incidents.push("processor-1 died unexpectedly with exit status: 101".to_owned());
    }),
];

fn new_id() -> String {
    Uuid::from_u128(fastrand::u128(..)).to_string()
}

fn log(evidence: &mut Evidence, topic: Topic) -> &mut Vec<Record> {
    evidence.logs.get_mut(&topic).expect("a topic with records")
}

/// Appends a record to its partition, and delivers and commits it.
fn store(evidence: &mut Evidence, topic: Topic, mut record: Record) {
    let partition = record.place.0;
    let log = log(evidence, topic);
    let next = log.iter().filter(|known| known.place.0 == partition).map(|known| known.place.1 + 1).max();
    record.place.1 = next.unwrap_or(0);
    log.push(record.clone());
    if topic == Topic::Orders {
        let last_ms = evidence.deliveries.last().map_or(0, |delivery| delivery.at_ms);
        let Record { place, key, number, .. } = record.clone();
        evidence.deliveries.push(Delivery { place, key, number, taken: true, at_ms: last_ms });
    }
    let next = record.place.1 + 1;
    evidence.ends.entry(topic).or_default().insert(partition, next);
    let deliveries = evidence.deliveries.len();
    if let Some(commit) = evidence.commits.iter_mut().rfind(|commit| commit.topic == topic) {
        commit.offsets.insert(partition, next);
        commit.deliveries = deliveries;
        if let Some(reached) = commit.reached.get_mut(&partition) {
            *reached = next;
        }
    }
}

fn acknowledged(evidence: &Evidence, kind: Kind) -> usize {
    let found =
        evidence.writes.iter().rposition(|write| write.kind == kind && write.verdict() == Verdict::Acknowledged);
    found.unwrap_or_else(|| panic!("no {kind:?} was acknowledged"))
}

/// Returns the positions of two produced records of one key.
fn neighbours(evidence: &Evidence) -> [Place; 2] {
    let once = |write: &&Write| write.kind == Kind::Produce && write.possible() == 1 && write.places().count() == 1;
    let mut last: BTreeMap<&str, Place> = BTreeMap::new();
    for write in evidence.writes.iter().filter(once) {
        let place = write.places().next().expect("the position of the only attempt");
        if let Some(before) = last.insert(&write.key, place) {
            return [before, place];
        }
    }
    panic!("no key has two records");
}
