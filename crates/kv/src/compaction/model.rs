//! The rules of the scripts, in Rust.

use std::collections::BTreeMap;

use super::{DAY, FORGET_AFTER, Kind, LAG, Record, Restated, Value, View};

/// State of Redis according to the rules of the scripts.
#[derive(Default)]
pub(super) struct Model {
    hour: i32,
    next: i64,
    entries: BTreeMap<u8, (i64, Value)>,
    /// Hour at which a key is checked.
    due: BTreeMap<u8, i32>,
    ids: BTreeMap<(u8, u8), Id>,
}

/// Stored state of a write with an id.
#[derive(Clone, Copy)]
struct Id {
    first: i64,
    seen: i32,
    /// Hour at which it expires.
    until: i32,
}

impl Model {
    fn apply_one(&mut self, record: &Record, hour: i32) {
        let newest = self.entries.get(&record.key).map_or(-1, |(version, _)| *version);
        let (applies, version) = match record.kind {
            Kind::Plain => (true, record.offset),
            Kind::Restated(version) => (version >= newest, version),
            Kind::Idempotent(id) => {
                let memory = self.ids.get(&(id, record.key)).copied();
                let duplicate = memory.filter(|id| id.first < record.offset && record.hour - id.seen <= DAY);
                let applies = duplicate.is_none() || newest < 0;
                let first = duplicate.filter(|_| !applies).map_or(record.offset, |id| id.first);
                if hour - record.hour < FORGET_AFTER {
                    self.ids.insert((id, record.key), Id { first, seen: record.hour, until: hour + LAG });
                }
                (applies, record.offset)
            }
        };
        if applies {
            self.entries.insert(record.key, (version, record.value));
            match record.value {
                None => self.due.insert(record.key, hour + LAG),
                Some((_, Some(expires))) => self.due.insert(record.key, expires),
                Some((_, None)) => None,
            };
        }
        self.next = record.offset + 1;
    }

    fn restatement(&self, record: &Record) -> Option<Restated> {
        let (entry, value) = *self.entries.get(&record.key)?;
        let unsettled = match record.kind {
            Kind::Plain => false,
            Kind::Restated(version) => entry > version,
            Kind::Idempotent(id) => self.ids.get(&(id, record.key))?.first < record.offset,
        };
        (unsettled && entry < record.offset).then_some((record.key, self.next - 1, value))
    }
}

impl View for Model {
    fn next(&self) -> i64 {
        self.next
    }

    fn apply(&mut self, batch: &[Record], hour: i32) {
        for record in batch {
            if record.offset >= self.next {
                self.apply_one(record, hour);
            }
        }
    }

    fn restatements(&mut self, batch: &[Record], settled: i64) -> Vec<Restated> {
        let unsettled = batch.iter().filter(|record| record.offset >= settled);
        unsettled.filter_map(|record| self.restatement(record)).collect()
    }

    fn expired(&mut self, hour: i32) -> Vec<Restated> {
        let mut tombstones = Vec::new();
        let due: Vec<u8> = self.due.iter().filter(|(_, at)| **at <= hour).map(|(key, _)| *key).collect();
        for key in due {
            self.due.remove(&key);
            match self.entries.get(&key) {
                Some((_, None)) => {
                    self.entries.remove(&key);
                }
                Some((_, Some((_, Some(expires))))) if *expires > hour => {
                    self.due.insert(key, *expires);
                }
                Some((_, Some((_, Some(_))))) => {
                    self.due.insert(key, hour + 1);
                    tombstones.push((key, self.next - 1, None));
                }
                _ => {}
            }
        }
        tombstones
    }

    fn rebuild(&mut self, ids_too: bool, log: &[Record], end: i64, hour: i32) {
        let ids = std::mem::take(self).ids;
        self.hour = hour;
        if !ids_too {
            self.ids = ids;
        }
        self.apply(log, hour);
        self.next = end;
    }

    fn pass(&mut self, hours: i32) {
        self.hour += hours;
        self.ids.retain(|_, id| id.until > self.hour);
    }

    fn entries(&mut self) -> BTreeMap<u8, (i64, Value)> {
        self.entries.clone()
    }
}
