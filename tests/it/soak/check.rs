//! The judge: the rules that the evidence must satisfy, whatever failed during the run.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
};

use super::{
    feeds,
    history::{backward, histories},
    ledger::{Evidence, Kind, Place, Record, Topic, Verdict, Write},
    present, received, recovery,
};

/// A violation of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// One of [`RULES`].
    pub rule: &'static str,
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.rule, self.detail)
    }
}

pub const LOST: &str = "an acknowledged write is at the position in its response";
pub const LEAKED: &str = "a refused write is not stored";
pub const REPEATED: &str = "a write is stored at most as often as it was sent, under one id";
pub const ORDER: &str = "acknowledged writes of a key are in the log in the order in which they were sent";
pub const VIEW: &str = "the view equals the state that the topic defines";
pub const SIGHT: &str = "no reader sees an older state than before, or than it asked for";
pub const DELIVERED: &str = "every record reaches the target or the dead letters";
pub const DELIVERY_ORDER: &str = "a record is first delivered after all earlier records of its key are settled";
pub const COMMITTED: &str = "no record below a committed offset is missing at the sink";
pub const CAUGHT_UP: &str = "at the end everything is committed";
pub const COMMENTS: &str = "every acknowledged comment is listed exactly once";
pub const STREAMED: &str = "a live stream has each comment once, in the order of its post";
pub const FOREIGN: &str = "no device gets a message of another receiver";
pub const MAILBOX: &str = "a device gets each message of its receiver once, in order";
pub const PLACE: &str = "a device without its own position begins at its receiver's cursor";
pub const HISTORY: &str = "a receiver's history has each of its messages once, in order";
pub const FEED: &str = "at the end a feed has the posts of all authors that its reader follows, newest first";
pub const PAGE: &str = "no page of a feed shows an unknown, deleted, repeated or unfollowed post";
pub const PRESENCE: &str = "presence changes alternate, each has one event id, and the last one is the actual state";
pub const UNDELIVERED: &str =
    "a message is announced as undelivered, under one id, if and only if it was not delivered in time";
pub const RECOVERY: &str = "service is back after a fault within its bound";
pub const LETTERS: &str = "postrider's own topics have no dead letters";
pub const INCIDENT: &str =
    "no process dies, panics, exceeds its memory limit or returns a response that is not allowed";

/// All rules.
pub const RULES: [&str; 23] = [
    LOST,
    LEAKED,
    REPEATED,
    ORDER,
    VIEW,
    SIGHT,
    DELIVERED,
    DELIVERY_ORDER,
    COMMITTED,
    CAUGHT_UP,
    COMMENTS,
    STREAMED,
    FOREIGN,
    MAILBOX,
    PLACE,
    HISTORY,
    FEED,
    PAGE,
    PRESENCE,
    UNDELIVERED,
    RECOVERY,
    LETTERS,
    INCIDENT,
];

fn named(rule: &'static str, details: impl IntoIterator<Item = String>) -> Vec<Finding> {
    details.into_iter().map(|detail| Finding { rule, detail }).collect()
}

/// Checks the rules that hold at any time, however far behind the sinks are.
pub fn at_any_time(evidence: &Evidence) -> Vec<Finding> {
    let mut found = named(INCIDENT, evidence.incidents.iter().cloned());
    let index = Index::of(evidence);
    found.extend(named(LEAKED, leaked(evidence, &index)));
    found.extend(named(REPEATED, repeated(evidence, &index)));
    found.extend(named(ORDER, disordered(evidence, &index)));
    found.extend(named(FOREIGN, received::foreign(evidence)));
    found.extend(named(LEAKED, feeds::leaked(evidence)));
    found.extend(named(REPEATED, feeds::repeated(evidence)));
    found.extend(named(ORDER, feeds::disordered(evidence)));
    found
}

