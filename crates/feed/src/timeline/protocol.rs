//! Layout of timelines in Redis: a sorted set of post ids, which are their own scores, with a
//! marker on top.

use std::{cmp::Reverse, collections::BTreeSet, mem::take};

use postrider_telemetry::unknown::Unknown;
use redis::Value;

/// Score of the marker, above all ids, so that the marker comes first when the newest members are
/// read.
pub const MARK_SCORE: i64 = 1 << 53;

/// Time for which a deleted post, or a user who unfollowed, stays in the `gone` list after
/// timelines are clean of it, in milliseconds: longer than a reader takes to fill a timeline from
/// Postgres.
pub const LINGER_MS: i64 = 15_000;

/// Time that a builder has to fill a timeline, in milliseconds; after it others may build.
pub const BUILD_MS: i64 = 10_000;

/// Owner of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The posts in a user's feed, except those of authors who are merged at read.
    User(String),
    /// The posts of an author.
    Author(String),
}

/// Names of Redis keys. Keys of timelines contain the epoch.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(key_prefix: &str) -> Self {
        Self { prefix: format!("{key_prefix}feed:") }
    }

    /// Returns the key of the epoch of timelines. The key is absent while no processor has
    /// confirmed that timelines are valid.
    pub fn epoch(&self) -> String {
        format!("{}epoch", self.prefix)
    }

    pub fn timeline(&self, epoch: i64, owner: &Owner) -> String {
        let (kind, name) = match owner {
            Owner::User(name) => ('u', name),
            Owner::Author(name) => ('a', name),
        };
        format!("{}e{epoch}:{kind}:{name}", self.prefix)
    }

    /// Returns the owner of a timeline's key in this epoch; `None` for any other key.
    pub fn owner(&self, epoch: i64, key: &[u8]) -> Option<Owner> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.strip_prefix('e')?;
        let (of, rest) = rest.split_once(':')?;
        let (kind, name) = rest.split_once(':')?;
        match kind {
            _ if of.parse() != Ok(epoch) => None,
            "u" => Some(Owner::User(name.to_owned())),
            "a" => Some(Owner::Author(name.to_owned())),
            _ => None,
        }
    }

    /// Returns the key of a processor's heartbeat counter, which shows whether Redis lost writes.
    pub fn beat(&self, process: &str) -> String {
        format!("{}beat:{process}", self.prefix)
    }

    /// Returns the key of the `gone` list: posts and users that timelines may be wrong about, by
    /// the version of the list at which they were added.
    pub fn gone(&self) -> String {
        format!("{}{{gone}}:list", self.prefix)
    }

    /// Returns the key of the version of the `gone` list.
    pub fn gone_version(&self) -> String {
        format!("{}{{gone}}:version", self.prefix)
    }

    /// Returns the key of the times at which members of the `gone` list expire, in milliseconds
    /// since the epoch.
    pub fn gone_until(&self) -> String {
        format!("{}{{gone}}:until", self.prefix)
    }
}

/// State of a timeline, stored as the top member of its sorted set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// A builder, identified by this number, is filling the timeline.
    Building(u64),
    Ready {
        /// The timeline is complete from this id on; below it there may be single ids that were
        /// added late.
        floor: i64,
        /// True if nothing below the floor belongs to the timeline.
        whole: bool,
        /// Authors whose timelines are merged into this one.
        merged: Vec<String>,
    },
}

impl Mark {
    pub fn encode(&self) -> String {
        match self {
            Self::Building(token) => format!("b{token}"),
            Self::Ready { floor, whole, merged } => {
                let merged = serde_json::to_string(merged).unwrap_or_default();
                let kind = if *whole { 'w' } else { 'r' };
                format!("{kind}{floor}{merged}")
            }
        }
    }

    pub fn decode(member: &[u8]) -> Result<Self, Unknown> {
        Self::read(member).ok_or_else(|| Unknown::of_bytes("mark of a timeline", member))
    }

    fn read(member: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(member).ok()?;
        match text.split_at_checked(1)? {
            ("b", token) => token.parse().ok().map(Self::Building),
            (kind @ ("r" | "w"), rest) => {
                let (floor, merged) = rest.split_at_checked(rest.find('[')?)?;
                let merged = if merged == "[]" { Vec::new() } else { serde_json::from_str(merged).ok()? };
                Some(Self::Ready { floor: floor.parse().ok()?, whole: kind == "w", merged })
            }
            _ => None,
        }
    }
}

/// A part of a timeline, from the top or from a cursor on, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    pub ids: Vec<i64>,
    /// The list is complete from this id on; nothing is known about ids below it.
    pub floor: i64,
    /// Nothing below this id belongs to the feed; 0 if that is not known.
    pub end: i64,
}

impl List {
    /// Creates a list of as many ids as were requested, or fewer if there were no more. `floor` and
    /// `whole` are those of the timeline.
    pub fn new(mut ids: Vec<i64>, asked: usize, floor: i64, whole: bool) -> Self {
        let cut = if ids.len() < asked { 0 } else { ids.last().copied().unwrap_or(i64::MAX) };
        ids.retain(|&id| id >= floor);
        Self { ids, floor: floor.max(cut), end: if whole { floor } else { 0 } }
    }
}

