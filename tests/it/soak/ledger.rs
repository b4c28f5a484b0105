//! The ledger: every write with its outcome, and everything that clients saw. The judge checks it.

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

/// The kind of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Push,
    Delete,
    /// A push with a TTL.
    Expiring,
    Produce,
    /// A record of a batch.
    Batch,
    /// A record of a stream.
    Stream,
    Comment,
    /// A message to a receiver, by `POST /api/v1/message/action`.
    Message,
    /// A post to all followers of its author.
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

/// The topics that the run reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// The source of the key-value view.
    Messages,
    /// Written by `/produce`, and delivered to the target.
    Orders,
    Comments,
    /// Messages to receivers.
    Chat,
    /// Posts and follows.
    Posts,
    /// Connections and disconnections of receivers.
    Presence,
    /// Messages that were not delivered in time.
    Undelivered,
    /// Dead letters of postrider's own topics.
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
    /// Stored, with the position if the response has one.
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

/// A write. Its key and number identify it, and its record has both.
#[derive(Debug, Clone)]
pub struct Write {
    pub kind: Kind,
    pub key: String,
    pub number: u64,
    pub sent_ms: u64,
    /// One outcome for each attempt, unknown until it is answered.
    pub attempts: Vec<Outcome>,
    /// When it was acknowledged.
    pub done_ms: Option<u64>,
    /// The id of the post that was created, or that is to be deleted.
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

    /// The positions in the acknowledgements.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.attempts.iter().filter_map(|outcome| match outcome {
            Outcome::Acknowledged(place) => *place,
            _ => None,
        })
    }

    /// The number of attempts that may have stored a record.
    pub fn possible(&self) -> usize {
        self.attempts.iter().filter(|outcome| **outcome != Outcome::Refused).count()
    }
}

/// A record of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub place: Place,
    /// The record's key; of a message, its receiver and its sender.
    pub key: String,
    /// `None` is a tombstone.
    pub number: Option<u64>,
    /// The event id.
    pub id: String,
    /// The version header of a record that the projection wrote: the offset up to which the view
    /// had read.
    pub version: Option<i64>,
    /// True if the value has a TTL.
    pub expires: bool,
    /// Of a dead letter: the position of the original record.
    pub origin: Option<Place>,
}

/// Observation of a reader: the number of a key, or that the key is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The sights of one reader and key are in the order in which the reader saw them.
    pub reader: String,
    pub key: String,
    /// The offset that the reader required by `Postrider-After`.
    pub after: Option<i64>,
    pub saw: Option<u64>,
    pub at_ms: u64,
}

/// A request that the relay's target received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub place: Place,
    pub key: String,
    pub number: Option<u64>,
    /// True if the target answered 2xx, even if the answer was lost.
    pub taken: bool,
    pub at_ms: u64,
}

/// A sample of a group's commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub topic: Topic,
    pub at_ms: u64,
    pub offsets: BTreeMap<i32, i64>,
    /// Sampled right afterwards, for sinks that can be queried: the first offset that the sink
    /// lacks.
    pub reached: BTreeMap<i32, i64>,
    /// The number of deliveries seen right afterwards.
    pub deliveries: usize,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub kind: &'static str,
    pub what: String,
    pub from_ms: u64,
    pub to_ms: u64,
}

/// Everything that the judge checks.
#[derive(Debug, Default, Clone)]
pub struct Evidence {
    pub writes: Vec<Write>,
    pub logs: BTreeMap<Topic, Vec<Record>>,
    pub sights: Vec<Sight>,
    pub deliveries: Vec<Delivery>,
    pub commits: Vec<Commit>,
    /// The view at the end.
    pub view: BTreeMap<String, Option<u64>>,
    /// The list of comments at the end, as key and number, newest first.
    pub listed: Vec<(String, u64)>,
    /// The comments that each reader of a live stream received.
    pub streamed: BTreeMap<String, Vec<(String, u64)>>,
    /// The connections of devices, with the messages that they received.
    pub sessions: Vec<Session>,
    /// Samples of the receivers' cursors.
    pub noted: Vec<Noted>,
    /// The history of each receiver at the end.
    pub mailboxes: BTreeMap<String, Vec<Name>>,
    /// All of `post-events`, `presence` and `message-events`.
    pub posts: Vec<Posted>,
    pub presence: Vec<Presence>,
    pub undelivered: Vec<Undelivered>,
    /// Pages of feeds that readers received.
    pub pages: Vec<Page>,
    /// Each reader's whole feed at the end, newest first.
    pub feeds: BTreeMap<String, Vec<Shown>>,
    /// The number of connections that each receiver has.
    pub connected: BTreeMap<String, i64>,
    /// Report of the API at the end: the number of connections, `None` for disconnected receivers.
    pub present: BTreeMap<String, Option<i64>>,
    /// Samples of the progress of the search for undelivered messages.
    pub searched: Vec<Searched>,
    /// The time at which clients stopped writing.
    pub load_ended_ms: Option<u64>,
    /// The end offset of each partition at the end.
    pub ends: BTreeMap<Topic, BTreeMap<i32, i64>>,
    pub faults: Vec<Fault>,
    /// Violations that need no other evidence: deaths, panics, responses that are not allowed.
    pub incidents: Vec<String>,
    /// The number of responses by status and code.
    pub answers: BTreeMap<String, usize>,
    /// The peak resident memory of any process of each role, in KiB.
    pub peak_rss_kib: BTreeMap<&'static str, u64>,
}

/// The evidence while the run collects it.
#[derive(Clone)]
pub struct Ledger {
    evidence: Arc<Mutex<Evidence>>,
    began: Instant,
    /// The start by the clock that the servers use, in milliseconds since the epoch.
    began_at_ms: i64,
}

impl Ledger {
    pub fn new() -> Self {
        Self { evidence: Arc::default(), began: Instant::now(), began_at_ms: clock::now_ms() }
    }

    /// Converts a time of the servers' clock to milliseconds since the start.
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

    /// Records a write that is about to be sent; returns its index in the ledger.
    pub fn begin(&self, kind: Kind, key: &str, number: u64) -> usize {
        let (key, sent_ms) = (key.to_owned(), self.now_ms());
        let write = Write { kind, key, number, sent_ms, attempts: Vec::new(), done_ms: None, post: None };
        let mut evidence = self.evidence();
        evidence.writes.push(write);
        evidence.writes.len() - 1
    }

    /// Records an attempt that is about to be made; its outcome is unknown until
    /// [`Ledger::settle`].
    pub fn attempt(&self, write: usize) {
        self.evidence().writes[write].attempts.push(Outcome::Unknown);
    }

    /// Records the outcome of the last attempt.
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

    /// Records that clients have stopped writing.
    pub fn load_ends(&self) {
        self.evidence().load_ended_ms = Some(self.now_ms());
    }

    pub fn incident(&self, what: String) {
        eprintln!("soak: INCIDENT at {:.1} s: {what}", self.now_ms() as f64 / 1_000.0);
        self.evidence().incidents.push(what);
    }
}
