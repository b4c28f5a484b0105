//! Adaptive linger: batching in front of the client library that adapts to the load.
//!
//! A fixed linger does not suit every load: one that is right for few writers splits the records of
//! many writers into small requests, which cost the brokers more than the records do. With few
//! writers, records go straight to the library and its short linger; beyond that the wait grows
//! with the number of writers. That number is not known, but every delay makes all writers wait at
//! once, so the highest number of records in flight within the last seconds approximates it.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

/// Records that linger to be handed over together. Bounded by admission: each holds a permit.
pub(super) struct AdaptiveLinger<T> {
    waiting: Mutex<Vec<T>>,
    /// Number of records that linger or are being handed over.
    unreleased: AtomicUsize,
}

impl<T> Default for AdaptiveLinger<T> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), unreleased: AtomicUsize::default() }
    }
}

impl<T> AdaptiveLinger<T> {
    /// Returns whether no earlier record is still here, so that a record may bypass the linger.
    pub fn is_idle(&self) -> bool {
        self.unreleased.load(Ordering::Acquire) == 0
    }

    /// Adds a record and returns whether it is the first one waiting.
    pub fn push(&self, record: T) -> bool {
        self.unreleased.fetch_add(1, Ordering::AcqRel);
        let mut waiting = self.waiting.lock();
        waiting.push(record);
        waiting.len() == 1
    }

    /// Hands over the waiting records in order, as one batch. Must be called by one thread at a
    /// time.
    pub fn release(&self, hand_over: impl FnMut(T)) {
        let batch = std::mem::take(&mut *self.waiting.lock());
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