/// Checks all rules, once everything has caught up.
pub fn in_the_end(evidence: &Evidence) -> Vec<Finding> {
    let mut found = at_any_time(evidence);
    found.extend(named(LOST, lost(evidence, &Index::of(evidence))));
    found.extend(named(VIEW, view(evidence)));
    let log = evidence.logs.get(&Topic::Messages).map_or(&[][..], Vec::as_slice);
    found.extend(named(SIGHT, backward(&evidence.sights, &histories(log))));
    found.extend(named(DELIVERED, undelivered(evidence)));
    found.extend(named(DELIVERY_ORDER, overtaken(evidence)));
    found.extend(named(COMMITTED, ahead(evidence)));
    found.extend(named(CAUGHT_UP, behind(evidence)));
    found.extend(named(COMMENTS, received::comments(evidence)));
    found.extend(named(STREAMED, received::streamed(evidence)));
    let (sequence, place) = received::messages(evidence);
    found.extend(named(MAILBOX, sequence));
    found.extend(named(PLACE, place));
    found.extend(named(HISTORY, received::history(evidence)));
    found.extend(named(LOST, feeds::lost(evidence)));
    found.extend(named(FEED, feeds::feeds(evidence)));
    found.extend(named(PAGE, feeds::pages(evidence)));
    found.extend(named(PRESENCE, present::presence(evidence)));
    found.extend(named(UNDELIVERED, present::undelivered(evidence)));
    found.extend(named(RECOVERY, recovery::late(evidence)));
    let letters = evidence.logs.get(&Topic::Events).into_iter().flatten();
    found.extend(named(LETTERS, letters.map(|letter| format!("{letter:?}"))));
    found
}

/// Records by the write that they belong to, without the projection's own records.
struct Index<'a> {
    numbered: HashMap<(Topic, &'a str, u64), Vec<&'a Record>>,
    /// The distinct ids of the tombstones of each key, and the number of tombstones.
    deleted: HashMap<&'a str, (HashSet<&'a str>, usize)>,
}

impl<'a> Index<'a> {
    fn of(evidence: &'a Evidence) -> Self {
        let mut index = Self { numbered: HashMap::new(), deleted: HashMap::new() };
        for topic in [Topic::Messages, Topic::Orders, Topic::Comments, Topic::Chat] {
            for record in evidence.logs.get(&topic).into_iter().flatten().filter(|record| record.version.is_none()) {
                match record.number {
                    Some(number) => index.numbered.entry((topic, &record.key, number)).or_default().push(record),
                    None => {
                        let (ids, count) = index.deleted.entry(&record.key).or_default();
                        ids.insert(&record.id);
                        *count += 1;
                    }
                }
            }
        }
        index
    }

    fn records(&self, write: &'a Write) -> &[&'a Record] {
        self.numbered.get(&(write.kind.topic(), write.key.as_str(), write.number)).map_or(&[], Vec::as_slice)
    }
}

pub fn describe(write: &Write) -> String {
    format!("{:?} {} #{} sent at {} ms: {:?}", write.kind, write.key, write.number, write.sent_ms, write.attempts)
}

fn lost(evidence: &Evidence, index: &Index<'_>) -> Vec<String> {
    let mut places: HashMap<(Topic, Place), &Record> = HashMap::new();
    for (topic, log) in &evidence.logs {
        places.extend(log.iter().map(|record| ((*topic, record.place), record)));
    }
    let there = |write: &Write, place: Place| {
        let expected = (write.kind != Kind::Delete).then_some(write.number);
        places.get(&(write.kind.topic(), place)).is_some_and(|found| found.key == write.key && found.number == expected)
    };
    let missing = |write: &&Write| match write.kind {
        // Their responses have no position.
        Kind::Comment | Kind::Message => write.verdict() == Verdict::Acknowledged && index.records(write).is_empty(),
        _ => write.places().any(|place| !there(write, place)),
    };
    evidence.writes.iter().filter(missing).map(describe).collect()
}

fn leaked(evidence: &Evidence, index: &Index<'_>) -> Vec<String> {
    let refused =
        evidence.writes.iter().filter(|write| !write.attempts.is_empty() && write.verdict() == Verdict::Refused);
    refused
        .filter_map(|write| {
            let found = index.records(write).first().filter(|_| write.kind != Kind::Delete)?;
            Some(format!("{}, but it is at {:?}", describe(write), found.place))
        })
        .collect()
}

