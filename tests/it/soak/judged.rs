//! Tests of the judge on artificial evidence: good evidence, and evidence tampered with in each
//! way.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    check::{self, Finding, RULES},
    events::{Page, PostChange, Posted, Presence, Searched, Shown, Undelivered},
    inject::unnoticed,
    ledger::{Commit, Delivery, Evidence, Fault, Kind, Outcome, Place, Record, Sight, Topic, Write},
    tamper,
};
use crate::harness::{
    changes::Change,
    mailbox::Noted,
    sessions::{Got, Name, Session, Style},
};

fn write(kind: Kind, key: &str, number: u64, attempts: &[Outcome]) -> Write {
    let (key, sent_ms, attempts) = (key.to_owned(), number * 60_000, attempts.to_vec());
    Write { kind, key, number, sent_ms, attempts, done_ms: None, post: None }
}

fn record(place: Place, key: &str, number: Option<u64>) -> Record {
    let id = format!("{key} {number:?} {place:?}");
    Record { place, key: key.to_owned(), number, id, version: None, expires: false, origin: None }
}

fn at(offset: i64) -> Outcome {
    Outcome::Acknowledged(Some((0, offset)))
}

fn sight(saw: Option<u64>, after: Option<i64>) -> Sight {
    Sight { reader: "r".into(), key: "k".into(), after, saw, at_ms: 0 }
}

fn delivery(offset: i64, number: u64, taken: bool) -> Delivery {
    Delivery { place: (0, offset), key: "o".into(), number: Some(number), taken, at_ms: 0 }
}

fn commit(topic: Topic, offset: i64, reached: Option<i64>, deliveries: usize) -> Commit {
    let reached = reached.map(|offset| (0, offset)).into_iter().collect();
    Commit { topic, at_ms: 0, offsets: BTreeMap::from([(0, offset)]), reached, deliveries }
}

fn named(number: u64) -> Name {
    let (receiver, sender) = (if number == 1 { "q" } else { "r" }.to_owned(), "s".to_owned());
    Name { receiver, sender, number }
}

/// A connection that receives one message per millisecond.
fn session(device: &str, style: Style, open_ms: u64, numbers: &[u64]) -> Session {
    let got = |(number, after): (&u64, u64)| Got { name: Some(named(*number)), at_ms: open_ms + after };
    let (device, receiver) = (device.to_owned(), device.split('-').next().unwrap_or_default().to_owned());
    let got = numbers.iter().zip(1..).map(got).collect();
    Session { device, receiver, style, asked_ms: open_ms, open_ms, got }
}

/// Adds messages: the first to one receiver, the others, with one duplicate, to another receiver
/// with two devices.
fn with_messages(mut evidence: Evidence) -> Evidence {
    let key = |number: u64| format!("{} s", named(number).receiver);
    let mut log: Vec<Record> = (1..=7).map(|n| record((0, n as i64), &key(n), Some(n))).collect();
    log.insert(4, Record { place: (0, 10), ..log[3].clone() });
    let stored = Outcome::Acknowledged(None);
    let writes = (1..=7).map(|n| {
        let attempts = if n == 4 { &[Outcome::Unknown, stored][..] } else { &[stored] };
        write(Kind::Message, &key(n), n, attempts)
    });
    evidence.writes.splice(0..0, writes);
    evidence.logs.insert(Topic::Chat, log);
    evidence.sessions = vec![
        session("q-plain", Style::Plain, 10, &[1]),
        session("r-cursors", Style::Cursors, 10, &[2, 3]),
        session("r-plain", Style::Plain, 10, &[2, 3, 4, 5]),
        session("r-plain", Style::Plain, 30, &[4, 5, 6, 7]),
        session("r-cursors", Style::Cursors, 40, &[4, 5, 6, 7]),
    ];
    evidence.mailboxes = BTreeMap::from([("q".into(), vec![named(1)]), ("r".into(), (2..=7).map(named).collect())]);
    evidence
}

