//! The rules for posts and feeds: which events `post-events` must have, and which posts feeds may
//! show.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{
    check::describe,
    events::{PostChange, Posted, Shown},
    ledger::{Evidence, Kind, Topic, Verdict, Write},
};

/// A follower and an author.
type Pair<'a> = (&'a str, &'a str);

/// The content of the topic; of duplicates, the first counts.
#[derive(Default)]
struct Told<'a> {
    /// The events that created each post, by author and number.
    created: HashMap<(&'a str, u64), Vec<&'a Posted>>,
    deleted: HashMap<i64, Vec<&'a Posted>>,
    posts: BTreeMap<i64, (&'a str, u64)>,
    follows: HashMap<Pair<'a>, bool>,
    /// The number of follow and of unfollow events of each pair.
    turns: HashMap<(Pair<'a>, bool), usize>,
    /// Events whose id a different event has.
    reused: Vec<&'a Posted>,
}

impl<'a> Told<'a> {
    fn of(evidence: &'a Evidence) -> Self {
        let (mut told, mut ids) = (Self::default(), HashMap::new());
        for event in &evidence.posts {
            let first = *ids.entry(event.id.as_str()).or_insert(event);
            if !std::ptr::eq(first, event) {
                if (&first.author, &first.change) != (&event.author, &event.change) {
                    told.reused.push(event);
                }
                continue;
            }
            let author = event.author.as_str();
            match &event.change {
                PostChange::Created { post, number } => {
                    told.created.entry((author, *number)).or_default().push(event);
                    told.posts.insert(*post, (author, *number));
                }
                PostChange::Deleted { post } => told.deleted.entry(*post).or_default().push(event),
                PostChange::Followed { follower } => told.turn((follower, author), true),
                PostChange::Unfollowed { follower } => told.turn((follower, author), false),
            }
        }
        told
    }

    fn turn(&mut self, pair: Pair<'a>, follows: bool) {
        self.follows.insert(pair, follows);
        *self.turns.entry((pair, follows)).or_default() += 1;
    }

    /// Returns the events of a post or of a deletion.
    fn events<'b>(&'b self, write: &'b Write) -> &'b [&'a Posted] {
        let found = match write.kind {
            Kind::Post => self.created.get(&(write.key.as_str(), write.number)),
            Kind::DeletePost => write.post.and_then(|post| self.deleted.get(&post)),
            _ => None,
        };
        found.map_or(&[], Vec::as_slice)
    }
}

fn writes(evidence: &Evidence) -> impl Iterator<Item = &Write> {
    evidence.writes.iter().filter(|write| write.kind.topic() == Topic::Posts)
}

fn pair(write: &Write) -> Option<Pair<'_>> {
    matches!(write.kind, Kind::Follow | Kind::Unfollow).then(|| write.key.split_once(' '))?
}

/// Finds acknowledged writes without an event. A follow that changed nothing has no event, so for
/// follows the resulting state is compared.
pub fn lost(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let (mut faults, mut pairs): (Vec<String>, BTreeMap<Pair<'_>, Option<bool>>) = Default::default();
    for write in writes(evidence) {
        let acknowledged = write.verdict() == Verdict::Acknowledged;
        if let Some(pair) = pair(write) {
            match write.verdict() {
                Verdict::Acknowledged => drop(pairs.insert(pair, Some(write.kind == Kind::Follow))),
                // It may take effect at any time; its sender does not write about the pair any more.
                Verdict::Unknown => drop(pairs.insert(pair, None)),
                Verdict::Refused => {}
            }
        } else if acknowledged && told.events(write).is_empty() {
            faults.push(format!("{}, but it has no event", describe(write)));
        }
        let id = write.post.filter(|_| acknowledged && write.kind == Kind::Post);
        if let Some(id) = id.filter(|id| told.posts.get(id) != Some(&(write.key.as_str(), write.number))) {
            faults.push(format!("{} has the id {id}, which is {:?}", describe(write), told.posts.get(&id)));
        }
    }
    for (pair, follows) in pairs {
        let found = told.follows.get(&pair).copied().unwrap_or(false);
        if follows.is_some_and(|follows| follows != found) {
            faults.push(format!("{pair:?}: following is {found} in the topic, but {follows:?} was acknowledged last"));
        }
    }
    faults
}

/// Finds refused writes that have an event.
pub fn leaked(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let refused = writes(evidence).filter(|write| !write.attempts.is_empty() && write.verdict() == Verdict::Refused);
    let mut faults: Vec<String> = refused
        .filter_map(|write| {
            let found = told.events(write).first()?;
            Some(format!("{}, but it is at {:?}", describe(write), found.place))
        })
        .collect();
    let mut possible: HashMap<(Pair<'_>, bool), usize> = HashMap::new();
    for write in writes(evidence).filter(|write| write.possible() > 0) {
        if let Some(pair) = pair(write) {
            *possible.entry((pair, write.kind == Kind::Follow)).or_default() += 1;
        }
    }
    for (turn, count) in &told.turns {
        let most = possible.get(turn).copied().unwrap_or(0);
        if *count > most {
            faults.push(format!("{turn:?} has {count} events, for {most} writes that were not refused"));
        }
    }
    faults
}

/// Finds writes with several events, ids of several events, and events without a write.
pub fn repeated(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let mut faults: Vec<String> =
        told.reused.iter().map(|event| format!("{event:?} has the id of another event")).collect();
    let (mut posts, mut deletes): (HashSet<(&str, u64)>, HashSet<i64>) = Default::default();
    for write in writes(evidence) {
        match write.kind {
            Kind::Post => drop(posts.insert((&write.key, write.number))),
            Kind::DeletePost => deletes.extend(write.post),
            _ => {}
        }
        let events = told.events(write);
        if events.len() > 1 {
            faults.push(format!("{} has several events: {events:?}", describe(write)));
        }
    }
    let strange = told.created.iter().filter(|(name, _)| !posts.contains(*name)).map(|(_, events)| events[0]);
    let deleted = told.deleted.iter().filter(|(post, _)| !deletes.contains(*post)).map(|(_, events)| events[0]);
    faults.extend(strange.chain(deleted).map(|event| format!("no client wrote {event:?}")));
    faults
}

/// Finds acknowledged writes of an author whose events are in another order.
pub fn disordered(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let (mut last, mut faults): (HashMap<&str, &Posted>, _) = (HashMap::new(), Vec::new());
    for write in writes(evidence).filter(|write| write.verdict() == Verdict::Acknowledged) {
        let Some(&event) = told.events(write).first() else { continue };
        if let Some(before) = last.insert(&event.author, event).filter(|before| before.place >= event.place) {
            faults.push(format!("{} is at {:?}, after {before:?}", describe(write), event.place));
        }
    }
    faults
}

/// Compares the feeds at the end with the topic.
pub fn feeds(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let mut faults = Vec::new();
    for (reader, shown) in &evidence.feeds {
        let followed = |author: &str| told.follows.get(&(reader.as_str(), author)).copied().unwrap_or(false);
        let posts = told.posts.iter().rev();
        let stands = |(id, (author, _)): &(&i64, &(&str, u64))| followed(author) && !told.deleted.contains_key(id);
        let expected: Vec<Shown> = posts
            .filter(stands)
            .map(|(&post, (author, number))| Shown { post, author: (*author).to_owned(), number: *number })
            .collect();
        let at = expected.iter().zip(shown).take_while(|(one, other)| one == other).count();
        if at < expected.len().max(shown.len()) {
            faults.push(format!(
                "the feed of {reader} has {:?} at {at}, expected {:?}; it has {} posts, expected {}",
                shown.get(at),
                expected.get(at),
                shown.len(),
                expected.len()
            ));
        }
    }
    faults
}

/// Finds pages with a post that no client wrote, a post twice or out of order, or a post of an
/// author whom the reader never followed. Also finds pages with a post whose deletion, or whose
/// author's unfollow, was acknowledged before the page was requested.
pub fn pages(evidence: &Evidence) -> Vec<String> {
    let told = Told::of(evidence);
    let mut posts: HashMap<i64, &str> = told.posts.iter().map(|(id, (author, _))| (*id, *author)).collect();
    let (mut deleted, mut pairs): (HashMap<i64, u64>, HashMap<Pair<'_>, Vec<&Write>>) = Default::default();
    for write in writes(evidence) {
        match (write.kind, write.post) {
            (Kind::Post, Some(id)) => drop(posts.insert(id, &write.key)),
            (Kind::DeletePost, Some(id)) => deleted.extend(write.done_ms.map(|done_ms| (id, done_ms))),
            _ => {}
        }
        if let Some(pair) = pair(write).filter(|_| write.possible() > 0) {
            pairs.entry(pair).or_default().push(write);
        }
    }
    let mut faults = BTreeSet::new();
    for page in &evidence.pages {
        let mut wrong = |what: String| {
            let (reader, asked_ms, at_ms) = (&page.reader, page.asked_ms, page.at_ms);
            faults.insert(format!("a page of {reader}, requested at {asked_ms} ms, received at {at_ms} ms, {what}"));
        };
        if page.posts.windows(2).any(|pair| pair[0] <= pair[1]) {
            wrong(format!("is not newest first: {:?}", page.posts));
        }
        for post in &page.posts {
            let Some(author) = posts.get(post) else {
                wrong(format!("has {post}, which no client wrote"));
                continue;
            };
            if let Some(done_ms) = deleted.get(post).filter(|done_ms| **done_ms < page.asked_ms) {
                wrong(format!("has {post} of {author}, deleted at {done_ms} ms"));
            }
            let turns = pairs.get(&(page.reader.as_str(), author)).map_or(&[][..], Vec::as_slice);
            let follows = |write: &&&Write| write.kind == Kind::Follow && write.sent_ms <= page.at_ms;
            let last_follow = turns.iter().rev().find(follows).map(|write| write.sent_ms);
            let ended = |write: &&&Write| {
                write.kind == Kind::Unfollow
                    && write.done_ms.is_some_and(|done_ms| done_ms < page.asked_ms)
                    && last_follow <= Some(write.sent_ms)
            };
            if last_follow.is_none() {
                wrong(format!("has {post} of {author}, who was never followed"));
            } else if let Some(end) = turns.iter().rev().find(ended) {
                wrong(format!("has {post} of {author}, unfollowed at {:?} ms", end.done_ms));
            }
        }
    }
    faults.into_iter().collect()
}
