//! Encoding of the view: an entry per key and a marker per partition.
//!
//! An entry is `v<version>:<value>`, `e<version>:<expires at ms>:<value>`, or `d<version>:` for a
//! deleted key, which is kept for 36 hours so that no older write restores it. The version is the
//! offset of the write. A marker is `L:<next>:<unix s>` if everything below `next` is in the view,
//! or `R:<next>:<unix s>:<target>` while the view is rebuilt up to `target`.

use postrider_telemetry::unknown::Unknown;
use postrider_time::clock;

/// Entry of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    pub version: i64,
    pub state: State<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State<'a> {
    Value { value: &'a [u8], expires_ms: Option<i64> },
    Deleted,
}

impl<'a> Entry<'a> {
    pub fn encode(&self) -> Vec<u8> {
        let mut number = itoa::Buffer::new();
        let mut out = Vec::with_capacity(24);
        let (kind, expires, value): (u8, Option<i64>, &[u8]) = match self.state {
            State::Value { value, expires_ms: None } => (b'v', None, value),
            State::Value { value, expires_ms } => (b'e', expires_ms, value),
            State::Deleted => (b'd', None, &[]),
        };
        out.push(kind);
        out.extend_from_slice(number.format(self.version).as_bytes());
        out.push(b':');
        if let Some(ms) = expires {
            out.extend_from_slice(number.format(ms).as_bytes());
            out.push(b':');
        }
        out.extend_from_slice(value);
        out
    }

    pub fn decode(bytes: &'a [u8]) -> Result<Self, Unknown> {
        Self::read(bytes).ok_or_else(|| Unknown::of_bytes("entry of the view", bytes))
    }

    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        let (version, rest) = number(rest)?;
        let state = match kind {
            b'v' => State::Value { value: rest, expires_ms: None },
            b'e' => {
                let (expires_ms, value) = number(rest)?;
                State::Value { value, expires_ms: Some(expires_ms) }
            }
            b'd' => State::Deleted,
            _ => return None,
        };
        Some(Self { version, state })
    }

    /// Returns the value, unless it is deleted or has expired.
    pub fn live_value(&self, now_ms: i64) -> Option<&'a [u8]> {
        match self.state {
            State::Value { value, expires_ms } if expires_ms.is_none_or(|expires| expires > now_ms) => Some(value),
            _ => None,
        }
    }
}

/// Splits `123:rest`.
fn number(bytes: &[u8]) -> Option<(i64, &[u8])> {
    let colon = bytes.iter().position(|&byte| byte == b':')?;
    let digits = std::str::from_utf8(&bytes[..colon]).ok()?;
    Some((digits.parse().ok()?, &bytes[colon + 1..]))
}

/// Progress of the view of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// Everything below this offset is in the view.
    pub next: i64,
    /// Time for which `next` holds, in seconds since the Unix epoch: records appended later may be
    /// missing. During a rebuild, the time when it began.
    pub written_s: i64,
    /// Target offset of a rebuild; `None` when the view is complete.
    pub target: Option<i64>,
}

impl Marker {
    pub fn new(next: i64, target: Option<i64>) -> Self {
        Self { next, written_s: clock::now_ms() / 1_000, target: target.filter(|&target| next < target) }
    }

    /// Returns the marker after everything below `next` was applied. `appended_ms` is the time of
    /// the last record.
    pub fn advanced(&self, next: i64, appended_ms: i64) -> Self {
        let marker = Self::new(next, self.target);
        let written_s = match self.target {
            Some(_) => self.written_s,
            None if appended_ms > 0 => marker.written_s.min(appended_ms / 1_000),
            None => marker.written_s,
        };
        Self { written_s, ..marker }
    }

    pub fn encode(&self) -> String {
        match self.target {
            None => format!("L:{}:{}", self.next, self.written_s),
            Some(target) => format!("R:{}:{}:{target}", self.next, self.written_s),
        }
    }

    pub fn decode(text: &[u8]) -> Result<Self, Unknown> {
        Self::read(text).ok_or_else(|| Unknown::of_bytes("marker of the view", text))
    }

    fn read(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut parts = text.split(':');
        let kind = parts.next()?;
        let next = parts.next()?.parse().ok()?;
        let written_s = parts.next()?.parse().ok()?;
        let target = match (kind, parts.next()) {
            ("L", None) => None,
            ("R", Some(target)) => Some(target.parse().ok()?),
            _ => return None,
        };
        Some(Self { next, written_s, target })
    }

    pub fn is_complete(&self) -> bool {
        self.target.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_entry_reads_back_as_written(
            version in 0..i64::MAX,
            value in prop::collection::vec(any::<u8>(), 0..50),
            expires_ms in prop::option::of(0..i64::MAX),
            deleted: bool,
        ) {
            let state = if deleted { State::Deleted } else { State::Value { value: &value, expires_ms } };
            let entry = Entry { version, state };
            let encoded = entry.encode();
            prop_assert_eq!(Entry::decode(&encoded), Ok(entry));
        }

        #[test]
        fn a_marker_reads_back_as_written(next in 0..i64::MAX, written_s in 0..i64::MAX, target in prop::option::of(0..i64::MAX)) {
            let marker = Marker { next, written_s, target };
            prop_assert_eq!(Marker::decode(marker.encode().as_bytes()), Ok(marker));
        }
    }

    #[test]
    fn unknown_encodings_are_errors_rather_than_absent() {
        for entry in ["", "x5:1", "v:1", "v5", "e5:x", "e5:", "d"] {
            assert!(Entry::decode(entry.as_bytes()).is_err(), "{entry}");
        }
        for marker in ["", "M:1:2", "L:1", "L:1:2:3", "R:1:2", "R:1:2:x", "L:x:2"] {
            assert!(Marker::decode(marker.as_bytes()).is_err(), "{marker}");
        }
    }

    #[test]
    fn an_expired_entry_has_no_value() {
        let entry = Entry { version: 1, state: State::Value { value: b"1", expires_ms: Some(100) } };
        assert_eq!(entry.live_value(99), Some(&b"1"[..]));
        assert_eq!(entry.live_value(100), None);
    }

    #[test]
    fn a_rebuild_keeps_its_start_time_and_a_view_has_that_of_its_last_record() {
        let begun = Marker { next: 1, written_s: 1_000, target: Some(9) };
        assert_eq!(begun.advanced(5, 2_000_000), Marker { next: 5, ..begun });
        assert_eq!(begun.advanced(9, 2_000_000), Marker { next: 9, written_s: 1_000, target: None });
        let live = Marker { next: 9, written_s: 1_000, target: None };
        assert_eq!(live.advanced(10, 2_000_000).written_s, 2_000);
    }

    #[test]
    fn a_rebuild_that_reached_its_target_is_complete() {
        assert!(Marker::new(5, Some(5)).is_complete());
        assert!(!Marker::new(4, Some(5)).is_complete());
    }
}
