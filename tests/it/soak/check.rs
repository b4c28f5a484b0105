//! The judge: what must hold of the evidence, whatever failed while it was gathered.

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

/// Something that must not be.
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

pub const LOST: &str = "an acknowledged write is where its answer said";
pub const LEAKED: &str = "a refused write appears nowhere";
pub const REPEATED: &str = "a write is stored no more often than it was sent, under one id";
pub const ORDER: &str = "acknowledged writes of a key are in the log in their order";
pub const VIEW: &str = "the view is what the topic says";
pub const SIGHT: &str = "no reader sees a value go back, or misses what it asked for";
pub const DELIVERED: &str = "every record reaches the target or the dead letters";
pub const DELIVERY_ORDER: &str = "a record is delivered first when those before it of its key are settled";
pub const COMMITTED: &str = "nothing below a committed offset is missing at the sink";
pub const CAUGHT_UP: &str = "in the end everything is committed";
pub const COMMENTS: &str = "every acknowledged comment is listed exactly once";
pub const STREAMED: &str = "a stream of comments has each once and in the order of its post";
pub const FOREIGN: &str = "no device gets what is for somebody else";
pub const MAILBOX: &str = "a device gets each message of its receiver once and in order";
pub const PLACE: &str = "a device without a place of its own begins at its receiver's cursor";
pub const HISTORY: &str = "a receiver's history has each of its messages once and in order";
pub const FEED: &str = "in the end a feed has the posts of all whom its reader follows, newest first";
pub const PAGE: &str = "no page of a feed shows what it must not";
pub const PRESENCE: &str = "every change of presence is told once, and the last one is what is so";
pub const UNDELIVERED: &str = "a message that its receiver did not get in time is announced once, and no other is";
pub const RECOVERY: &str = "service is back in time after a fault";
pub const LETTERS: &str = "nothing of ours is dead-lettered";
pub const INCIDENT: &str = "no process dies, panics, swells, or answers what it must not";

/// All that must hold.
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

/// What must hold at any time, however far behind the sinks are.
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

/// What must hold once everything has settled.
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

/// Records by what they are a record of; the projection's own are left out.
struct Index<'a> {
    numbered: HashMap<(Topic, &'a str, u64), Vec<&'a Record>>,
    /// Ids of the tombstones of each key, each once, and how many tombstones there are.
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
        // Their answers do not say where.
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
            Some(format!("{}, and is at {:?}", describe(write), found.place))
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
        // What was refused is another rule's.
        if write.possible() > 0 && (too_many || ids.len() > 1) {
            let places: Vec<_> = records.iter().map(|record| record.place).collect();
            faults.push(format!("{}, and is at {places:?} with {} ids", describe(write), ids.len()));
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
    faults.extend(strangers.map(|(_, records)| format!("nobody wrote {:?}", records[0])));
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
            faults.push(format!("{}, is at {first:?}, before #{number} at {before}", describe(write)));
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
            faults.push(format!("{key} is {found:?} in the view, and should be {expected:?}"));
        }
        // A value that ended by itself has its tombstone a moment later.
        if last_words[key] != expected {
            faults
                .push(format!("{key} is {:?} in the topic's last record, and should be {expected:?}", last_words[key]));
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
            None => faults.push(format!("{record:?} was neither taken nor given up")),
        }
    }
    faults.extend(taken.into_keys().map(|place| format!("the target took {place:?}, which the topic does not have")));
    faults
}

/// First deliveries that came while an earlier record of their key was not settled.
fn overtaken(evidence: &Evidence) -> Vec<String> {
    let letters = given_up(evidence);
    // Of each partition and key: the last offset that was tried, and those that are not settled.
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
                faults.push(format!("{delivery:?} came while {waiting:?} of its key were not settled"));
            }
            *newest = offset;
            open.insert(offset);
        } else if first {
            faults.push(format!("{delivery:?} came first after offset {newest} of its key"));
        }
        if delivery.taken {
            open.remove(&offset);
        }
    }
    faults
}

/// Samples in which a commit was further than its sink.
fn ahead(evidence: &Evidence) -> Vec<String> {
    let letters = given_up(evidence);
    let mut faults = Vec::new();
    // Per partition: what is taken up to a sample, and how far nothing is missing.
    let (mut taken, mut whole): (HashSet<Place>, BTreeMap<i32, i64>) = Default::default();
    let mut counted = 0;
    for commit in &evidence.commits {
        for (partition, reached) in &commit.reached {
            if let Some(offset) = commit.offsets.get(partition).filter(|offset| *offset > reached) {
                faults.push(format!(
                    "{} {partition}: {offset} was committed at {} ms, and the sink had what is below {reached}",
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
                    "orders {partition}: {offset} was committed at {} ms, and {whole} was not settled",
                    commit.at_ms
                ));
            }
        }
    }
    faults
}

/// Groups that have not committed all of their topic, or of which that could not be seen.
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
            faults.push(format!("where {} ends, or what is committed of it, was not seen", topic.name()));
            continue;
        };
        for (partition, end) in ends {
            let committed = offsets.get(partition).copied().unwrap_or(0);
            if committed != *end {
                faults.push(format!("{} {partition} ends at {end}, and {committed} is committed", topic.name()));
            }
        }
    }
    faults
}
