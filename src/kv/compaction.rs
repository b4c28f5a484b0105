//! A model of the view's rules, held against every log that compaction may leave of a history.

use std::collections::BTreeMap;

use proptest::prelude::*;

/// Hours: how long a double may come after the last sight of its write, and for how long Kafka keeps
/// everything.
const DAY: i32 = 24;
const LAG: i32 = 36;

type Value = Option<u32>;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    /// A write with this id.
    Idempotent(u8),
    /// Written by the projection, for all up to this offset.
    Restated(i64),
}

#[derive(Debug, Clone, Copy)]
struct Record {
    offset: i64,
    hour: i32,
    key: u8,
    kind: Kind,
    value: Value,
}

/// What Redis has, by the rules of the script.
#[derive(Default, Clone)]
struct View {
    next: i64,
    entries: BTreeMap<u8, (i64, Value)>,
    /// By id and key: the first offset and the last sight.
    ids: BTreeMap<(u8, u8), (i64, i32)>,
}

impl View {
    fn apply(&mut self, record: &Record) {
        let newest = self.entries.get(&record.key).map_or(-1, |(version, _)| *version);
        let (applies, version) = match record.kind {
            Kind::Plain => (true, record.offset),
            Kind::Restated(version) => (version >= newest, version),
            Kind::Idempotent(id) => {
                let memory = self.ids.get(&(id, record.key)).copied();
                let double = memory.filter(|(first, seen)| *first < record.offset && record.hour - *seen <= DAY);
                let applies = double.is_none() || newest < 0;
                let first = double.filter(|_| !applies).map_or(record.offset, |(first, _)| first);
                self.ids.insert((id, record.key), (first, record.hour));
                (applies, record.offset)
            }
        };
        if applies {
            self.entries.insert(record.key, (version, record.value));
        }
        self.next = record.offset + 1;
    }

    /// What must be said again after this record.
    fn restatement(&self, record: &Record) -> Option<(Kind, Value)> {
        let (entry, value) = *self.entries.get(&record.key)?;
        let unsettled = match record.kind {
            Kind::Plain => false,
            Kind::Restated(version) => entry > version,
            Kind::Idempotent(id) => self.ids.get(&(id, record.key))?.0 < record.offset,
        };
        (unsettled && entry < record.offset).then_some((Kind::Restated(self.next - 1), value))
    }

    fn values(&self) -> BTreeMap<u8, u32> {
        self.entries.iter().filter_map(|(key, (_, value))| Some((*key, (*value)?))).collect()
    }
}

/// The topic, its projection, and what clients are entitled to see.
#[derive(Default)]
struct World {
    hour: i32,
    end: i64,
    log: Vec<Record>,
    view: View,
    /// Below, restatements are written.
    committed: i64,
    wanted: BTreeMap<u8, Value>,
    sights: BTreeMap<(u8, u8), i32>,
}

impl World {
    fn append(&mut self, key: u8, kind: Kind, value: Value) {
        self.log.push(Record { offset: self.end, hour: self.hour, key, kind, value });
        self.end += 1;
    }

    fn write(&mut self, key: u8, id: Option<u8>, value: Value) {
        let last = id.and_then(|id| self.sights.insert((id, key), self.hour));
        if last.is_none_or(|last| self.hour - last > DAY) {
            self.wanted.insert(key, value);
        }
        self.append(key, id.map_or(Kind::Plain, Kind::Idempotent), value);
    }

    /// Projects the next records as one batch. A crash comes before what is to be said again.
    fn project(&mut self, count: usize, crash: bool) {
        let next = self.view.next.min(self.committed);
        let batch: Vec<Record> = self.log.iter().filter(|record| record.offset >= next).take(count).copied().collect();
        for record in &batch {
            if record.offset >= self.view.next {
                self.view.apply(record);
            }
        }
        if crash {
            return;
        }
        let committed = self.committed;
        for record in batch.iter().filter(|record| record.offset >= committed) {
            if let Some((kind, value)) = self.view.restatement(record) {
                self.append(record.key, kind, value);
            }
        }
        let done = batch.last().map_or(next, |record| record.offset + 1);
        self.committed = self.committed.max(done);
    }

