//! Events of posts, presence and undelivered messages as the topics have them, and feeds as the API
//! returns them.

use std::collections::BTreeMap;

use postrider_time::clock;
use serde_json::Value;

use super::ledger::{Ledger, Place};
use crate::harness::{changes::Change, sessions::Name};

/// An event of `post-events`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Posted {
    pub place: Place,
    pub id: String,
    /// The record's key.
    pub author: String,
    pub change: PostChange,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PostChange {
    Created { post: i64, number: u64 },
    Deleted { post: i64 },
    Followed { follower: String },
    Unfollowed { follower: String },
}

/// A page of a feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub reader: String,
    pub asked_ms: u64,
    pub at_ms: u64,
    pub posts: Vec<i64>,
}

/// A post in a feed at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub post: i64,
    pub author: String,
    pub number: u64,
}

/// A presence change, with its time since the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    pub change: Change,
    pub at_ms: i64,
}

/// An event for a message that was not delivered in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undelivered {
    /// The ids of the event and of the message.
    pub id: String,
    pub message_id: String,
    pub receiver: String,
    pub place: Place,
    /// `None` if the message is too large to be included.
    pub name: Option<Name>,
    /// The times, since the start, at which the message was stored and the event was written.
    pub stored_ms: i64,
    pub at_ms: i64,
}

/// The progress of the search for undelivered messages, and the receivers' cursors right
/// afterwards.
#[derive(Debug, Clone)]
pub struct Searched {
    pub next: BTreeMap<i32, i64>,
    pub cursors: BTreeMap<String, i64>,
}

impl Posted {
    /// Parses an event; `None` if it is not valid.
    pub fn read(place: Place, id: String, author: String, value: &Value) -> Option<Self> {
        let payload = &value["payload"];
        let post = payload["post_id"].as_i64();
        let follower = value["actor_id"].as_str().map(str::to_owned);
        let author_named = match value["type"].as_str()? {
            "USER_FOLLOWED" | "USER_UNFOLLOWED" => payload["followee_id"].as_str(),
            _ => value["actor_id"].as_str(),
        };
        let change = match value["type"].as_str()? {
            "POST_CREATED" => PostChange::Created { post: post?, number: number(&payload["content"])? },
            "POST_DELETED" => PostChange::Deleted { post: post? },
            "USER_FOLLOWED" => PostChange::Followed { follower: follower? },
            "USER_UNFOLLOWED" => PostChange::Unfollowed { follower: follower? },
            _ => return None,
        };
        (author_named == Some(&author)).then_some(Self { place, id, author, change })
    }
}

/// Parses the number at the beginning of a post's content.
pub fn number(content: &Value) -> Option<u64> {
    content.as_str()?.split(' ').next()?.parse().ok()
}

impl Presence {
    pub fn read(id: String, key: &str, value: &Value, ledger: &Ledger) -> Option<Self> {
        let (state, at_ms) = (value["state"].as_str()?, clock::parse_rfc3339(value["at"].as_str()?)?);
        let receiver = value["receiver_id"].as_str().filter(|receiver| *receiver == key)?.to_owned();
        let (connected, connections) = (state == "connected", value["connections"].as_i64()?);
        let change = Change { receiver, version: value["version"].as_i64()?, connected, id };
        (connected == (connections > 0)).then(|| Self { change, at_ms: ledger.since_start(at_ms) })
    }
}

impl Undelivered {
    /// Parses an event; `at_ms` is the record's timestamp.
    pub fn read(id: String, key: &str, at_ms: i64, value: &Value, ledger: &Ledger) -> Option<Self> {
        let text = |field: &str| value[field].as_str().map(str::to_owned);
        let receiver = text("receiver_id").filter(|receiver| receiver == key)?;
        let name = Name::of(&value["data"]);
        if name.is_none() && !value["data"].is_null() {
            return None;
        }
        Some(Self {
            id,
            message_id: text("event_id")?,
            receiver,
            place: (i32::try_from(value["partition"].as_i64()?).ok()?, value["offset"].as_i64()?),
            name,
            stored_ms: ledger.since_start(clock::parse_rfc3339(&text("stored_at")?)?),
            at_ms: ledger.since_start(at_ms),
        })
    }
}
