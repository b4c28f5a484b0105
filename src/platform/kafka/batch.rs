//! Records of one partition, copied once into one allocation.

use std::ops::Range;

use rdkafka::{
    Message,
    message::{BorrowedMessage, Headers},
};

/// Consecutive records of one partition. Offsets rise, but may have holes.
#[derive(Debug, Default)]
pub struct Batch {
    arena: Vec<u8>,
    records: Vec<Slots>,
    headers: Vec<(Range<usize>, Option<Range<usize>>)>,
}

#[derive(Debug)]
struct Slots {
    offset: i64,
    timestamp_ms: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    headers: Range<usize>,
}

/// One record, borrowed from its batch.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    batch: &'a Batch,
    slots: &'a Slots,
}

impl Batch {
    /// Copies a message in.
    pub fn push(&mut self, message: &BorrowedMessage<'_>) {
        let first_header = self.headers.len();
        if let Some(headers) = message.headers() {
            for header in headers.iter() {
                let name = self.copy(header.key.as_bytes());
                let value = header.value.map(|value| self.copy(value));
                self.headers.push((name, value));
            }
        }
        let slots = Slots {
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            key: message.key().map(|key| self.copy(key)),
            value: message.payload().map(|value| self.copy(value)),
            headers: first_header..self.headers.len(),
        };
        self.records.push(slots);
    }

    fn copy(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.arena.len();
        self.arena.extend_from_slice(bytes);
        start..self.arena.len()
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Keys, values and headers together.
    pub fn bytes(&self) -> usize {
        self.arena.len()
    }

    /// The offset after the last record; `None` for an empty batch.
    pub fn next_offset(&self) -> Option<i64> {
        self.records.last().map(|slots| slots.offset + 1)
    }

    /// When the last record was appended, in milliseconds since the epoch; 0 when nobody knows.
    pub fn last_timestamp_ms(&self) -> i64 {
        self.records.last().map_or(0, |slots| slots.timestamp_ms)
    }

    pub fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        self.records.iter().map(move |slots| Record { batch: self, slots })
    }
}

impl<'a> Record<'a> {
    pub fn offset(&self) -> i64 {
        self.slots.offset
    }

    /// Milliseconds since the epoch: when the broker appended it, or when it was made.
    pub fn timestamp_ms(&self) -> i64 {
        self.slots.timestamp_ms
    }

    pub fn key(&self) -> Option<&'a [u8]> {
        Some(&self.batch.arena[self.slots.key.clone()?])
    }

    /// `None` is a tombstone.
    pub fn value(&self) -> Option<&'a [u8]> {
        Some(&self.batch.arena[self.slots.value.clone()?])
    }

    /// The last value of a header, as Kafka's own clients read it.
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        let arena = &self.batch.arena;
        let headers = self.batch.headers[self.slots.headers.clone()].iter().rev();
        headers
            .filter(|(key, _)| &arena[key.clone()] == name.as_bytes())
            .find_map(|(_, value)| Some(&arena[value.clone()?]))
    }
}