    fn settle(&mut self) {
        while self.committed < self.end && self.log.iter().any(|record| record.offset >= self.committed) {
            self.project(3, false);
        }
    }

    /// Drops what the choices say of what compaction may drop: not the last record of a key, nothing
    /// young, and a last tombstone only together with all before it.
    fn compact(&mut self, choices: &[bool]) {
        let hour = self.hour;
        let old = |record: &Record| record.hour + LAG < hour;
        let last: BTreeMap<u8, Record> = self.log.iter().map(|record| (record.key, *record)).collect();
        let gone = |record: &Record| {
            let last = last[&record.key];
            last.value.is_none() && last.hour + LAG + DAY < hour && choices[record.key as usize % choices.len()]
        };
        let mut choice = choices.iter().cycle();
        self.log.retain(|record| {
            let dropped = *choice.next().unwrap_or(&false) && old(record) && last[&record.key].offset != record.offset;
            !dropped && !gone(record)
        });
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push(u8, u32),
    Delete(u8),
    Idempotent(u8, u8),
    Project(usize, bool),
    Wait(i32),
    Compact(Vec<bool>),
    /// Redis loses everything; true: with the ids of writes as well.
    Lose(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..2_u8, 0..1_000_u32).prop_map(|(key, value)| Step::Push(key, value)),
        1 => (0..2_u8).prop_map(Step::Delete),
        5 => (0..2_u8, 0..3_u8).prop_map(|(key, id)| Step::Idempotent(key, id)),
        4 => (1..5_usize, any::<bool>()).prop_map(|(count, crash)| Step::Project(count, crash)),
        3 => (1..26_i32).prop_map(Step::Wait),
        2 => prop::collection::vec(any::<bool>(), 1..12).prop_map(Step::Compact),
        2 => any::<bool>().prop_map(Step::Lose),
    ];
    prop::collection::vec(step, 1..60)
}

fn run(steps: &[Step]) -> World {
    let mut world = World::default();
    for step in steps {
        match step {
            Step::Push(key, value) => world.write(*key, None, Some(*value)),
            Step::Delete(key) => world.write(*key, None, None),
            // The body of an id is always the same, and some are deletes.
            Step::Idempotent(key, id) => world.write(*key, Some(*id), (*id > 0).then_some(10_000 + u32::from(*id))),
            Step::Project(count, crash) => world.project(*count, *crash),
            Step::Wait(hours) => {
                // The projection is never behind for as long as compaction waits beyond a day.
                world.settle();
                world.hour += hours;
            }
            Step::Compact(choices) => world.compact(choices),
            Step::Lose(ids_too) => {
                let ids = std::mem::take(&mut world.view).ids;
                if !ids_too {
                    world.view.ids = ids;
                }
                world.rebuild();
            }
        }
    }
    world.settle();
    world
}

impl World {
    /// Reads the log again up to its end; below the commit nothing is said again.
    fn rebuild(&mut self) {
        for record in self.log.clone() {
            self.view.apply(&record);
        }
        self.view.next = self.end;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn the_view_is_what_was_written_last_whatever_was_lost_and_compacted(steps in steps()) {
        let world = run(&steps);
        let wanted: BTreeMap<u8, u32> =
            world.wanted.iter().filter_map(|(key, value)| Some((*key, (*value)?))).collect();
        prop_assert_eq!(world.view.values(), wanted);
    }

    #[test]
    fn a_rebuild_from_any_compacted_log_gives_the_same_view(steps in steps(), choices in prop::collection::vec(any::<bool>(), 1..40), wait in 0..100_i32) {
        let mut world = run(&steps);
        let before = world.view.values();
        world.hour += wait;
        world.compact(&choices);
        world.view = View::default();
        world.rebuild();
        prop_assert_eq!(world.view.values(), before);
    }
}