/// Good evidence with each kind of write, a retry, a duplicate, a refusal and an unknown outcome.
fn good() -> Evidence {
    let (refused, unknown) = (Outcome::Refused, Outcome::Unknown);
    let mut writes: Vec<Write> = (1..=10).map(|n| write(Kind::Push, "k", n, &[at(n as i64 - 1)])).collect();
    writes.push(write(Kind::Delete, "gone", 2, &[at(11)]));
    writes.push(write(Kind::Push, "gone", 1, &[at(10)]));
    writes.push(write(Kind::Push, "k", 11, &[refused, refused]));
    writes.push(write(Kind::Produce, "o", 1, &[at(0)]));
    writes.push(write(Kind::Produce, "o", 2, &[at(1)]));
    writes.push(write(Kind::Produce, "o", 3, &[unknown, at(3)]));
    writes.push(write(Kind::Produce, "o", 4, &[unknown]));
    writes.push(write(Kind::Comment, "p", 1, &[Outcome::Acknowledged(None)]));
    writes.push(write(Kind::Comment, "p", 2, &[unknown]));
    let mut messages: Vec<Record> = (1..=10).map(|n| record((0, n as i64 - 1), "k", Some(n))).collect();
    messages.extend([record((0, 10), "gone", Some(1)), record((0, 11), "gone", None)]);
    let third = record((0, 2), "o", Some(3));
    let orders = vec![
        record((0, 0), "o", Some(1)),
        record((0, 1), "o", Some(2)),
        third.clone(),
        Record { place: (0, 3), ..third },
    ];
    let letter = Record { origin: Some((0, 3)), ..record((0, 0), "letter", Some(3)) };
    let evidence = Evidence {
        writes,
        logs: BTreeMap::from([
            (Topic::Messages, messages),
            (Topic::Orders, orders),
            (Topic::Comments, vec![record((0, 0), "p", Some(1))]),
            (Topic::Deliveries, vec![letter]),
        ]),
        sights: vec![sight(None, None), sight(Some(6), None), sight(Some(7), Some(6)), sight(Some(10), None)],
        deliveries: vec![
            delivery(0, 1, true),
            delivery(1, 2, false),
            delivery(1, 2, true),
            delivery(0, 1, true),
            delivery(2, 3, true),
            delivery(3, 3, false),
        ],
        commits: vec![
            commit(Topic::Orders, 1, None, 2),
            commit(Topic::Messages, 4, Some(9), 0),
            commit(Topic::Messages, 12, Some(12), 0),
            commit(Topic::Orders, 4, None, 6),
            commit(Topic::Comments, 1, None, 6),
            commit(Topic::Chat, 11, None, 6),
            commit(Topic::Posts, 10, None, 6),
        ],
        view: BTreeMap::from([("k".into(), Some(10)), ("gone".into(), None)]),
        listed: vec![("p".into(), 1)],
        streamed: BTreeMap::from([("f".into(), vec![("p".into(), 1)])]),
        ends: [(Topic::Messages, 12), (Topic::Orders, 4), (Topic::Comments, 1), (Topic::Chat, 11), (Topic::Posts, 10)]
            .map(|(topic, end)| (topic, BTreeMap::from([(0, end)])))
            .into(),
        ..Evidence::default()
    };
    with_presence(with_posts(with_messages(evidence)))
}

