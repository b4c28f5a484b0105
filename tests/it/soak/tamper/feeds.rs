//! Tampering with posts, feeds and recovery times.

use std::collections::BTreeMap;

use super::{Named, acknowledged, new_id};
use crate::soak::{
    check,
    events::{Page, PostChange, Posted, Shown},
    ledger::{Evidence, Kind, Outcome, Verdict, Write},
    recovery::{Service, recoveries},
};

pub const TAMPERS: [Named; 18] = [
    ("an acknowledged post has no event", check::LOST, |evidence| {
        let id = event_of_post(evidence).id.clone();
        evidence.posts.retain(|event| event.id != id);
    }),
    ("an acknowledged deletion has no event", check::LOST, |evidence| {
        let post = evidence.writes[acknowledged(evidence, Kind::DeletePost)].post;
        evidence.posts.retain(|event| !matches!(event.change, PostChange::Deleted { post: id } if Some(id) == post));
    }),
    ("an acknowledged follow has no event", check::LOST, |evidence| {
        let (reader, author) = pair(evidence);
        let follows = |event: &Posted| {
            event.author == author && matches!(&event.change, PostChange::Followed { follower } if *follower == reader)
        };
        evidence.posts.retain(|event| !follows(event));
    }),
    ("a post's id differs from that in the response", check::LOST, |evidence| {
        let write = acknowledged(evidence, Kind::Post);
        evidence.writes[write].post = evidence.writes[write].post.map(|post| post + 1);
    }),
    ("a refused post has an event", check::LEAKED, |evidence| {
        let write = acknowledged(evidence, Kind::Post);
        evidence.writes[write].attempts = vec![Outcome::Refused];
    }),
    ("a refused follow has an event", check::LEAKED, |evidence| {
        let (reader, author) = pair(evidence);
        for write in &mut evidence.writes {
            if write.kind == Kind::Follow && write.key == format!("{reader} {author}") {
                write.attempts = vec![Outcome::Refused];
            }
        }
    }),
    ("a post is created twice", check::REPEATED, |evidence| {
        let found = event_of_post(evidence).clone();
        let newest = evidence.posts.iter().filter_map(|event| match event.change {
            PostChange::Created { post, .. } => Some(post),
            _ => None,
        });
        let PostChange::Created { number, .. } = found.change else { return };
        let change = PostChange::Created { post: newest.max().unwrap_or(0) + 1, number };
        append(evidence, Posted { id: new_id(), change, ..found });
    }),
    ("one post has events with two ids", check::REPEATED, |evidence| {
        let found = event_of_post(evidence).clone();
        append(evidence, Posted { id: new_id(), ..found });
    }),
    ("two posts of an author are swapped", check::ORDER, |evidence| {
        let acknowledged = |number: u64, author: &str| {
            let known = |write: &Write| write.kind == Kind::Post && write.number == number && write.key == author;
            evidence.writes.iter().any(|write| known(write) && write.verdict() == Verdict::Acknowledged)
        };
        let known = |event: &Posted| {
            let PostChange::Created { number, .. } = event.change else { return false };
            let once = evidence.posts.iter().filter(|other| other.id == event.id).count() == 1;
            once && acknowledged(number, &event.author)
        };
        let places: Vec<usize> = (0..evidence.posts.len()).filter(|at| known(&evidence.posts[*at])).collect();
        let before = |at: usize| {
            let same = |other: &usize| *other < at && evidence.posts[*other].author == evidence.posts[at].author;
            Some((places.iter().copied().rfind(same)?, at))
        };
        let pair = places.iter().rev().find_map(|at| before(*at));
        let (one, other) = pair.expect("two posts of an author");
        let (first, second) = (evidence.posts[one].place, evidence.posts[other].place);
        evidence.posts.swap(one, other);
        (evidence.posts[one].place, evidence.posts[other].place) = (first, second);
    }),
    ("a feed lacks a post", check::FEED, |evidence| {
        let feed = evidence.feeds.values_mut().find(|feed| !feed.is_empty()).expect("a feed");
        feed.remove(feed.len() / 2);
    }),
    ("a feed has two posts swapped", check::FEED, |evidence| {
        let feed = evidence.feeds.values_mut().find(|feed| feed.len() > 1).expect("a feed");
        feed.swap(0, 1);
    }),
    ("a feed has a deleted post", check::FEED, |evidence| {
        let deleted = evidence.writes[acknowledged(evidence, Kind::DeletePost)].clone();
        let shown = Shown { post: deleted.post.expect("its id"), author: deleted.key, number: deleted.number };
        let feed = evidence.feeds.values_mut().next().expect("a feed");
        let at = feed.partition_point(|other| other.post > shown.post);
        feed.insert(at, shown);
    }),
    ("a page has a post twice", check::PAGE, |evidence| {
        let page = page(evidence);
        page.posts.push(page.posts[page.posts.len() - 1]);
    }),
    ("a page has a post that no client wrote", check::PAGE, |evidence| {
        let unknown = |post: i64| {
            let created = |event: &Posted| matches!(event.change, PostChange::Created { post: id, .. } if id == post);
            !evidence.posts.iter().any(created)
        };
        let newest = evidence.pages.iter().flat_map(|page| &page.posts).max().copied().expect("a post");
        let post = (newest + 1..).find(|post| unknown(*post)).unwrap_or(newest);
        page(evidence).posts.insert(0, post);
    }),
    ("a page has a post that was deleted before the request", check::PAGE, |evidence| {
        let deleted = evidence.writes[acknowledged(evidence, Kind::DeletePost)].clone();
        let (post, after_ms) = (deleted.post.expect("its id"), deleted.done_ms.expect("its acknowledgement"));
        let page = evidence.pages.last_mut().expect("a page");
        page.asked_ms = page.asked_ms.max(after_ms + 1);
        page.at_ms = page.at_ms.max(page.asked_ms);
        insert(page, post);
    }),
    ("a page has a post of an author whom its reader never followed", check::PAGE, |evidence| {
        let follows = |page: &Page, author: &str| {
            let key = format!("{} {author}", page.reader);
            evidence
                .writes
                .iter()
                .any(|write| write.kind == Kind::Follow && write.key == key && write.sent_ms <= page.at_ms)
        };
        let strange = evidence.pages.iter().enumerate().find_map(|(at, page)| {
            let of_stranger = |event: &Posted| match event.change {
                PostChange::Created { post, .. } if !follows(page, &event.author) => Some(post),
                _ => None,
            };
            Some((at, evidence.posts.iter().find_map(of_stranger)?))
        });
        let (at, post) = strange.expect("a reader that does not follow all authors");
        insert(&mut evidence.pages[at], post);
    }),
    ("service is back 1 ms too late", check::RECOVERY, |evidence| {
        let (ended_ms, due_ms) = last_recovery(evidence);
        for page in evidence.pages.iter_mut().filter(|page| page.at_ms > ended_ms) {
            page.at_ms = page.at_ms.max(due_ms + 1);
        }
    }),
    ("service is not back before the end", check::RECOVERY, |evidence| {
        let (ended_ms, due_ms) = last_recovery(evidence);
        evidence.pages.retain(|page| page.at_ms <= ended_ms);
        evidence.load_ended_ms = evidence.load_ended_ms.max(Some(due_ms + 1));
    }),
];

