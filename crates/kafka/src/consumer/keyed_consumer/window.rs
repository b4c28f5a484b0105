//! Window of one partition: its records between the commit point and the last record read.
//!
//! The records of a key queue form a linked list through their slots; only its head may run.
//! Finished slots leave from the front, so the front is always the lowest unfinished record, and
//! its offset is the commit point. Pure bookkeeping: no I/O, no clock, no locks.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use crate::{batch::Batch, dead_letter::Reason};

/// Sequence number of a slot, unique within the window. 0 stands for none.
pub(super) type Seq = u64;

/// Hash of an ordering key. Records with equal hashes run one after the other; a record with `None`
/// waits for no other.
pub(super) type KeyHash = Option<u64>;

#[derive(Debug)]
pub(super) struct Window {
    slots: VecDeque<Slot>,
    /// Sequence number of the first slot.
    base: Seq,
    /// Last record of every key queue with unfinished records.
    tails: HashMap<u64, Seq, BuildHasherDefault<AsIs>>,
    batches: VecDeque<Held>,
    batch_base: u64,
    /// Bytes of batches with unfinished records. A batch counts in full, because it is freed as a
    /// whole.
    bytes: usize,
    /// Offset after the last record added.
    next_offset: i64,
    /// Failure history of records that failed at least once.
    trouble: HashMap<Seq, Trouble>,
    running: usize,
}

#[derive(Debug)]
struct Slot {
    offset: i64,
    key: KeyHash,
    /// Next record of the key queue; 0 if there is none yet.
    next: Seq,
    batch: u64,
    index: u32,
    done: bool,
}

#[derive(Debug)]
struct Held {
    batch: Option<Arc<Batch>>,
    unfinished: usize,
}

/// Failure history of a record.
#[derive(Debug, Clone, Default)]
pub(super) struct Trouble {
    /// Number of failed attempts.
    pub attempts: u32,
    /// Number of consecutive times that a dependency was down.
    pub holds: u32,
    /// Times of the first and the last failure, in milliseconds since the epoch.
    pub first_failed_ms: i64,
    pub last_failed_ms: i64,
    pub last_error: String,
    /// Reason for dead-lettering the record; set while its dead letter has yet to be stored.
    pub dead_letter: Option<Reason>,
}

impl Window {
    /// Creates a window whose first record will have at least this offset.
    pub fn new(next_offset: i64) -> Self {
        Self {
            slots: VecDeque::new(),
            base: 1,
            tails: HashMap::default(),
            batches: VecDeque::new(),
            batch_base: 0,
            bytes: 0,
            next_offset,
            trouble: HashMap::new(),
            running: 0,
        }
    }

    /// Adds a batch in order; `keys` has one entry per record. Calls `ready` for the records that
    /// may run at once.
    pub fn push(&mut self, batch: Arc<Batch>, keys: &[KeyHash], mut ready: impl FnMut(Seq)) {
        let number = self.batch_base + self.batches.len() as u64;
        for ((index, record), &key) in batch.iter().enumerate().zip(keys) {
            let seq = self.base + self.slots.len() as u64;
            self.slots.push_back(Slot {
                offset: record.offset(),
                key,
                next: 0,
                batch: number,
                index: index as u32,
                done: false,
            });
            match key.and_then(|key| self.tails.insert(key, seq)) {
                Some(tail) => self.slot_mut(tail).next = seq,
                None => ready(seq),
            }
        }
        if let Some(next) = batch.next_offset() {
            self.next_offset = next;
            self.bytes += batch.footprint();
            self.batches.push_back(Held { unfinished: batch.len(), batch: Some(batch) });
        }
    }

    /// Marks a slot as running and returns its record.
    pub fn start(&mut self, seq: Seq) -> Option<(Arc<Batch>, u32)> {
        let slot = &self.slots[self.position(seq)];
        let batch = self.batches[(slot.batch - self.batch_base) as usize].batch.clone()?;
        self.running += 1;
        Some((batch, slot.index))
    }

    /// Marks a running slot as not running, because it failed and will run again.
    pub fn put_back(&mut self) {
        self.running -= 1;
    }

    /// Marks a running slot as finished. Returns the next record of its key queue, which may run
    /// now.
    pub fn finish(&mut self, seq: Seq) -> Option<Seq> {
        self.running -= 1;
        self.trouble.remove(&seq);
        let position = self.position(seq);
        let slot = &mut self.slots[position];
        slot.done = true;
        let (batch, key, next) = (slot.batch, slot.key, slot.next);
        self.release(batch);
        if next == 0 {
            key.map(|key| self.tails.remove(&key));
        }
        while self.slots.front().is_some_and(|slot| slot.done) {
            self.slots.pop_front();
            self.base += 1;
        }
        (next != 0).then_some(next)
    }

    fn release(&mut self, batch: u64) {
        let held = &mut self.batches[(batch - self.batch_base) as usize];
        held.unfinished -= 1;
        if held.unfinished == 0 {
            self.bytes -= held.batch.take().map_or(0, |batch| batch.footprint());
        }
        while self.batches.front().is_some_and(|held| held.unfinished == 0) {
            self.batches.pop_front();
            self.batch_base += 1;
        }
    }

    /// Returns the commit point: all records below it are finished.
    pub fn commit_point(&self) -> i64 {
        self.slots.front().map_or(self.next_offset, |slot| slot.offset)
    }

    /// Returns the number of records from the commit point on, including finished ones.
    pub fn span(&self) -> usize {
        self.slots.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn running(&self) -> usize {
        self.running
    }

    /// Returns the lowest unfinished record, which holds the commit point.
    pub fn holder(&self) -> Option<(Seq, Arc<Batch>, u32)> {
        let slot = self.slots.front()?;
        let batch = self.batches[(slot.batch - self.batch_base) as usize].batch.clone()?;
        Some((self.base, batch, slot.index))
    }

    pub fn trouble(&self, seq: Seq) -> Option<&Trouble> {
        self.trouble.get(&seq)
    }

    pub fn trouble_mut(&mut self, seq: Seq) -> &mut Trouble {
        self.trouble.entry(seq).or_default()
    }

    fn position(&self, seq: Seq) -> usize {
        (seq - self.base) as usize
    }

    fn slot_mut(&mut self, seq: Seq) -> &mut Slot {
        let position = self.position(seq);
        &mut self.slots[position]
    }
}

/// Hasher that returns its input, because the keys are hashes already.
#[derive(Debug, Default)]
pub(super) struct AsIs(u64);

impl Hasher for AsIs {
    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, id: u64) {
        self.0 = id;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