/// Adds posts of two authors, one of whom a reader follows at the end. One post is deleted, one has
/// a duplicate event, one is refused, and one is unknown.
fn with_posts(mut evidence: Evidence) -> Evidence {
    let (stored, mut sent_ms) = (Outcome::Acknowledged(None), 0);
    let mut write = |kind, key: &str, number, post, attempts: &[Outcome]| {
        sent_ms += 100;
        let done_ms = attempts.contains(&stored).then_some(sent_ms + 50);
        Write { sent_ms, done_ms, post, ..write(kind, key, number, attempts) }
    };
    evidence.writes.extend([
        write(Kind::Follow, "u a", 1, None, &[stored]),
        write(Kind::Post, "a", 2, Some(102), &[stored]),
        write(Kind::Post, "b", 3, Some(103), &[stored]),
        write(Kind::Follow, "u b", 4, None, &[Outcome::Unknown, stored]),
        write(Kind::Unfollow, "u b", 5, None, &[stored]),
        write(Kind::Post, "a", 6, None, &[Outcome::Refused]),
        write(Kind::Post, "a", 7, None, &[Outcome::Unknown]),
        write(Kind::Post, "a", 8, Some(108), &[stored]),
        write(Kind::DeletePost, "a", 2, Some(102), &[stored]),
        write(Kind::Post, "a", 9, Some(109), &[stored]),
        write(Kind::Post, "a", 10, Some(110), &[Outcome::Unknown, stored]),
    ]);
    let event = |offset, author: &str, change: PostChange| {
        let id = format!("{author} {change:?}");
        Posted { place: (0, offset), id, author: author.to_owned(), change }
    };
    let created = |post| PostChange::Created { post, number: post as u64 - 100 };
    let follower = || "u".to_owned();
    evidence.posts = vec![
        event(0, "a", PostChange::Followed { follower: follower() }),
        event(1, "a", created(102)),
        event(2, "b", created(103)),
        event(3, "b", PostChange::Followed { follower: follower() }),
        event(4, "b", PostChange::Unfollowed { follower: follower() }),
        event(5, "a", created(108)),
        event(6, "a", PostChange::Deleted { post: 102 }),
        event(7, "a", created(108)),
        event(8, "a", created(109)),
        event(9, "a", created(110)),
    ];
    let shown = |post| Shown { post, author: "a".to_owned(), number: post as u64 - 100 };
    let page = |reader: &str, asked_ms, posts: &[i64]| {
        let (reader, posts) = (reader.to_owned(), posts.to_vec());
        Page { reader, asked_ms, at_ms: asked_ms + 10, posts }
    };
    evidence.feeds = BTreeMap::from([("u".into(), [110, 109, 108].map(shown).into()), ("v".into(), vec![])]);
    evidence.pages = vec![page("u", 405, &[103, 102]), page("u", 5_000, &[109, 108]), page("v", 5_500, &[])];
    let (kind, what) = ("postgres killed", String::new());
    evidence.faults = vec![Fault { kind, what, from_ms: 3_000, to_ms: 4_000 }];
    evidence.load_ended_ms = Some(6_000);
    evidence
}

/// Adds two receivers, one of which is still connected, and undelivered messages.
fn with_presence(mut evidence: Evidence) -> Evidence {
    let presence = |receiver: &str, version: i64, connected| {
        let (receiver, id) = (receiver.to_owned(), format!("{receiver}{version}"));
        Presence { change: Change { receiver, version, connected, id }, at_ms: version }
    };
    evidence.presence = vec![
        presence("v", 10, true),
        presence("w", 11, true),
        presence("v", 20, false),
        presence("v", 10, true),
        presence("v", 30, true),
        presence("w", 40, false),
    ];
    evidence.connected = BTreeMap::from([("v".into(), 1), ("w".into(), 0)]);
    evidence.present = BTreeMap::from([("v".into(), Some(1)), ("w".into(), None)]);
    let cursors = BTreeMap::from([("r".to_owned(), 4), ("q".to_owned(), 1)]);
    let searched = |next| Searched { next: BTreeMap::from([(0, next)]), cursors: cursors.clone() };
    evidence.searched = vec![searched(3), searched(8), searched(11)];
    evidence.noted = vec![Noted { at_ms: 20, places: BTreeMap::from([("r".to_owned(), 3)]) }];
    let log = &evidence.logs[&Topic::Chat];
    let announced = log.iter().filter(|record| (5..=7).contains(&record.place.1)).map(|record| Undelivered {
        id: format!("announced {}", record.id),
        message_id: record.id.clone(),
        receiver: "r".to_owned(),
        place: record.place,
        name: record.number.map(named),
        stored_ms: 50,
        at_ms: 4_100,
    });
    evidence.undelivered = announced.collect();
    evidence.undelivered.push(evidence.undelivered[0].clone());
    evidence
}

/// Returns the rules that the change violates.
fn broken(tamper: impl FnOnce(&mut Evidence)) -> BTreeSet<&'static str> {
    let mut evidence = good();
    tamper(&mut evidence);
    check::in_the_end(&evidence).into_iter().map(|finding| finding.rule).collect()
}

#[test]
fn good_evidence_is_good() {
    assert_eq!(check::in_the_end(&good()), Vec::<Finding>::new());
}

#[test]
fn whatever_is_tampered_with_is_found() {
    assert_eq!(unnoticed(&good()), Vec::<&str>::new());
}

#[test]
fn every_rule_has_something_that_breaks_it() {
    let breakable: BTreeSet<&str> = tamper::all().map(|(_, rule, _)| rule).collect();
    assert_eq!(breakable, RULES.into_iter().collect());
}