fn repeated(evidence: &Evidence, index: &Index<'_>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut explained: HashSet<(Topic, &str, u64)> = HashSet::new();
    let mut deletes: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for write in &evidence.writes {
        if write.kind == Kind::Delete {
            let (writes, attempts) = deletes.entry(&write.key).or_default();
            *writes += usize::from(write.possible() > 0);
            *attempts += write.possible();
            continue;
        }
        explained.insert((write.kind.topic(), &write.key, write.number));
        let records = index.records(write);
        let ids: BTreeSet<&str> = records.iter().map(|record| record.id.as_str()).collect();
        let too_many = records.len() > write.possible();
        // Refused writes belong to another rule.
        if write.possible() > 0 && (too_many || ids.len() > 1) {
            let places: Vec<_> = records.iter().map(|record| record.place).collect();
            faults.push(format!("{}, but it is at {places:?} with {} ids", describe(write), ids.len()));
        }
    }
    for (key, (ids, tombstones)) in &index.deleted {
        let (writes, attempts) = deletes.get(key).copied().unwrap_or_default();
        if ids.len() > writes || *tombstones > attempts {
            faults.push(format!(
                "{key} has {tombstones} tombstones with {} ids, for {writes} deletes in {attempts} attempts",
                ids.len()
            ));
        }
    }
    let strangers = index.numbered.iter().filter(|(name, _)| !explained.contains(*name));
    faults.extend(strangers.map(|(_, records)| format!("no client wrote {:?}", records[0])));
    faults
}

fn disordered(evidence: &Evidence, index: &Index<'_>) -> Vec<String> {
    let mut last: HashMap<(Topic, &str, i32), (u64, i64)> = HashMap::new();
    let mut faults = Vec::new();
    // Writes of a key are in the ledger in the order in which they were sent.
    for write in evidence.writes.iter().filter(|write| write.verdict() == Verdict::Acknowledged) {
        let Some(first) = index.records(write).iter().map(|record| record.place).min_by_key(|place| place.1) else {
            continue;
        };
        let (partition, offset) = first;
        let before = last.insert((write.kind.topic(), &write.key, partition), (write.number, offset));
        if let Some((number, before)) = before.filter(|(_, before)| *before > offset) {
            faults.push(format!("{}, but it is at {first:?}, before #{number} at {before}", describe(write)));
        }
    }
    faults
}

fn view(evidence: &Evidence) -> Vec<String> {
    let log = evidence.logs.get(&Topic::Messages).map_or(&[][..], Vec::as_slice);
    let last_words: HashMap<&str, Option<u64>> =
        log.iter().map(|record| (record.key.as_str(), record.number)).collect();
    let mut faults = Vec::new();
    for (key, history) in histories(log) {
        let (expected, found) = (history.last(), evidence.view.get(key).copied().flatten());
        if found != expected {
            faults.push(format!("{key} is {found:?} in the view, expected {expected:?}"));
        }
        // An expired value gets its tombstone a moment later.
        if last_words[key] != expected {
            faults.push(format!("{key} is {:?} in the topic's last record, expected {expected:?}", last_words[key]));
        }
    }
    faults
}

fn given_up(evidence: &Evidence) -> HashSet<Place> {
    evidence.logs.get(&Topic::Deliveries).into_iter().flatten().filter_map(|letter| letter.origin).collect()
}

fn undelivered(evidence: &Evidence) -> Vec<String> {
    let (letters, mut taken) = (given_up(evidence), HashMap::new());
    let mut faults = Vec::new();
    for delivery in evidence.deliveries.iter().filter(|delivery| delivery.taken) {
        taken.insert(delivery.place, (&delivery.key, delivery.number));
    }
    for record in evidence.logs.get(&Topic::Orders).into_iter().flatten() {
        match taken.remove(&record.place) {
            Some(found) if found == (&record.key, record.number) => {}
            Some(found) => faults.push(format!("{record:?} was delivered as {found:?}")),
            None if letters.contains(&record.place) => {}
            None => faults.push(format!("{record:?} was neither accepted nor dead-lettered")),
        }
    }
    faults
        .extend(taken.into_keys().map(|place| format!("the target accepted {place:?}, which the topic does not have")));
    faults
}

