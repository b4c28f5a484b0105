//! Faults on purpose in what is judged: each must be found, or the judge is blind.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    check::{self, Finding},
    ledger::{Commit, Evidence, Kind, Outcome, Place, Record, Sight, Topic, Verdict, Write},
};
use crate::harness::{
    mailbox::Noted,
    sessions::{Got, Session, Trick},
};

/// Events of its kind before one of them is tampered with.
const WARM_UP: usize = 20;

/// What is done, once, between the product and a sink, or between a sender and the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inject {
    /// A delivery does not reach the target, and the product believes that it does.
    Drop,
    /// A push is sent twice, and the sender knows of one.
    Duplicate,
    /// Two deliveries of a key change places.
    Swap,
    /// The sender of a stored push is told that it was refused.
    Leak,
    /// The same to what a device gets of its messages.
    Messages(Trick),
}

impl Inject {
    pub fn parse(word: &str) -> Self {
        match word {
            "drop" => Self::Drop,
            "duplicate" => Self::Duplicate,
            "swap" => Self::Swap,
            "leak" => Self::Leak,
            "drop-message" => Self::Messages(Trick::Drop),
            "duplicate-message" => Self::Messages(Trick::Duplicate),
            "swap-messages" => Self::Messages(Trick::Swap),
            "leak-message" => Self::Messages(Trick::Leak),
            _ => panic!("SOAK_INJECT is drop, duplicate, swap, leak, or one of these of messages, not {word}"),
        }
    }

    /// The rule that must be broken by it.
    pub fn breaks(self) -> &'static str {
        match self {
            Self::Drop => check::DELIVERED,
            Self::Duplicate => check::REPEATED,
            Self::Swap => check::DELIVERY_ORDER,
            Self::Leak => check::LEAKED,
            Self::Messages(Trick::Leak) => check::FOREIGN,
            Self::Messages(_) => check::MAILBOX,
        }
    }

    /// What is done to messages, and after how many.
    pub fn trick(self) -> Option<(Trick, usize)> {
        let Self::Messages(trick) = self else { return None };
        Some((trick, WARM_UP))
    }
}

/// Says when to tamper.
#[derive(Clone, Default)]
pub struct Injection {
    what: Option<Inject>,
    left: Arc<AtomicUsize>,
}

impl Injection {
    pub fn new(what: Option<Inject>) -> Self {
        Self { what, left: Arc::new(AtomicUsize::new(WARM_UP)) }
    }

