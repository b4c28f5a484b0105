//! Property test of the schedule against a ledger that checks its invariants, under random
//! finishes, failures, pauses, rebalances and crashes, over a log with few keys and many records
//! per key.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::schedule::{Job, Schedule, Span, Ticket};
use crate::batch::Batch;

const PARTITIONS: i32 = 3;
const LOG: usize = 60;

/// Violated invariant.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Violation {
    #[error("{partition}@{offset} started before {earlier} of the same key was finished")]
    KeyOutOfOrder { partition: i32, offset: i64, earlier: i64 },
    #[error("{partition}@{offset} is already running")]
    RunsTwice { partition: i32, offset: i64 },
    #[error("{partition} is committed to {point}, but {unfinished} is unfinished")]
    CommittedTooFar { partition: i32, point: i64, unfinished: i64 },
    #[error("the commit of {partition} went back from {before} to {point}")]
    CommitWentBack { partition: i32, before: i64, point: i64 },
    #[error("{partition} ended with {finished} of {LOG} records finished, committed {committed:?}")]
    Incomplete { partition: i32, finished: usize, committed: Option<i64> },
}

/// Record of everything that happened. Each step returns an error if it violates an invariant.
#[derive(Default)]
struct Ledger {
    /// By partition: the offsets of finished records.
    done: BTreeMap<i32, BTreeSet<i64>>,
    running: BTreeSet<(i32, u64, i64)>,
    committed: BTreeMap<i32, i64>,
}

/// Returns the key of a record; `None` for a record that waits for no other. The first key has most
/// of the records.
fn key_of(partition: i32, offset: i64) -> Option<u8> {
    match (offset * 7 + i64::from(partition)) % 10 {
        0 => None,
        1 => Some(1),
        2 => Some(2),
        3 => Some(3),
        _ => Some(0),
    }
}

impl Ledger {
    fn started(&mut self, partition: i32, generation: u64, offset: i64) -> Result<(), Violation> {
        if let Some(key) = key_of(partition, offset) {
            let done = self.done.entry(partition).or_default();
            let before =
                (0..offset).find(|&earlier| key_of(partition, earlier) == Some(key) && !done.contains(&earlier));
            if let Some(earlier) = before {
                return Err(Violation::KeyOutOfOrder { partition, offset, earlier });
            }
        }
        if !self.running.insert((partition, generation, offset)) {
            return Err(Violation::RunsTwice { partition, offset });
        }
        Ok(())
    }

    fn finished(&mut self, partition: i32, generation: u64, offset: i64, with_effect: bool) {
        self.running.remove(&(partition, generation, offset));
        if with_effect {
            self.done.entry(partition).or_default().insert(offset);
        }
    }

    fn committed(&mut self, partition: i32, point: i64) -> Result<(), Violation> {
        let done = self.done.entry(partition).or_default();
        if let Some(unfinished) = (0..point).find(|offset| !done.contains(offset)) {
            return Err(Violation::CommittedTooFar { partition, point, unfinished });
        }
        let before = self.committed.insert(partition, point).unwrap_or(0);
        if point < before { Err(Violation::CommitWentBack { partition, before, point }) } else { Ok(()) }
    }

    fn completed(&self) -> Result<(), Violation> {
        for partition in 0..PARTITIONS {
            let finished = self.done.get(&partition).map_or(0, BTreeSet::len);
            let committed = self.committed.get(&partition).copied();
            if finished != LOG || committed != Some(LOG as i64) {
                return Err(Violation::Incomplete { partition, finished, committed });
            }
        }
        Ok(())
    }
}

/// Simulated consumer and the log that it reads.
struct World {
    schedule: Schedule,
    ledger: Ledger,
    /// By owned partition: its generation and read position.
    owned: BTreeMap<i32, (u64, usize)>,
    jobs: Vec<Job>,
    /// Records still being processed after their partition was lost.
    zombies: Vec<Ticket>,
    generation: u64,
    now: Instant,
}