#[test]
fn a_double_that_nobody_sent_and_a_record_that_nobody_wrote_are_found() {
    let third = broken(|evidence| {
        let orders = evidence.logs.get_mut(&Topic::Orders).unwrap();
        orders.push(Record { place: (0, 4), ..orders[3].clone() });
    });
    assert!(third.contains(check::REPEATED), "two attempts explain two records");
    let meanwhile = broken(|evidence| {
        let orders = evidence.logs.get_mut(&Topic::Orders).unwrap();
        orders.push(Record { place: (0, 4), ..orders[3].clone() });
        evidence.writes.iter_mut().for_each(|write| write.sent_ms = 0);
    });
    assert!(meanwhile.contains(check::REPEATED), "unknown outcomes of other writes at the same time are no excuse");
    let other_id = broken(|evidence| evidence.logs.get_mut(&Topic::Orders).unwrap()[3].id = "another".into());
    assert!(other_id.contains(check::REPEATED));
    let stranger =
        broken(|evidence| evidence.logs.get_mut(&Topic::Comments).unwrap().push(record((0, 1), "x", Some(7))));
    assert!(stranger.contains(check::REPEATED));
}

#[test]
fn something_unknown_may_be_there_once_but_not_twice() {
    let listed = |times: usize| broken(|evidence| evidence.listed.extend(vec![("p".to_owned(), 2); times]));
    assert!(!listed(1).contains(check::COMMENTS));
    assert!(listed(2).contains(check::COMMENTS));
    let refused = broken(|evidence| {
        let last = evidence.writes.iter_mut().rfind(|write| write.kind == Kind::Comment).unwrap();
        last.attempts = vec![Outcome::Acknowledged(None)];
    });
    assert!(refused.contains(check::COMMENTS), "acknowledged, but not listed");
}

#[test]
fn a_record_that_overtakes_one_that_is_not_settled_is_found() {
    let early = broken(|evidence| evidence.deliveries[2].taken = false);
    assert!(early.contains(check::DELIVERY_ORDER) && early.contains(check::DELIVERED));
    let given_up = broken(|evidence| evidence.logs.get_mut(&Topic::Deliveries).unwrap()[0].origin = Some((0, 2)));
    assert_eq!(given_up, BTreeSet::from([check::DELIVERED, check::COMMITTED]), "offset 3 was then never accepted");
    let wrong = broken(|evidence| evidence.deliveries[4].number = Some(2));
    assert_eq!(wrong, BTreeSet::from([check::DELIVERED]));
}

#[test]
fn a_commit_that_was_early_is_found_also_when_it_came_true_later() {
    let early = broken(|evidence| evidence.commits[0] = commit(Topic::Orders, 2, None, 2));
    assert_eq!(early, BTreeSet::from([check::COMMITTED]), "the target had not accepted offset 1 by then");
    let view = broken(|evidence| evidence.commits[1] = commit(Topic::Messages, 4, Some(3), 0));
    assert_eq!(view, BTreeSet::from([check::COMMITTED]));
}

#[test]
fn a_stream_that_repeats_or_turns_around_is_found() {
    let events = |numbers: &'static [u64]| {
        broken(|evidence| {
            let streamed = numbers.iter().map(|number| ("p".to_owned(), *number)).collect();
            evidence.streamed.insert("f".into(), streamed);
        })
    };
    assert!(!events(&[1, 2]).contains(check::STREAMED));
    assert!(events(&[1, 1]).contains(check::STREAMED));
    assert!(events(&[2, 1]).contains(check::STREAMED));
}

#[test]
fn a_missing_disconnection_is_excused_only_where_nobody_can_know_of_it() {
    let without_end = |redis: &'static str, killed_ms: u64, emptied_ms: u64| {
        broken(|evidence| {
            evidence.presence.retain(|one| one.change.id != "v20");
            let fault = |kind, from_ms| Fault { kind, what: String::new(), from_ms, to_ms: from_ms + 5 };
            evidence.faults.extend([fault("api killed", killed_ms), fault(redis, emptied_ms)]);
        })
        .contains(check::PRESENCE)
    };
    assert!(!without_end("redis emptied", 12, 22));
    assert!(without_end("redis frozen", 12, 22), "nothing is lost");
    assert!(without_end("redis emptied", 12, 35), "it was connected again before the loss");
}