    /// Whether this event is the one; asked once for each event that it could be.
    pub fn now(&self, what: Inject) -> bool {
        self.what == Some(what) && self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

type Tamper = fn(&mut Evidence);

/// One way to tamper with good evidence for each thing that can be wrong, and the rule that must find it.
pub const TAMPERS: [(&str, &str, Tamper); 25] = [
    ("an acknowledged push is not in the log", check::LOST, |evidence| {
        let write = acknowledged(evidence, Kind::Push);
        let place = evidence.writes[write].places().next();
        log(evidence, Topic::Messages).retain(|record| Some(record.place) != place);
    }),
    ("an acknowledged comment is not in the log", check::LOST, |evidence| {
        let write = evidence.writes[acknowledged(evidence, Kind::Comment)].clone();
        log(evidence, Topic::Comments).retain(|record| record.number != Some(write.number) || record.key != write.key);
    }),
    ("a push that is in the log was refused", check::LEAKED, |evidence| {
        let write = acknowledged(evidence, Kind::Push);
        evidence.writes[write].attempts = vec![Outcome::Refused];
    }),
    ("a produced record is in the log twice", check::REPEATED, |evidence| {
        let write = &evidence.writes[acknowledged(evidence, Kind::Produce)];
        let (key, number, possible) = (write.key.clone(), write.number, write.possible());
        let orders = log(evidence, Topic::Orders);
        let found = orders.iter().find(|record| record.key == key && record.number == Some(number)).cloned().unwrap();
        orders.extend(
            (0..possible).map(|more| Record { place: (found.place.0, 1 << 40 | more as i64), ..found.clone() }),
        );
    }),
    ("a delete is in the log twice", check::REPEATED, |evidence| {
        let messages = log(evidence, Topic::Messages);
        let found = messages.iter().find(|record| record.number.is_none() && record.version.is_none()).cloned();
        messages.push(Record { place: (0, 1 << 40), id: "another".into(), ..found.expect("a delete") });
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
    ("a key of the view has an older value", check::VIEW, |evidence| {
        let shown = evidence.view.values_mut().flatten().next().expect("a key with a value");
        *shown -= 1;
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
    ("a delivery is dropped", check::DELIVERED, |evidence| {
        let place = evidence.deliveries.iter().rev().find(|delivery| delivery.taken).expect("a delivery").place;
        evidence.deliveries.retain(|delivery| delivery.place != place);
    }),
    ("two deliveries of a key are swapped", check::DELIVERY_ORDER, |evidence| {
        let last = evidence.deliveries.len() - 1;
        let late = evidence.deliveries[last].clone();
        // Before all others of its key and partition.
        evidence.deliveries.insert(0, late);
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
    ("something stays uncommitted", check::CAUGHT_UP, |evidence| {
        let ends = evidence.ends.values_mut().next().expect("the ends of a topic");
        ends.values_mut().for_each(|end| *end += 1);
    }),
    ("a comment is listed twice", check::COMMENTS, |evidence| {
        let first = evidence.listed[0].clone();
        evidence.listed.push(first);
    }),
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
    ("a device is told of a gap where none is", check::MAILBOX, |evidence| {
        middle(evidence, true).got.insert(1, Got { name: None, at_ms: 0 });
    }),
    ("a device gets another's message", check::FOREIGN, |evidence| {
        let device = middle(evidence, true);
        let receiver = device.receiver.clone();
        let other = evidence.sessions.iter().find(|other| other.receiver != receiver && !other.got.is_empty());
        let strange = other.expect("devices of several receivers").got[0].clone();
        middle(evidence, true).got.insert(1, strange);
    }),
    ("a plain client begins after what nobody had", check::PLACE, |evidence| {
        let fits = |session: &Session| !session.style.has_own_place() && !session.got.is_empty();
        let last = evidence.sessions.iter().rposition(fits).expect("a plain client with messages");
        let receiver = evidence.sessions[last].receiver.clone();
        for (at, session) in evidence.sessions.iter_mut().enumerate() {
            if at != last && session.receiver == receiver && session.style.moves_cursor() {
                session.got.clear();
            }
        }
    }),
    ("a plain client is told again what was noted", check::PLACE, |evidence| {
        let last = evidence.mailboxes.keys().map(|receiver| (receiver.clone(), i64::MAX)).collect();
        evidence.noted = vec![Noted { at_ms: 0, places: last }];
    }),
    ("a message is twice in the history", check::HISTORY, |evidence| {
        let history = evidence.mailboxes.values_mut().find(|history| !history.is_empty()).expect("a history");
        history.push(history[0].clone());
    }),
];

fn log(evidence: &mut Evidence, topic: Topic) -> &mut Vec<Record> {
    evidence.logs.get_mut(&topic).expect("a topic with records")
}

/// A connection that brought several messages, of a device with or without a place of its own.
fn middle(evidence: &mut Evidence, own_place: bool) -> &mut Session {
    let several = |session: &&mut Session| session.style.has_own_place() == own_place && session.got.len() > 2;
    evidence.sessions.iter_mut().rev().find(several).expect("a connection with several messages")
}

fn acknowledged(evidence: &Evidence, kind: Kind) -> usize {
    let found =
        evidence.writes.iter().rposition(|write| write.kind == kind && write.verdict() == Verdict::Acknowledged);
    found.unwrap_or_else(|| panic!("no {kind:?} was acknowledged"))
}

/// Where two produced records of one key are.
fn neighbours(evidence: &Evidence) -> [Place; 2] {
    let once = |write: &&Write| write.kind == Kind::Produce && write.possible() == 1 && write.places().count() == 1;
    let mut last: BTreeMap<&str, Place> = BTreeMap::new();
    for write in evidence.writes.iter().filter(once) {
        let place = write.places().next().expect("the place of the one attempt");
        if let Some(before) = last.insert(&write.key, place) {
            return [before, place];
        }
    }
    panic!("no key has two records");
}

/// Tampers with a copy in each of the ways; returns those that nobody noticed.
pub fn unnoticed(evidence: &Evidence) -> Vec<&'static str> {
    assert_eq!(check::in_the_end(evidence), Vec::<Finding>::new(), "only good evidence can be tampered with");
    let blind = |(what, rule, tamper): &(&'static str, &'static str, Tamper)| {
        let mut copy = evidence.clone();
        tamper(&mut copy);
        let found = check::in_the_end(&copy);
        (!found.iter().any(|finding| finding.rule == *rule)).then_some(*what)
    };
    TAMPERS.iter().filter_map(blind).collect()
}
