//! The bound on what is in flight: taken before the work, given back when its outcome is known.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A bound in records and bytes.
#[derive(Debug)]
pub struct Admission {
    records: AtomicUsize,
    bytes: AtomicUsize,
    /// Those of the records that nobody waits for.
    aside: AtomicUsize,
    /// The most records that somebody waited for at once, in this second and in the last.
    peaks: [AtomicUsize; 2],
    max_records: usize,
    max_bytes: usize,
}

/// Room for one record; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    bytes: usize,
    aside: bool,
}

/// What a record takes of the bound, in bytes: key, payload, and about as much as its headers need.
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

    /// Takes room for a record of this size, or says that there is none.
    /// A record larger than the whole bound is let in alone rather than never.
    pub fn try_acquire(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        self.acquire(bytes, false)
    }

    /// The same for a record that nobody waits for, which says nothing about how many write.
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

    /// Whether a record of this size would be let in now.
    pub fn has_room(&self, bytes: usize) -> bool {
        let (records, in_flight) = self.in_flight();
        self.fits(records, in_flight, bytes)
    }

    fn fits(&self, records: usize, in_flight: usize, bytes: usize) -> bool {
        records == 0 || (records < self.max_records && in_flight + bytes <= self.max_bytes)
    }

    /// The most records that somebody waited for at once within the last one to two seconds.
    pub fn peak(&self) -> usize {
        self.peaks[0].load(Ordering::Relaxed).max(self.peaks[1].load(Ordering::Relaxed))
    }

    /// Called every second, to forget older peaks.
    pub fn roll_peak(&self) {
        self.peaks[1].store(self.peaks[0].swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Records and bytes in flight now.
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
    fn it_refuses_beyond_either_bound_and_gives_back() {
        let admission = Admission::new(2, 100);
        let first = admission.try_acquire(60).unwrap();
        assert!(admission.try_acquire(41).is_none(), "over the bytes");
        let second = admission.try_acquire(40).unwrap();
        assert!(admission.try_acquire(0).is_none(), "over the records");
        drop((first, second));
        assert_eq!(admission.in_flight(), (0, 0));
        assert!(admission.try_acquire(1_000).is_some(), "alone, a large one is let in");
        assert_eq!(admission.peak(), 3, "those that were refused were there, too");
        admission.roll_peak();
        admission.roll_peak();
        assert_eq!(admission.peak(), 0);
    }

    #[test]
    fn what_nobody_waits_for_takes_room_but_is_no_writer() {
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