/// Merges lists, taking their ids, into the page after `skip` ids. Also returns whether there are
/// more ids. Returns `None` if the lists do not reach far enough down to tell.
pub fn merge(lists: &mut [List], skip: usize, limit: usize) -> Option<(Vec<i64>, bool)> {
    let floor = lists.iter().map(|list| list.floor).max().unwrap_or(0);
    let end = lists.iter().map(|list| list.end).max().unwrap_or(0);
    for List { ids, .. } in &mut *lists {
        ids.truncate(ids.partition_point(|&id| id >= floor));
    }
    let mut joined = match lists {
        [only] => take(&mut only.ids),
        lists => {
            let ids: BTreeSet<_> = lists.iter().flat_map(|list| &list.ids).copied().map(Reverse).collect();
            ids.into_iter().map(|Reverse(id)| id).collect()
        }
    };
    let more = joined.len() > skip + limit;
    if !more && floor > end {
        return None;
    }
    joined.truncate(skip + limit);
    joined.drain(..skip.min(joined.len()));
    Some((joined, more))
}

/// Parses the post ids in a response; other members are ignored.
pub fn ids(values: &[Value]) -> Vec<i64> {
    let id = |value: &Value| match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
        _ => None,
    };
    values.iter().filter_map(id).collect()
}

/// Returns the members of a response.
pub fn members(value: Value) -> Vec<Value> {
    match value {
        Value::Array(values) => values,
        _ => Vec::new(),
    }
}

/// Returns the marker, which is the first member; `None` if there is no timeline.
pub fn mark(values: &[Value]) -> Result<Option<Mark>, Unknown> {
    match values.first() {
        Some(Value::BulkString(bytes)) => Mark::decode(bytes).map(Some),
        Some(other) => Err(Unknown::new("mark of a timeline", format!("{other:?}"))),
        None => Ok(None),
    }
}

/// Parses a number; `None` if the value is not one.
pub fn number(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_mark_reads_back_as_written(
            floor in 0..i64::MAX, whole: bool, token: u64, merged in prop::collection::vec(".{0,9}", 0..4),
        ) {
            for mark in [Mark::Building(token), Mark::Ready { floor, whole, merged }] {
                prop_assert_eq!(Mark::decode(mark.encode().as_bytes()), Ok(mark));
            }
        }

        #[test]
        fn a_key_is_parsed_into_its_owner(epoch in 0..i64::MAX, name in ".{0,9}", prefix in ".{0,9}") {
            let keys = Keys::new(&prefix);
            for owner in [Owner::User(name.clone()), Owner::Author(name)] {
                let key = keys.timeline(epoch, &owner);
                prop_assert_eq!(keys.owner(epoch, key.as_bytes()), Some(owner));
                prop_assert_eq!(keys.owner(epoch ^ 1, key.as_bytes()), None);
            }
            prop_assert_eq!(keys.owner(epoch, keys.epoch().as_bytes()), None);
        }

        /// Cuts lists anywhere, and removes some ids below their floor, where the feed may end. A
        /// page merged from them must equal the page of the complete lists.
        #[test]
        fn a_page_of_cut_lists_is_that_of_the_whole_or_none(
            feeds in prop::collection::vec(prop::collection::btree_set(1_i64..200, 0..40), 1..5),
            asked in prop::collection::vec(1_usize..50, 5), floors in prop::collection::vec(0_i64..200, 5),
            ends: bool, skip in 0_usize..20, limit in 1_usize..20,
        ) {
            // Only a user's own rows define where a feed ends.
            let whole = |place| ends && place == 0;
            let end = if ends { floors[0] } else { 0 };
            let newest_first = |ids: &BTreeSet<i64>| ids.iter().rev().copied().collect::<Vec<_>>();
            let mut lists: Vec<List> = feeds.iter().zip(&asked).zip(&floors).enumerate().map(|(place, ((feed, &asked), &floor))| {
                let kept = newest_first(feed).into_iter().filter(|id| *id >= floor || id % 2 == 0);
                List::new(kept.take(asked).collect(), asked, floor, whole(place))
            }).collect();
            let all = newest_first(&feeds.iter().flatten().copied().filter(|&id| id >= end).collect());
            let merged = merge(&mut lists, skip, limit);
            if let Some((page, more)) = &merged {
                prop_assert_eq!(page, &all.iter().skip(skip).take(limit).copied().collect::<Vec<_>>());
                prop_assert_eq!(*more, all.len() > skip + limit);
            }
            if asked.iter().all(|&asked| asked > skip + limit) && floors[1..].iter().all(|&floor| floor == 0) && (ends || floors[0] == 0) {
                prop_assert!(merged.is_some(), "enough ids were requested");
            }
        }
    }

    #[test]
    fn ids_below_the_floor_of_a_list_are_unknown() {
        let list = |ids: &[i64], floor| List::new(ids.to_vec(), 5, floor, false);
        let cut = list(&[9, 7, 4], 7);
        let merge = |lists: &[&List], limit| merge(&mut lists.iter().copied().cloned().collect::<Vec<_>>(), 0, limit);
        assert_eq!(merge(&[&cut], 1), Some((vec![9], true)));
        assert_eq!(merge(&[&cut], 2), None);
        assert_eq!(merge(&[&cut, &list(&[8, 3], 0)], 2), Some((vec![9, 8], true)));
        assert_eq!(merge(&[&list(&[], 3)], 2), None);
        assert_eq!(merge(&[&list(&[], 0)], 2), Some((vec![], false)));
        let ended = List::new(vec![9, 7, 4], 5, 7, true);
        assert_eq!(merge(&[&ended, &list(&[8, 3], 0)], 5), Some((vec![9, 8, 7], false)));
    }
}
