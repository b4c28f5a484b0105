//! Schedule of the records of a consumer: decides which may run next, over all partitions. Pure:
//! the caller passes the time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    sync::Arc,
    time::Instant,
};

use super::window::{KeyHash, Seq, Trouble, Window};
use crate::batch::Batch;

/// Identifies a record in one ownership of its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    pub partition: i32,
    pub generation: u64,
    pub seq: Seq,
}

/// Record to be processed.
#[derive(Debug)]
pub(super) struct Job {
    pub ticket: Ticket,
    pub batch: Arc<Batch>,
    pub index: u32,
    /// Earlier failures of the record, if any.
    pub trouble: Option<Trouble>,
}

/// Maximum span of a partition past its commit point.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub records: usize,
    pub bytes: usize,
}

#[derive(Debug)]
pub(super) struct Schedule {
    parts: BTreeMap<i32, Part>,
    ready: VecDeque<Ticket>,
    delayed: BinaryHeap<Reverse<(Instant, Ticket)>>,
    span: Span,
}

#[derive(Debug)]
struct Part {
    generation: u64,
    window: Window,
    /// True once no more of its records may start.
    closing: bool,
}

impl Schedule {
    pub fn new(span: Span) -> Self {
        Self { parts: BTreeMap::new(), ready: VecDeque::new(), delayed: BinaryHeap::new(), span }
    }

    /// Adds a partition that was gained. `next_offset` is where it will be read from; -1 if
    /// unknown.
    pub fn open(&mut self, partition: i32, generation: u64, next_offset: i64) {
        self.parts.insert(partition, Part { generation, window: Window::new(next_offset), closing: false });
    }

    /// Returns whether the partition accepts another batch now.
    pub fn has_room(&self, partition: i32) -> bool {
        self.parts
            .get(&partition)
            .is_some_and(|part| part.window.span() < self.span.records && part.window.bytes() < self.span.bytes)
    }

    /// Returns whether a quarter of the span is free.
    pub fn is_roomy(&self, partition: i32) -> bool {
        self.parts.get(&partition).is_some_and(|part| {
            part.window.span() <= self.span.records / 4 * 3 && part.window.bytes() <= self.span.bytes / 4 * 3
        })
    }

    pub fn push(&mut self, partition: i32, batch: Arc<Batch>, keys: &[KeyHash]) {
        let Some(part) = self.parts.get_mut(&partition) else { return };
        let (generation, ready) = (part.generation, &mut self.ready);
        part.window.push(batch, keys, |seq| ready.push_back(Ticket { partition, generation, seq }));
    }

    /// Removes and returns the next record that may run.
    pub fn next(&mut self) -> Option<Job> {
        while let Some(ticket) = self.ready.pop_front() {
            let Some(part) = owned(&mut self.parts, ticket).filter(|part| !part.closing) else { continue };
            let Some((batch, index)) = part.window.start(ticket.seq) else { continue };
            let trouble = part.window.trouble(ticket.seq).cloned();
            return Some(Job { ticket, batch, index, trouble });
        }
        None
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Marks a record as finished. A record whose partition was lost meanwhile is ignored.
    pub fn finish(&mut self, ticket: Ticket) {
        let Some(part) = owned(&mut self.parts, ticket) else { return };
        if let Some(seq) = part.window.finish(ticket.seq) {
            self.ready.push_back(Ticket { seq, ..ticket });
        }
    }

    /// Schedules the record to run again at `due`; `note` records what went wrong.
    pub fn delay(&mut self, ticket: Ticket, due: Instant, note: impl FnOnce(&mut Trouble)) {
        let Some(part) = owned(&mut self.parts, ticket) else { return };
        part.window.put_back();
        note(part.window.trouble_mut(ticket.seq));
        self.delayed.push(Reverse((due, ticket)));
    }

    /// Makes due records ready, and returns when the next one will be due.
    pub fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some(Reverse((due, ticket))) = self.delayed.peek().copied() {
            if due > now {
                return Some(due);
            }
            self.delayed.pop();
            self.ready.push_back(ticket);
        }
        None
    }

    /// Starts no more records of the partition.
    pub fn close(&mut self, partition: i32) {
        if let Some(part) = self.parts.get_mut(&partition) {
            part.closing = true;
        }
    }

    /// Returns the number of records of the partition in progress.
    pub fn running(&self, partition: i32) -> usize {
        self.window(partition).map_or(0, Window::running)
    }

    /// Removes the partition. Results of records that are still running are ignored.
    pub fn remove(&mut self, partition: i32) {
        self.parts.remove(&partition);
        self.ready.retain(|ticket| ticket.partition != partition);
        self.delayed.retain(|Reverse((_, ticket))| ticket.partition != partition);
    }

    pub fn window(&self, partition: i32) -> Option<&Window> {
        self.parts.get(&partition).map(|part| &part.window)
    }
}

fn owned(parts: &mut BTreeMap<i32, Part>, ticket: Ticket) -> Option<&mut Part> {
    parts.get_mut(&ticket.partition).filter(|part| part.generation == ticket.generation)
}