/// Returns the event of an acknowledged post.
fn event_of_post(evidence: &Evidence) -> &Posted {
    let write = &evidence.writes[acknowledged(evidence, Kind::Post)];
    let of_write = |event: &&Posted| {
        event.author == write.key
            && matches!(event.change, PostChange::Created { number, .. } if number == write.number)
    };
    evidence.posts.iter().find(of_write).expect("its event")
}

/// Returns a reader and an author whom it follows at the end.
fn pair(evidence: &Evidence) -> (String, String) {
    let mut last: BTreeMap<&str, Option<bool>> = BTreeMap::new();
    for write in evidence.writes.iter().filter(|write| matches!(write.kind, Kind::Follow | Kind::Unfollow)) {
        match write.verdict() {
            Verdict::Acknowledged => drop(last.insert(&write.key, Some(write.kind == Kind::Follow))),
            Verdict::Unknown => drop(last.insert(&write.key, None)),
            Verdict::Refused => {}
        }
    }
    let stands = last.into_iter().find(|(_, follows)| *follows == Some(true));
    let (reader, author) = stands.and_then(|(key, _)| key.split_once(' ')).expect("a follow that was not undone");
    (reader.to_owned(), author.to_owned())
}

fn append(evidence: &mut Evidence, mut event: Posted) {
    let in_partition = evidence.posts.iter().filter(|other| other.place.0 == event.place.0);
    event.place.1 = in_partition.map(|other| other.place.1 + 1).max().unwrap_or(0);
    evidence.posts.push(event);
}

fn page(evidence: &mut Evidence) -> &mut Page {
    evidence.pages.iter_mut().rfind(|page| page.posts.len() > 1).expect("a page with posts")
}

/// Inserts a post at its place in the page's order.
fn insert(page: &mut Page, post: i64) {
    let at = page.posts.partition_point(|other| *other > post);
    page.posts.insert(at, post);
}

/// Returns the end of the last faults, and the time at which feeds had to be back.
fn last_recovery(evidence: &Evidence) -> (u64, u64) {
    let feeds = recoveries(evidence).into_iter().filter(|recovery| recovery.service == Service::Feed);
    let last = feeds.max_by_key(|recovery| recovery.ended_ms).expect("a fault");
    (last.ended_ms, last.due_ms)
}
