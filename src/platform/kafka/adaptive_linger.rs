//! Batching that adapts to load, in front of the client library.
//!
//! A fixed linger is wrong at one end or the other: what is right for few writers cuts a crowd into
//! small requests, which cost the brokers more than the records do. Here few writers go straight
//! to the library and its short linger, and beyond that the wait follows their number. Nobody says
//! how many there are, but every hiccup makes all of them wait at once, so the most records in
//! flight within the last seconds are a good measure.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rdkafka::message::OwnedHeaders;

use super::{delivery::Pending, outgoing::Outgoing};

/// A record with all that it borrowed.
pub(super) struct Waiting {
    topic: String,
    partition: Option<i32>,
    /// The key, and after it the payload.
    bytes: Vec<u8>,
    key_len: Option<usize>,
    has_payload: bool,
    headers: Option<OwnedHeaders>,
    timestamp_ms: Option<i64>,
    pending: Box<Pending>,
}

impl Waiting {
    pub fn new(record: Outgoing<'_>, pending: Box<Pending>) -> Self {
        let (key, payload) = (record.key.unwrap_or_default(), record.payload.unwrap_or_default());
        let mut bytes = Vec::with_capacity(key.len() + payload.len());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(payload);
        Self {
            topic: record.topic.to_owned(),
            partition: record.partition,
            bytes,
            key_len: record.key.map(<[u8]>::len),
            has_payload: record.payload.is_some(),
            headers: record.headers,
            timestamp_ms: record.timestamp_ms,
            pending,
        }
    }

    /// Returns what waits for the record, without the record.
    pub fn into_pending(self) -> Box<Pending> {
        self.pending
    }

    /// Splits into what the client library borrows and what it takes.
    pub fn use_with<T>(self, hand_over: impl FnOnce(Outgoing<'_>, Box<Pending>) -> T) -> T {
        let (key, payload) = self.bytes.split_at(self.key_len.unwrap_or(0));
        let record = Outgoing {
            topic: &self.topic,
            partition: self.partition,
            key: self.key_len.map(|_| key),
            payload: self.has_payload.then_some(payload),
            headers: self.headers,
            timestamp_ms: self.timestamp_ms,
            extra_bytes: 0,
        };
        hand_over(record, self.pending)
    }
}

/// Records that wait to be handed over together. Bounded by admission: each holds a permit.
#[derive(Default)]
pub(super) struct AdaptiveLinger {
    waiting: Mutex<Vec<Waiting>>,
    /// Those that wait, and those that are being handed over.
    unreleased: AtomicUsize,
}

impl AdaptiveLinger {
    /// Whether a record may go past: nothing that came before it is still here.
    pub fn is_idle(&self) -> bool {
        self.unreleased.load(Ordering::Acquire) == 0
    }

    /// Adds a record; says whether it is the first that waits.
    pub fn push(&self, record: Waiting) -> bool {
        self.unreleased.fetch_add(1, Ordering::AcqRel);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(record);
        waiting.len() == 1
    }

    /// Hands over what waits, in order, as one batch. One thread at a time.
    pub fn release(&self, hand_over: impl FnMut(Waiting)) {
        let batch = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let released = batch.len();
        batch.into_iter().for_each(hand_over);
        self.unreleased.fetch_sub(released, Ordering::AcqRel);
    }
}

/// How long records wait for each other, with so many in flight at most lately. Measured with closed
/// loops: 100 writers are best served by the library's linger alone, 400 by two milliseconds.
pub(super) fn wait_for(peak_in_flight: usize) -> Duration {
    const FEW: usize = 150;
    const PER_WRITER: Duration = Duration::from_micros(7);
    const LONGEST: Duration = Duration::from_micros(1_500);
    let writers = u32::try_from(peak_in_flight.saturating_sub(FEW)).unwrap_or(u32::MAX);
    PER_WRITER.saturating_mul(writers).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_writers_do_not_wait_and_a_crowd_waits_a_bounded_time() {
        assert_eq!(wait_for(1), Duration::ZERO);
        assert_eq!(wait_for(150), Duration::ZERO);
        assert_eq!(wait_for(250), Duration::from_micros(700));
        assert_eq!(wait_for(1_000_000), Duration::from_micros(1_500));
    }
}