#[derive(Debug, Clone)]
enum Step {
    Read {
        partition: i32,
        records: usize,
    },
    Start,
    Finish {
        which: usize,
    },
    Fail {
        which: usize,
        ms: u64,
    },
    Pass {
        ms: u64,
    },
    Commit,
    Assign {
        partition: i32,
    },
    /// Revokes a partition; `in_time` running records finish within the deadline.
    Revoke {
        partition: i32,
        in_time: usize,
    },
    /// Loses everything except the commits.
    Crash,
    /// A member finishes a record after it has lost the partition.
    ZombieFinish {
        which: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let partition = 0..PARTITIONS;
    let step = prop_oneof![
        4 => (partition.clone(), 1..9_usize).prop_map(|(partition, records)| Step::Read { partition, records }),
        8 => Just(Step::Start),
        8 => any::<usize>().prop_map(|which| Step::Finish { which }),
        3 => (any::<usize>(), 0..50_u64).prop_map(|(which, ms)| Step::Fail { which, ms }),
        3 => (0..60_u64).prop_map(|ms| Step::Pass { ms }),
        3 => Just(Step::Commit),
        2 => partition.clone().prop_map(|partition| Step::Assign { partition }),
        1 => (partition, 0..4_usize).prop_map(|(partition, in_time)| Step::Revoke { partition, in_time }),
        1 => Just(Step::Crash),
        1 => any::<usize>().prop_map(|which| Step::ZombieFinish { which }),
    ];
    prop::collection::vec(step, 1..400)
}

impl World {
    fn new() -> Self {
        Self {
            schedule: Schedule::new(Span { records: 20, bytes: 1 << 20 }),
            ledger: Ledger::default(),
            owned: BTreeMap::new(),
            jobs: Vec::new(),
            zombies: Vec::new(),
            generation: 0,
            now: Instant::now(),
        }
    }

    fn apply(&mut self, step: &Step) -> Result<(), Violation> {
        match *step {
            Step::Read { partition, records } => self.read(partition, records),
            Step::Start => return self.start(),
            Step::Finish { which } if !self.jobs.is_empty() => {
                let job = self.jobs.swap_remove(which % self.jobs.len());
                self.finish(&job);
            }
            Step::Fail { which, ms } if !self.jobs.is_empty() => {
                let job = self.jobs.swap_remove(which % self.jobs.len());
                self.ledger.finished(job.ticket.partition, job.ticket.generation, offset(&job), false);
                let due = self.now + Duration::from_millis(ms);
                self.schedule.delay(job.ticket, due, |trouble| trouble.attempts += 1);
            }
            Step::Pass { ms } => {
                self.now += Duration::from_millis(ms);
                self.schedule.wake(self.now);
            }
            Step::Commit => return self.commit_all(),
            Step::Assign { partition } => self.assign(partition),
            Step::Revoke { partition, in_time } => return self.revoke(partition, in_time),
            Step::Crash => self.crash(),
            Step::ZombieFinish { which } if !self.zombies.is_empty() => {
                let ticket = self.zombies.swap_remove(which % self.zombies.len());
                self.schedule.finish(ticket);
            }
            Step::Finish { .. } | Step::Fail { .. } | Step::ZombieFinish { .. } => {}
        }
        Ok(())
    }

    fn read(&mut self, partition: i32, records: usize) {
        let Some((_, position)) = self.owned.get_mut(&partition) else { return };
        if !self.schedule.has_room(partition) || *position == LOG {
            return;
        }
        let end = (*position + records).min(LOG);
        let batch = Arc::new(Batch::of_offsets(*position as i64..end as i64));
        let keys: Vec<_> =
            (*position as i64..end as i64).map(|offset| key_of(partition, offset).map(u64::from)).collect();
        *position = end;
        self.schedule.push(partition, batch, &keys);
    }

    fn start(&mut self) -> Result<(), Violation> {
        let Some(job) = self.schedule.next() else { return Ok(()) };
        let Ticket { partition, generation, .. } = job.ticket;
        self.ledger.started(partition, generation, offset(&job))?;
        self.jobs.push(job);
        Ok(())
    }

    fn finish(&mut self, job: &Job) {
        self.ledger.finished(job.ticket.partition, job.ticket.generation, offset(job), true);
        self.schedule.finish(job.ticket);
    }

    fn commit_all(&mut self) -> Result<(), Violation> {
        let partitions: Vec<i32> = self.owned.keys().copied().collect();
        partitions.into_iter().try_for_each(|partition| self.commit(partition))
    }

