//! Admission control for records in flight: a permit is taken before the record is sent and
//! returned once its outcome is known.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Limit on the records and bytes in flight.
#[derive(Debug)]
pub struct Admission {
    records: AtomicUsize,
    bytes: AtomicUsize,
    /// Records in flight whose outcome nobody waits for, such as audit events.
    aside: AtomicUsize,
    /// Highest number of awaited records at once, in flight or refused, in the current second and
    /// in the previous one.
    peaks: [AtomicUsize; 2],
    max_records: usize,
    max_bytes: usize,
}

/// Permit for one record in flight, returned when dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    bytes: usize,
    aside: bool,
}

/// Returns the number of bytes that a record counts against the limit: its key, its payload, and an
/// estimate for its headers.
pub fn weight(key: Option<&[u8]>, payload: Option<&[u8]>) -> usize {
    const HEADERS: usize = 256;
    key.map_or(0, <[u8]>::len) + payload.map_or(0, <[u8]>::len) + HEADERS
}

impl Admission {
    pub fn new(max_records: usize, max_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            records: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            aside: AtomicUsize::new(0),
            peaks: Default::default(),
            max_records,
            max_bytes,
        })
    }

    /// Takes a permit for a record of this size; `None` if the limit is reached. A record larger
    /// than the whole limit is admitted when nothing else is in flight.
    pub fn try_acquire(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        self.acquire(bytes, false)
    }

    /// Takes a permit for a record whose outcome nobody waits for. Such records do not count
    /// towards [`Self::peak`], because they say nothing about the number of writers.
    pub fn try_acquire_aside(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        self.acquire(bytes, true)
    }

    fn acquire(self: &Arc<Self>, bytes: usize, aside: bool) -> Option<Permit> {
        let records_before = self.records.fetch_add(1, Ordering::Relaxed);
        let bytes_before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let aside_before =
            if aside { self.aside.fetch_add(1, Ordering::Relaxed) } else { self.aside.load(Ordering::Relaxed) };
        let awaited = (records_before + 1).saturating_sub(aside_before);
        if !aside && awaited > self.peaks[0].load(Ordering::Relaxed) {
            self.peaks[0].store(awaited, Ordering::Relaxed);
        }
        let permit = Permit { admission: self.clone(), bytes, aside };
        self.fits(records_before, bytes_before, bytes).then_some(permit)
    }

    /// Returns whether a record of this size would be admitted now.
    pub fn has_room(&self, bytes: usize) -> bool {
        let (records, in_flight) = self.in_flight();
        self.fits(records, in_flight, bytes)
    }

    fn fits(&self, records: usize, in_flight: usize, bytes: usize) -> bool {
        records == 0 || (records < self.max_records && in_flight + bytes <= self.max_bytes)
    }

    /// Returns the highest number of awaited records at once, in flight or refused, within the last
    /// one to two seconds.
    pub fn peak(&self) -> usize {
        self.peaks[0].load(Ordering::Relaxed).max(self.peaks[1].load(Ordering::Relaxed))
    }

    /// Discards older peaks. Must be called every second.
    pub fn roll_peak(&self) {
        self.peaks[1].store(self.peaks[0].swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Returns the records and bytes in flight.
    pub fn in_flight(&self) -> (usize, usize) {
        (self.records.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.records.fetch_sub(1, Ordering::Relaxed);
        self.admission.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.aside {
            self.admission.aside.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_refused_beyond_either_limit_and_returned_on_drop() {
        let admission = Admission::new(2, 100);
        let first = admission.try_acquire(60).unwrap();
        assert!(admission.try_acquire(41).is_none(), "over the byte limit");
        let second = admission.try_acquire(40).unwrap();
        assert!(admission.try_acquire(0).is_none(), "over the record limit");
        drop((first, second));
        assert_eq!(admission.in_flight(), (0, 0));
        assert!(admission.try_acquire(1_000).is_some(), "a large record is admitted alone");
        assert_eq!(admission.peak(), 3, "rejected records count towards the peak");
        admission.roll_peak();
        admission.roll_peak();
        assert_eq!(admission.peak(), 0);
    }

    #[test]
    fn records_nobody_waits_for_count_against_the_limit_but_not_towards_the_peak() {
        let admission = Admission::new(2, 100);
        let aside = admission.try_acquire_aside(10).unwrap();
        assert_eq!((admission.in_flight(), admission.peak()), ((1, 10), 0));
        let awaited = admission.try_acquire(10).unwrap();
        assert_eq!(admission.peak(), 1);
        assert!(admission.try_acquire_aside(10).is_none());
        drop((aside, awaited));
        assert_eq!(admission.in_flight(), (0, 0));
    }
}
