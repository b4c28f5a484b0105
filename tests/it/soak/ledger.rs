//! Everything that was sent, what became of it, and everything that was seen: what is judged in the end.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use postrider_time::clock;

use super::events::{Page, Posted, Presence, Searched, Shown, Undelivered};
use crate::harness::{
    mailbox::Noted,
    sessions::{Name, Session},
};

/// What a write is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Push,
    Delete,
    /// A push that ends by itself.
    Expiring,
    Produce,
    /// A record of a batch.
    Batch,
    /// A record of a stream.
    Stream,
    Comment,
    /// To a receiver, by `POST /api/v1/message/action`.
    Message,
    /// To all who follow its author.
    Post,
    DeletePost,
    Follow,
    Unfollow,
}

impl Kind {
    pub const ALL: [Kind; 12] = [
        Self::Push,
        Self::Delete,
        Self::Expiring,
        Self::Produce,
        Self::Batch,
        Self::Stream,
        Self::Comment,
        Self::Message,
        Self::Post,
        Self::DeletePost,
        Self::Follow,
        Self::Unfollow,
    ];

    pub fn topic(self) -> Topic {
        match self {
            Self::Push | Self::Delete | Self::Expiring => Topic::Messages,
            Self::Produce | Self::Batch | Self::Stream => Topic::Orders,
            Self::Comment => Topic::Comments,
            Self::Message => Topic::Chat,
            Self::Post | Self::DeletePost | Self::Follow | Self::Unfollow => Topic::Posts,
        }
    }
}

/// The topics that are read while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// What the key-value view is made of.
    Messages,
    /// Written to by `/produce`, and carried to the target.
    Orders,
    Comments,
    /// Messages to receivers.
    Chat,
    /// Posts, and who follows whom.
    Posts,
    /// Who is connected, and who no longer.
    Presence,
    /// Messages that nobody has got in time.
    Undelivered,
    /// Dead letters of our own topics.
    Events,
    /// Dead letters of deliveries.
    Deliveries,
}

impl Topic {
    pub const ALL: [Topic; 9] = [
        Self::Messages,
        Self::Orders,
        Self::Comments,
        Self::Chat,
        Self::Posts,
        Self::Presence,
        Self::Undelivered,
        Self::Events,
        Self::Deliveries,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Orders => "orders",
            Self::Comments => "comments",
            Self::Chat => "message",
            Self::Posts => "post-events",
            Self::Presence => "presence",
            Self::Undelivered => "message-events",
            Self::Events => "dead-letter-events",
            Self::Deliveries => "dead-letter-deliveries",
        }
    }
}

/// Partition and offset.
pub type Place = (i32, i64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Stored, there, where the answer says where.
    Acknowledged(Option<Place>),
    /// Not stored, or never sent.
    Refused,
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Acknowledged,
    Refused,
    Unknown,
}

/// A write: key and number name it, and its record has both.
#[derive(Debug, Clone)]
pub struct Write {
    pub kind: Kind,
    pub key: String,
    pub number: u64,
    pub sent_ms: u64,
    /// Unknown until there is an answer.
    pub attempts: Vec<Outcome>,
    /// When it was acknowledged.
    pub done_ms: Option<u64>,
    /// The id of the post that was made, or is to be deleted.
    pub post: Option<i64>,
}

impl Write {
    pub fn verdict(&self) -> Verdict {
        if self.places().next().is_some() || self.attempts.contains(&Outcome::Acknowledged(None)) {
            Verdict::Acknowledged
        } else if self.attempts.contains(&Outcome::Unknown) {
            Verdict::Unknown
        } else {
            Verdict::Refused
        }
    }

    /// Where acknowledgements said that it is.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.attempts.iter().filter_map(|outcome| match outcome {
            Outcome::Acknowledged(place) => *place,
            _ => None,
        })
    }

    /// Attempts that may have stored a record.
    pub fn possible(&self) -> usize {
        self.attempts.iter().filter(|outcome| **outcome != Outcome::Refused).count()
    }
}

/// A record as it is in a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub place: Place,
    /// Of a message: its receiver and its sender.
    pub key: String,
    /// `None` is a tombstone.
    pub number: Option<u64>,
    /// The event's id.
    pub id: String,
    /// The offset up to which a record of the projection's own speaks.
    pub version: Option<i64>,
    /// Whether it ends by itself.
    pub expires: bool,
    /// Of a dead letter: where the record was.
    pub origin: Option<Place>,
}

/// What a reader saw of a key: its number, or that it is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// Sights of one reader and key are in the order in which they were made.
    pub reader: String,
    pub key: String,
    /// The offset that the reader asked to be visible.
    pub after: Option<i64>,
    pub saw: Option<u64>,
    pub at_ms: u64,
}