    fn commit(&mut self, partition: i32) -> Result<(), Violation> {
        let point = self.schedule.window(partition).map_or(-1, |window| window.commit_point());
        if point < 0 { Ok(()) } else { self.ledger.committed(partition, point) }
    }

    fn assign(&mut self, partition: i32) {
        if self.owned.contains_key(&partition) {
            return;
        }
        self.generation += 1;
        let from = self.ledger.committed.get(&partition).copied().unwrap_or(0);
        self.schedule.open(partition, self.generation, from);
        self.owned.insert(partition, (self.generation, from as usize));
    }

    fn revoke(&mut self, partition: i32, in_time: usize) -> Result<(), Violation> {
        self.schedule.close(partition);
        let (leaving, staying) =
            std::mem::take(&mut self.jobs).into_iter().partition::<Vec<_>, _>(|job| job.ticket.partition == partition);
        self.jobs = staying;
        leaving.iter().take(in_time).for_each(|job| self.finish(job));
        assert_eq!(self.schedule.running(partition), leaving.len().saturating_sub(in_time));
        self.commit(partition)?;
        self.lose(leaving.iter().skip(in_time));
        self.schedule.remove(partition);
        self.owned.remove(&partition);
        Ok(())
    }

    fn crash(&mut self) {
        let jobs = std::mem::take(&mut self.jobs);
        self.lose(jobs.iter());
        let span = Span { records: 20, bytes: 1 << 20 };
        self.schedule = Schedule::new(span);
        self.owned.clear();
    }

    fn lose<'a>(&mut self, jobs: impl Iterator<Item = &'a Job>) {
        for job in jobs {
            self.ledger.finished(job.ticket.partition, job.ticket.generation, offset(job), false);
            self.zombies.push(job.ticket);
        }
    }

    /// Assigns every partition and processes the whole log without further faults.
    fn finish_log(&mut self) -> Result<(), Violation> {
        for _ in 0..(LOG * 40) {
            (0..PARTITIONS).for_each(|partition| self.assign(partition));
            (0..PARTITIONS).for_each(|partition| self.read(partition, 8));
            self.now += Duration::from_millis(100);
            self.schedule.wake(self.now);
            self.start()?;
            if let Some(job) = self.jobs.pop() {
                self.finish(&job);
            }
            self.commit_all()?;
        }
        self.ledger.completed()
    }
}

fn offset(job: &Job) -> i64 {
    job.batch.record(job.index as usize).offset()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn commits_follow_effects_keys_keep_their_order_and_no_record_is_skipped(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step)?;
        }
        world.finish_log()?;
        prop_assert_eq!(world.schedule.window(0).map(|window| (window.span(), window.bytes())), Some((0, 0)));
    }
}

#[test]
fn the_ledger_finds_a_commit_past_an_unfinished_record() {
    let mut ledger = Ledger::default();
    ledger.started(0, 1, 0).unwrap();
    ledger.finished(0, 1, 1, true);
    assert_eq!(ledger.committed(0, 2), Err(Violation::CommittedTooFar { partition: 0, point: 2, unfinished: 0 }));
}

#[test]
fn the_ledger_finds_a_key_out_of_order_and_a_record_that_runs_twice() {
    let mut ledger = Ledger::default();
    let of_key_0: Vec<i64> = (0..20).filter(|&offset| key_of(0, offset) == Some(0)).collect();
    let (earlier, offset) = (of_key_0[0], of_key_0[1]);
    assert_eq!(ledger.started(0, 1, offset), Err(Violation::KeyOutOfOrder { partition: 0, offset, earlier }));
    ledger.started(0, 1, earlier).unwrap();
    assert_eq!(ledger.started(0, 1, earlier), Err(Violation::RunsTwice { partition: 0, offset: earlier }));
}

#[test]
fn the_ledger_finds_a_skipped_record_and_a_commit_that_goes_back() {
    let mut ledger = Ledger::default();
    (0..10).for_each(|offset| ledger.finished(0, 1, offset, true));
    ledger.committed(0, 10).unwrap();
    assert_eq!(ledger.committed(0, 9), Err(Violation::CommitWentBack { partition: 0, before: 10, point: 9 }));
    let skipped = Violation::Incomplete { partition: 0, finished: 10, committed: Some(9) };
    assert_eq!(ledger.completed(), Err(skipped));
}
