//! Checks random histories of the topic against two views: a model of the rules in Rust, and the
//! production scripts on a Redis server of the test. Between the steps of a history the projection
//! crashes, Redis loses its data, hours pass, values expire, and the log is compacted.

mod model;
mod redis;

use std::collections::BTreeMap;

use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestError, TestRng, TestRunner},
};

use self::{
    model::Model,
    redis::{RedisView, Server},
};
use super::script::Scripts;

/// Hours after the last sight of a write within which a duplicate may arrive.
const DAY: i32 = 24;
/// Hours for which Kafka keeps every record, and Redis keeps ids and deleted keys.
const LAG: i32 = 36;
/// Age in hours from which a write's id is not stored when it is read.
const FORGET_AFTER: i32 = 48;

/// Histories per test. Redis takes about 2 ms for one.
const CASES: u32 = 4_000;

/// A number, and the hour at which it expires; `None` if deleted.
type Value = Option<(u32, Option<i32>)>;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// A write with this id.
    Idempotent(u8),
    /// Written by the projection; holds up to this offset.
    Restated(i64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Record {
    offset: i64,
    hour: i32,
    key: u8,
    kind: Kind,
    value: Value,
}

/// A record that the projection appends: key, offset up to which it holds, and value.
type Restated = (u8, i64, Value);

/// View of one partition with its projection.
trait View {
    /// Everything below this offset is in the view.
    fn next(&self) -> i64;
    /// Applies the records of a batch that the view lacks.
    fn apply(&mut self, batch: &[Record], hour: i32);
    /// Returns what must be restated after a batch. Records below `settled` were finished before.
    fn restatements(&mut self, batch: &[Record], settled: i64) -> Vec<Restated>;
    /// Returns the tombstones of expired values. Drops deleted keys past their retention.
    fn expired(&mut self, hour: i32) -> Vec<Restated>;
    /// Loses the data, with or without the stored ids, and reads a log up to its end.
    fn rebuild(&mut self, ids_too: bool, log: &[Record], end: i64, hour: i32);
    /// Lets hours pass for data that expires by itself.
    fn pass(&mut self, hours: i32);
    /// Returns version and value of each key, expired or not.
    fn entries(&mut self) -> BTreeMap<u8, (i64, Value)>;
}

/// The topic, its projection, and the values that clients must see.
struct World<V> {
    hour: i32,
    end: i64,
    log: Vec<Record>,
    view: V,
    /// Commit point: restatements of records below are written.
    committed: i64,
    wanted: BTreeMap<u8, Value>,
    sights: BTreeMap<(u8, u8), i32>,
}

/// Returns the values that have not expired.
fn live(values: impl IntoIterator<Item = (u8, Value)>, hour: i32) -> BTreeMap<u8, u32> {
    let live = |value: (u32, Option<i32>)| value.1.is_none_or(|expires| expires > hour).then_some(value.0);
    values.into_iter().filter_map(|(key, value)| Some((key, live(value?)?))).collect()
}

impl<V: View> World<V> {
    fn new(view: V) -> Self {
        let (wanted, sights) = (BTreeMap::new(), BTreeMap::new());
        Self { hour: 0, end: 0, log: Vec::new(), view, committed: 0, wanted, sights }
    }

    fn append(&mut self, key: u8, kind: Kind, value: Value) {
        self.log.push(Record { offset: self.end, hour: self.hour, key, kind, value });
        self.end += 1;
    }

    fn append_restated(&mut self, restated: Vec<Restated>) {
        for (key, version, value) in restated {
            self.append(key, Kind::Restated(version), value);
        }
    }

    fn write(&mut self, key: u8, id: Option<u8>, number: Option<u32>, ttl: Option<i32>) {
        let value = number.map(|number| (number, ttl.map(|hours| self.hour + hours)));
        let last = id.and_then(|id| self.sights.insert((id, key), self.hour));
        if last.is_none_or(|last| self.hour - last > DAY) {
            self.wanted.insert(key, value);
        }
        self.append(key, id.map_or(Kind::Plain, Kind::Idempotent), value);
    }

    /// Projects the next records as one batch. A crash happens before the restatements.
    fn project(&mut self, count: usize, crash: bool) {
        let next = self.view.next().min(self.committed);
        let batch: Vec<Record> = self.log.iter().filter(|record| record.offset >= next).take(count).copied().collect();
        self.view.apply(&batch, self.hour);
        if crash {
            return;
        }
        let restated = self.view.restatements(&batch, self.committed);
        self.append_restated(restated);
        let done = batch.last().map_or(next, |record| record.offset + 1);
        self.committed = self.committed.max(done);
    }

    fn settle(&mut self) {
        while self.committed < self.end && self.log.iter().any(|record| record.offset >= self.committed) {
            self.project(3, false);
        }
    }

    /// Searches for expired values. A crash happens before their tombstones.
    fn expire(&mut self, crash: bool) {
        let tombstones = self.view.expired(self.hour);
        if !crash {
            self.append_restated(tombstones);
        }
    }

    fn wait(&mut self, hours: i32) {
        // The projection is never behind for longer than the compaction lag minus a day.
        self.settle();
        self.hour += hours;
        self.view.pass(hours);
    }

    /// Drops the chosen records among those that compaction may drop: never the last record of a
    /// key, nothing younger than the lag, and a final tombstone only together with all records
    /// before it.
    fn compact(&mut self, choices: &[bool]) {
        let hour = self.hour;
        let old = |record: &Record| record.hour + LAG < hour;
        let last: BTreeMap<u8, Record> = self.log.iter().map(|record| (record.key, *record)).collect();
        let dropped_with_all = |record: &Record| {
            let last = last[&record.key];
            last.value.is_none() && last.hour + LAG + DAY < hour && choices[record.key as usize % choices.len()]
        };
        let mut choice = choices.iter().cycle();
        self.log.retain(|record| {
            let dropped = *choice.next().unwrap_or(&false) && old(record) && last[&record.key].offset != record.offset;
            !dropped && !dropped_with_all(record)
        });
    }

    /// Reads the log again up to its end. Records below the commit point are not restated again.
    fn rebuild(&mut self, ids_too: bool) {
        self.view.rebuild(ids_too, &self.log, self.end, self.hour);
    }

    fn run(mut self, steps: &[Step]) -> Self {
        for step in steps {
            match step {
                Step::Push(key, value, ttl) => self.write(*key, None, Some(*value), *ttl),
                Step::Delete(key) => self.write(*key, None, None, None),
                // The body of an id is always the same. Some are deletes, and some expire.
                Step::Idempotent(key, id) => {
                    let number = (*id > 0).then_some(10_000 + u32::from(*id));
                    self.write(*key, Some(*id), number, (*id > 1).then_some(10));
                }
                Step::Project(count, crash) => self.project(*count, *crash),
                Step::Expire(crash) => self.expire(*crash),
                Step::Wait(hours) => self.wait(*hours),
                Step::Compact(choices) => self.compact(choices),
                Step::Lose(ids_too) => self.rebuild(*ids_too),
            }
        }
        // A value whose tombstone was prevented by a crash is due again.
        self.wait(1);
        self.expire(false);
        self.settle();
        self
    }

    /// Returns the values that clients see.
    fn values(&mut self) -> BTreeMap<u8, u32> {
        live(self.view.entries().into_iter().map(|(key, (_, value))| (key, value)), self.hour)
    }

    /// Compares the final state with the writes.
    fn check(&mut self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.values(), live(self.wanted.clone(), self.hour));
        let last: BTreeMap<u8, &Record> = self.log.iter().map(|record| (record.key, record)).collect();
        for record in last.values() {
            let expired = record.value.and_then(|(_, expires)| expires).is_some_and(|expires| expires <= self.hour);
            prop_assert!(!expired, "no tombstone after {:?} in hour {}", record, self.hour);
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Key, value, and the TTL in hours.
    Push(u8, u32, Option<i32>),
    Delete(u8),
    /// Key and id.
    Idempotent(u8, u8),
    Project(usize, bool),
    Expire(bool),
    Wait(i32),
    Compact(Vec<bool>),
    /// Redis loses everything; `true` includes the ids of writes.
    Lose(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ttl = prop_oneof![1 => Just(None), 1 => (1..50_i32).prop_map(Some)];
    let step = prop_oneof![
        3 => (0..2_u8, 0..1_000_u32, ttl).prop_map(|(key, value, ttl)| Step::Push(key, value, ttl)),
        1 => (0..2_u8).prop_map(Step::Delete),
        5 => (0..2_u8, 0..4_u8).prop_map(|(key, id)| Step::Idempotent(key, id)),
        4 => (1..5_usize, any::<bool>()).prop_map(|(count, crash)| Step::Project(count, crash)),
        2 => any::<bool>().prop_map(Step::Expire),
        3 => (1..26_i32).prop_map(Step::Wait),
        2 => prop::collection::vec(any::<bool>(), 1..12).prop_map(Step::Compact),
        2 => any::<bool>().prop_map(Step::Lose),
    ];
    prop::collection::vec(step, 1..60)
}

/// Records to drop after a history, and the hours to wait before.
fn compactions() -> impl Strategy<Value = (Vec<bool>, i32)> {
    (prop::collection::vec(any::<bool>(), 1..40), 0..100_i32)
}

/// Returns the values before and after a compaction and a rebuild.
fn rebuilt<V: View>(world: &mut World<V>, choices: &[bool], wait: i32) -> (BTreeMap<u8, u32>, BTreeMap<u8, u32>) {
    world.wait(wait);
    let before = world.values();
    world.compact(choices);
    world.rebuild(true);
    (before, world.values())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn the_view_has_the_last_writes_after_any_loss_and_compaction(steps in steps()) {
        World::new(Model::default()).run(&steps).check()?;
    }

    #[test]
    fn a_rebuild_from_any_compacted_log_gives_the_same_view(steps in steps(), (choices, wait) in compactions()) {
        let mut world = World::new(Model::default()).run(&steps);
        let (before, after) = rebuilt(&mut world, &choices, wait);
        prop_assert_eq!(after, before);
    }
}

/// Runs the scripts and the model with the same history. They must agree, and the scripts must keep
/// the same guarantees.
fn compare(view: RedisView<'_>, steps: &[Step], (choices, wait): (&[bool], i32)) -> Result<(), TestCaseError> {
    let mut model = World::new(Model::default()).run(steps);
    let mut world = World::new(view).run(steps);
    world.check()?;
    prop_assert_eq!(&world.log, &model.log);
    prop_assert_eq!(world.view.entries(), model.view.entries());
    let (before, after) = rebuilt(&mut world, choices, wait);
    prop_assert_eq!(after, before);
    Ok(())
}

#[test]
fn the_scripts_in_redis_agree_with_the_model() {
    let server = Server::start();
    let scripts = Scripts::default();
    let config = ProptestConfig { source_file: Some(file!()), ..ProptestConfig::with_cases(CASES) };
    let outcome = TestRunner::new(config).run(&(steps(), compactions()), |(steps, (choices, wait))| {
        compare(RedisView::new(&server, &scripts), &steps, (&choices, wait))
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// The histories detect each of these faults in a script.
#[test]
fn a_fault_in_a_script_is_detected() {
    const FAULTS: [(&str, &str); 8] = [
        ("applies = not double or not present", "applies = true"),
        ("tonumber(first) < tonumber(version) and ", ""),
        ("<= 86400", "<= 90000"),
        ("local applies = tonumber(version) >= newest", "local applies = true"),
        ("if ARGV[at + 7] ~= '' then", "if false then"),
        ("(applies and version or first)", "version"),
        ("redis.call('ZADD', KEYS[2], ARGV[2], field)", "redis.call('ZREM', KEYS[2], field)"),
        ("return {#fields, expired}", "return {#expired, expired}"),
    ];
    let server = Server::start();
    for (right, wrong) in FAULTS {
        let scripts = Scripts::altered(right, wrong);
        let config =
            ProptestConfig { failure_persistence: None, max_shrink_iters: 0, ..ProptestConfig::with_cases(CASES) };
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let outcome = TestRunner::new_with_rng(config, random)
            .run(&(steps(), compactions()), |(steps, (choices, wait))| {
                compare(RedisView::new(&server, &scripts), &steps, (&choices, wait))
            });
        assert!(matches!(outcome, Err(TestError::Fail(..))), "no history distinguishes `{wrong}` from `{right}`");
    }
}