/// Finds first deliveries of records while an earlier record of the key was not settled.
fn overtaken(evidence: &Evidence) -> Vec<String> {
    let letters = given_up(evidence);
    // For each partition and key: the highest offset delivered, and the offsets that are not settled.
    let mut keys: HashMap<(i32, &str), (i64, BTreeSet<i64>)> = HashMap::new();
    let (mut seen, mut faults) = (HashSet::new(), Vec::new());
    for delivery in &evidence.deliveries {
        let (partition, offset) = delivery.place;
        let (newest, open) = keys.entry((partition, &delivery.key)).or_insert((-1, BTreeSet::new()));
        let first = seen.insert(delivery.place);
        if offset > *newest {
            let waiting: Vec<i64> =
                open.iter().copied().filter(|&before| !letters.contains(&(partition, before))).collect();
            if !waiting.is_empty() {
                faults.push(format!("{delivery:?} arrived while {waiting:?} of its key were not settled"));
            }
            *newest = offset;
            open.insert(offset);
        } else if first {
            faults.push(format!("{delivery:?} first arrived after offset {newest} of its key"));
        }
        if delivery.taken {
            open.remove(&offset);
        }
    }
    faults
}

/// Finds samples in which a commit is ahead of its sink.
fn ahead(evidence: &Evidence) -> Vec<String> {
    let letters = given_up(evidence);
    let mut faults = Vec::new();
    // The records accepted up to a sample, and for each partition the first offset that is not settled.
    let (mut taken, mut whole): (HashSet<Place>, BTreeMap<i32, i64>) = Default::default();
    let mut counted = 0;
    for commit in &evidence.commits {
        for (partition, reached) in &commit.reached {
            if let Some(offset) = commit.offsets.get(partition).filter(|offset| *offset > reached) {
                faults.push(format!(
                    "{} {partition}: {offset} was committed at {} ms, but the sink was only at {reached}",
                    commit.topic.name(),
                    commit.at_ms
                ));
            }
        }
        if commit.topic != Topic::Orders {
            continue;
        }
        let more = evidence.deliveries.iter().take(commit.deliveries).skip(counted);
        taken.extend(more.filter(|delivery| delivery.taken).map(|delivery| delivery.place));
        counted = counted.max(commit.deliveries);
        for (&partition, &offset) in &commit.offsets {
            let whole = whole.entry(partition).or_default();
            let settled = |at: i64| taken.contains(&(partition, at)) || letters.contains(&(partition, at));
            while *whole < offset && settled(*whole) {
                *whole += 1;
            }
            if *whole < offset {
                faults.push(format!(
                    "orders {partition}: {offset} was committed at {} ms, but {whole} was not settled",
                    commit.at_ms
                ));
            }
        }
    }
    faults
}

/// Finds groups that have not committed all of their topic, or for which this is unknown.
fn behind(evidence: &Evidence) -> Vec<String> {
    let mut last: BTreeMap<Topic, &BTreeMap<i32, i64>> = BTreeMap::new();
    for commit in &evidence.commits {
        last.insert(commit.topic, &commit.offsets);
    }
    let mut faults = Vec::new();
    let has_records = |topic: &Topic| match topic {
        Topic::Posts => !evidence.posts.is_empty(),
        _ => evidence.logs.get(topic).is_some_and(|log| !log.is_empty()),
    };
    for topic in super::GROUPS.map(|(topic, _)| topic).into_iter().filter(has_records) {
        let (Some(offsets), Some(ends)) = (last.get(&topic), evidence.ends.get(&topic)) else {
            faults.push(format!("the end offsets of {}, or its commits, are unknown", topic.name()));
            continue;
        };
        for (partition, end) in ends {
            let committed = offsets.get(partition).copied().unwrap_or(0);
            if committed != *end {
                faults.push(format!("{} {partition} ends at {end}, but {committed} is committed", topic.name()));
            }
        }
    }
    faults
}
