//! Adaptive linger: batching in front of the client library that adapts to the load.
//!
//! A fixed linger does not suit every load: one that is right for few writers splits the records of
//! many writers into small requests, which cost the brokers more than the records do. With few
//! writers, records go straight to the library and its short linger; beyond that the wait grows
//! with the number of writers. That number is not known, but every delay makes all writers wait at
//! once, so the highest number of records in flight within the last seconds approximates it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rdkafka::message::OwnedHeaders;

use super::{delivery::Pending, outgoing::Outgoing};

/// An owned copy of an outgoing record, with its pending answer.
pub(super) struct Waiting {
    topic: String,
    partition: Option<i32>,
    /// The key, followed by the payload.
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

    /// Returns the pending answer and drops the record.
    pub fn into_pending(self) -> Box<Pending> {
        self.pending
    }

    /// Passes the record, borrowed, and its pending answer to `hand_over`.
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

/// Records that linger to be handed over together. Bounded by admission: each holds a permit.
#[derive(Default)]
pub(super) struct AdaptiveLinger {
    waiting: Mutex<Vec<Waiting>>,
    /// Number of records that linger or are being handed over.
    unreleased: AtomicUsize,
}

impl AdaptiveLinger {
    /// Returns whether no earlier record is still here, so that a record may bypass the linger.
    pub fn is_idle(&self) -> bool {
        self.unreleased.load(Ordering::Acquire) == 0
    }

    /// Adds a record and returns whether it is the first one waiting.
    pub fn push(&self, record: Waiting) -> bool {
        self.unreleased.fetch_add(1, Ordering::AcqRel);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(record);
        waiting.len() == 1
    }

    /// Hands over the waiting records in order, as one batch. Must be called by one thread at a
    /// time.
    pub fn release(&self, hand_over: impl FnMut(Waiting)) {
        let batch = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let released = batch.len();
        batch.into_iter().for_each(hand_over);
        self.unreleased.fetch_sub(released, Ordering::AcqRel);
    }
}

/// Returns the linger for the recent peak of records in flight. Measured with closed loops: 100
/// writers are served best by the library's linger alone, 400 by two milliseconds.
pub(super) fn wait_for(peak_in_flight: usize) -> Duration {
    const NO_WAIT_IN_FLIGHT: usize = 150;
    const PER_WRITER: Duration = Duration::from_micros(7);
    const MAX_WAIT: Duration = Duration::from_micros(1_500);
    let writers = u32::try_from(peak_in_flight.saturating_sub(NO_WAIT_IN_FLIGHT)).unwrap_or(u32::MAX);
    PER_WRITER.saturating_mul(writers).min(MAX_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_writers_do_not_wait_and_many_wait_a_bounded_time() {
        assert_eq!(wait_for(1), Duration::ZERO);
        assert_eq!(wait_for(150), Duration::ZERO);
        assert_eq!(wait_for(250), Duration::from_micros(700));
        assert_eq!(wait_for(1_000_000), Duration::from_micros(1_500));
    }
}