/// A request as the relay's target got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub place: Place,
    pub key: String,
    pub number: Option<u64>,
    /// Answered with 2xx, whether or not that answer arrived.
    pub taken: bool,
    pub at_ms: u64,
}

/// What a group had committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub topic: Topic,
    pub at_ms: u64,
    pub offsets: BTreeMap<i32, i64>,
    /// How far the sink was right after that, where one can ask it: the first offset that it lacks.
    pub reached: BTreeMap<i32, i64>,
    /// Deliveries seen right after that.
    pub deliveries: usize,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub kind: &'static str,
    pub what: String,
    pub from_ms: u64,
    pub to_ms: u64,
}

/// All of it.
#[derive(Debug, Default, Clone)]
pub struct Evidence {
    pub writes: Vec<Write>,
    pub logs: BTreeMap<Topic, Vec<Record>>,
    pub sights: Vec<Sight>,
    pub deliveries: Vec<Delivery>,
    pub commits: Vec<Commit>,
    /// The view in the end.
    pub view: BTreeMap<String, Option<u64>>,
    /// Comments as they are listed in the end, as key and number, newest first.
    pub listed: Vec<(String, u64)>,
    /// What each reader of live comments got.
    pub streamed: BTreeMap<String, Vec<(String, u64)>>,
    /// What devices of receivers got.
    pub sessions: Vec<Session>,
    /// Receivers' cursors, sampled.
    pub noted: Vec<Noted>,
    /// The history of each receiver in the end.
    pub mailboxes: BTreeMap<String, Vec<Name>>,
    /// All of `post-events`, `presence` and `message-events`.
    pub posts: Vec<Posted>,
    pub presence: Vec<Presence>,
    pub undelivered: Vec<Undelivered>,
    /// Pages that readers of feeds got.
    pub pages: Vec<Page>,
    /// Each reader's whole feed in the end, newest first.
    pub feeds: BTreeMap<String, Vec<Shown>>,
    /// How many connections each receiver has now,
    pub connected: BTreeMap<String, i64>,
    /// and what the API says in the end: the number of connections, `None` for those that count as disconnected.
    pub present: BTreeMap<String, Option<i64>>,
    /// How far the search for undelivered messages was, sampled.
    pub searched: Vec<Searched>,
    /// When clients stopped writing.
    pub load_ended_ms: Option<u64>,
    /// Where each partition ends in the end.
    pub ends: BTreeMap<Topic, BTreeMap<i32, i64>>,
    pub faults: Vec<Fault>,
    /// What is wrong whatever else was seen: deaths, panics, answers that must not be.
    pub incidents: Vec<String>,
    /// Answers by status and code.
    pub answers: BTreeMap<String, usize>,
    /// Most resident memory of a process of each role, in KiB.
    pub peak_rss_kib: BTreeMap<&'static str, u64>,
}

/// The evidence while it is gathered.
#[derive(Clone)]
pub struct Ledger {
    evidence: Arc<Mutex<Evidence>>,
    began: Instant,
    /// The same by the clock that the servers go by, in milliseconds since the epoch.
    began_at_ms: i64,
}

impl Ledger {
    pub fn new() -> Self {
        Self { evidence: Arc::default(), began: Instant::now(), began_at_ms: clock::now_ms() }
    }

    /// A time of the servers' clock, since the start.
    pub fn since_start(&self, at_ms: i64) -> i64 {
        at_ms - self.began_at_ms
    }

    pub fn began(&self) -> Instant {
        self.began
    }

    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    pub fn evidence(&self) -> MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write that is about to be sent; returns its place in the ledger.
    pub fn begin(&self, kind: Kind, key: &str, number: u64) -> usize {
        let (key, sent_ms) = (key.to_owned(), self.now_ms());
        let write = Write { kind, key, number, sent_ms, attempts: Vec::new(), done_ms: None, post: None };
        let mut evidence = self.evidence();
        evidence.writes.push(write);
        evidence.writes.len() - 1
    }

    /// An attempt that is about to be made; unknown until [`Ledger::settle`].
    pub fn attempt(&self, write: usize) {
        self.evidence().writes[write].attempts.push(Outcome::Unknown);
    }

    /// What became of the last attempt.
    pub fn settle(&self, write: usize, outcome: Outcome) {
        let now_ms = self.now_ms();
        let write = &mut self.evidence().writes[write];
        if matches!(outcome, Outcome::Acknowledged(_)) {
            write.done_ms = Some(now_ms);
        }
        if let Some(last) = write.attempts.last_mut() {
            *last = outcome;
        }
    }

    /// Clients write no longer.
    pub fn load_ends(&self) {
        self.evidence().load_ended_ms = Some(self.now_ms());
    }

    pub fn incident(&self, what: String) {
        eprintln!("soak: INCIDENT at {:.1} s: {what}", self.now_ms() as f64 / 1_000.0);
        self.evidence().incidents.push(what);
    }
}
