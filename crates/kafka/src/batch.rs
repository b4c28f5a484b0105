//! Batches of records of one partition, each copied once into a single allocation.

use std::ops::Range;

use postrider_process::panic;
use rdkafka::{Message, message::Headers};

/// Consecutive records of one partition. Offsets increase but may have gaps.
#[derive(Debug, Default)]
pub struct Batch {
    arena: Vec<u8>,
    records: Vec<Slots>,
    headers: Vec<HeaderRanges>,
}

/// Ranges of a header's name and value in the arena.
type HeaderRanges = (Range<usize>, Option<Range<usize>>);

/// Location of one record in the arena. It is small because there is one per record: the value
/// directly follows the key.
#[derive(Debug)]
struct Slots {
    offset: i64,
    timestamp_ms: i64,
    /// Position in the arena where the key begins.
    start: usize,
    key: Length,
    value: Length,
    headers: Range<u32>,
}

/// Length of bytes that may be absent. Kafka's own lengths have 31 bits.
#[derive(Debug, Clone, Copy)]
struct Length(u32);

impl Length {
    const ABSENT: Self = Self(u32::MAX);

    fn of(bytes: Option<&[u8]>) -> Self {
        bytes.map_or(Self::ABSENT, |bytes| Self(bytes.len() as u32))
    }

    fn is_absent(self) -> bool {
        self.0 == u32::MAX
    }

    fn bytes(self) -> usize {
        if self.is_absent() { 0 } else { self.0 as usize }
    }
}

/// One record, borrowed from its batch.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    batch: &'a Batch,
    slots: &'a Slots,
}

impl Batch {
    /// Returns an empty batch with capacity for this many bytes, records and headers.
    pub fn with_room((bytes, records, headers): (usize, usize, usize)) -> Self {
        Self {
            arena: Vec::with_capacity(bytes),
            records: Vec::with_capacity(records),
            headers: Vec::with_capacity(headers),
        }
    }

    /// Removes all records but keeps the allocated memory.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.records.clear();
        self.headers.clear();
    }

    /// Returns the number of bytes, records and headers.
    pub fn size(&self) -> (usize, usize, usize) {
        (self.arena.len(), self.records.len(), self.headers.len())
    }

    /// Appends a copy of a message.
    pub fn push(&mut self, message: &impl Message) {
        let first_header = self.headers.len();
        if let Some(headers) = message.headers() {
            for index in 0..headers.count() {
                // The client library panics on a header name that is not UTF-8. Any producer may
                // write one, and it must not end the consumer, so the header is left out.
                let Some(Some(header)) = panic::contain(|| headers.try_get(index)) else { continue };
                let name = self.copy(header.key.as_bytes());
                let value = header.value.map(|value| self.copy(value));
                self.headers.push((name, value));
            }
        }
        let (key, value) = (message.key(), message.payload());
        let slots = Slots {
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            start: self.arena.len(),
            key: Length::of(key),
            value: Length::of(value),
            headers: first_header as u32..self.headers.len() as u32,
        };
        self.arena.extend_from_slice(key.unwrap_or_default());
        self.arena.extend_from_slice(value.unwrap_or_default());
        self.records.push(slots);
    }

    /// Returns a batch of records that have only these offsets.
    #[cfg(test)]
    pub fn of_offsets(offsets: Range<i64>) -> Self {
        let (key, value) = (Length::ABSENT, Length::ABSENT);
        let slots = |offset| Slots { offset, timestamp_ms: 0, start: 0, key, value, headers: 0..0 };
        Self { records: offsets.map(slots).collect(), ..Self::default() }
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

    /// Returns the bytes of keys, values and headers.
    pub fn bytes(&self) -> usize {
        self.arena.len()
    }

    /// Returns the offset after the last record; `None` for an empty batch.
    pub fn next_offset(&self) -> Option<i64> {
        self.records.last().map(|slots| slots.offset + 1)
    }

    /// Returns the timestamp of the last record in milliseconds since the epoch; 0 if unknown.
    pub fn last_timestamp_ms(&self) -> i64 {
        self.records.last().map_or(0, |slots| slots.timestamp_ms)
    }

    /// Returns the approximate memory that the batch uses, in bytes.
    pub fn footprint(&self) -> usize {
        self.arena.len() + self.records.len() * size_of::<Slots>() + self.headers.len() * 64
    }

    /// Returns the record at an index; panics past the end.
    pub fn record(&self, index: usize) -> Record<'_> {
        Record { batch: self, slots: &self.records[index] }
    }

    pub fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        self.records.iter().map(move |slots| Record { batch: self, slots })
    }
}

impl<'a> Record<'a> {
    pub fn offset(&self) -> i64 {
        self.slots.offset
    }

    /// Returns the timestamp in milliseconds since the epoch: the time when the broker appended the
    /// record, or when the producer created it.
    pub fn timestamp_ms(&self) -> i64 {
        self.slots.timestamp_ms
    }

    pub fn key(&self) -> Option<&'a [u8]> {
        let slots = self.slots;
        (!slots.key.is_absent()).then(|| &self.batch.arena[slots.start..slots.start + slots.key.bytes()])
    }

    /// Returns the value; `None` is a tombstone.
    pub fn value(&self) -> Option<&'a [u8]> {
        let slots = self.slots;
        let start = slots.start + slots.key.bytes();
        (!slots.value.is_absent()).then(|| &self.batch.arena[start..start + slots.value.bytes()])
    }

    /// Returns all headers in order; names may repeat, and values may be null.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, Option<&'a [u8]>)> + use<'a> {
        let arena = &self.batch.arena;
        self.header_ranges().iter().map(move |(name, value)| {
            let name = std::str::from_utf8(&arena[name.clone()]).unwrap_or_default();
            (name, value.clone().map(|value| &arena[value]))
        })
    }

    fn header_ranges(&self) -> &'a [HeaderRanges] {
        let Range { start, end } = self.slots.headers;
        &self.batch.headers[start as usize..end as usize]
    }

    /// Returns a header's last value, as Kafka's own clients do, but skips null values.
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        let arena = &self.batch.arena;
        let headers = self.header_ranges().iter().rev();
        headers
            .filter(|(key, _)| &arena[key.clone()] == name.as_bytes())
            .find_map(|(_, value)| Some(&arena[value.clone()?]))
    }
}
