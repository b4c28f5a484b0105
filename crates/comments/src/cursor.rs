//! Positions in the comments that clients receive: the end of a page, and the position of a stream.

use std::{fmt, str::FromStr};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

/// The text is not a cursor or position in the format of this module.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor")]
pub struct Malformed;

/// The last comment of a page; the next page holds older comments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// Milliseconds since the epoch.
    pub created_ms: i64,
    pub topic_epoch: u32,
    pub partition: i32,
    pub offset: i64,
}

impl Cursor {
    /// Sorts after every comment: just past the end of the year 9999.
    pub const NEWEST: Self =
        Self { created_ms: MAX_CREATED_MS + 1, topic_epoch: u32::MAX, partition: i32::MAX, offset: i64::MAX };
}

/// Latest creation time of a comment, in milliseconds since the epoch: the latest time that RFC
/// 3339 can express.
pub const MAX_CREATED_MS: i64 = 253_402_300_799_999;

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { created_ms, topic_epoch, partition, offset } = self;
        let plain = format!("{created_ms}.{topic_epoch}.{partition}.{offset}");
        f.write_str(&BASE64_URL_SAFE_NO_PAD.encode(plain))
    }
}

impl FromStr for Cursor {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let plain = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| Malformed)?;
        let mut parts = std::str::from_utf8(&plain).map_err(|_| Malformed)?.split('.');
        let cursor = Self {
            created_ms: number(parts.next())?,
            topic_epoch: number(parts.next())?,
            partition: number(parts.next())?,
            offset: number(parts.next())?,
        };
        let complete = parts.next().is_none() && cursor.created_ms <= MAX_CREATED_MS;
        if complete { Ok(cursor) } else { Err(Malformed) }
    }
}

/// Parses digits only: no sign, no space.
fn number<T: FromStr>(digits: Option<&str>) -> Result<T, Malformed> {
    let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit())).ok_or(Malformed)?;
    digits.parse().map_err(|_| Malformed)
}

/// Position of a stream: the next offset of each partition. It is exact, because the comments of a
/// partition become visible in the order of their offsets; a time or a sequence number would skip
/// rows that commit late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    pub topic_epoch: u32,
    next: Vec<i64>,
}

impl Position {
    /// Returns the position before the first comment of an epoch.
    pub fn start(topic_epoch: u32, partitions: i32) -> Self {
        Self { topic_epoch, next: vec![0; usize::try_from(partitions).unwrap_or(0)] }
    }

    /// Returns each partition with its next offset.
    pub fn places(&self) -> impl Iterator<Item = (i32, i64)> {
        (0..).zip(self.next.iter().copied())
    }

    pub fn partitions(&self) -> usize {
        self.next.len()
    }

    /// Returns whether the position is past this offset.
    pub fn covers(&self, partition: i32, offset: i64) -> bool {
        let at = usize::try_from(partition).unwrap_or(usize::MAX);
        self.next.get(at).is_some_and(|&next| offset < next)
    }

    /// Moves a partition forward; never back.
    pub fn advance(&mut self, partition: i32, next: i64) {
        let Ok(at) = usize::try_from(partition) else { return };
        self.widen(at + 1);
        self.next[at] = self.next[at].max(next);
    }

    /// Extends the position to at least this many partitions; added partitions start at offset 0.
    pub fn widen(&mut self, partitions: usize) {
        self.next.resize(self.next.len().max(partitions), 0);
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.topic_epoch)?;
        self.next.iter().enumerate().try_for_each(|(at, next)| {
            let separator = if at == 0 { '.' } else { '-' };
            write!(f, "{separator}{next}")
        })
    }
}

impl FromStr for Position {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (epoch, places) = text.split_once('.').ok_or(Malformed)?;
        let next = places.split('-').map(|digits| number(Some(digits))).collect::<Result<_, _>>()?;
        Ok(Self { topic_epoch: number(Some(epoch))?, next })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_position_covers_earlier_offsets_and_never_moves_back() {
        let mut position = Position::start(0, 2);
        position.advance(1, 8);
        position.advance(1, 3);
        assert!(position.covers(1, 7) && !position.covers(1, 8) && !position.covers(0, 0) && !position.covers(5, 0));
        position.advance(3, 1);
        assert_eq!(position.to_string(), "0.0-8-0-1");
    }

    #[test]
    fn malformed_positions_and_cursors_are_rejected() {
        for bad in ["", "0", "0.", "0.1-", "0.-1", "0.+1", "x.1", "0.1-2-a", "0.99999999999999999999", "1.2.3"] {
            assert_eq!(bad.parse::<Position>(), Err(Malformed), "{bad}");
        }
        let encoded = |plain: &str| BASE64_URL_SAFE_NO_PAD.encode(plain);
        let bad = ["1.2.3", "1.2.3.4.5", "-1.2.3.4", "1.2.3.", "253402300800000.0.0.0", "\u{0}"].map(encoded);
        for bad in bad.iter().map(String::as_str).chain(["", "!", "MS4yLjMuNA=="]) {
            assert_eq!(bad.parse::<Cursor>(), Err(Malformed), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_cursor_reads_back_as_written(
            created_ms in 0..=MAX_CREATED_MS,
            topic_epoch: u32,
            partition in 0..=i32::MAX,
            offset in 0..=i64::MAX,
        ) {
            let cursor = Cursor { created_ms, topic_epoch, partition, offset };
            prop_assert_eq!(cursor.to_string().parse::<Cursor>(), Ok(cursor));
        }

        #[test]
        fn a_position_reads_back_as_written(
            topic_epoch: u32,
            next in prop::collection::vec(0..=i64::MAX, 1..20),
        ) {
            let position = Position { topic_epoch, next };
            prop_assert_eq!(position.to_string().parse::<Position>(), Ok(position));
        }

        #[test]
        fn parsing_any_text_does_not_panic(text in ".{0,60}") {
            let _ = (text.parse::<Position>(), text.parse::<Cursor>());
        }
    }
}
