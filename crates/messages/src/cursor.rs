//! Position of a reader: the offset of the last message that it has from each partition.
//!
//! Usually there is one partition, which the receiver's id selects. Other producers may write a
//! receiver's messages to any partition; then the cursor has several, each with its own order.

use std::{fmt, str::FromStr};

use postrider_kafka::PartitionId;

/// Longest text of a cursor, in bytes.
const MAX_TEXT_BYTES: usize = 4_096;

/// Error of a text that is not a cursor.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor")]
pub struct Malformed;

/// Offsets sorted by partition, each partition once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor(Vec<(PartitionId, i64)>);

impl Cursor {
    /// Returns the offset of the last message from a partition; -1 if there is none.
    pub fn seen(&self, partition_id: PartitionId) -> i64 {
        self.position(partition_id).map_or(-1, |at| self.0[at].1)
    }

    /// Moves a partition forward, never back.
    pub fn advance(&mut self, partition_id: PartitionId, offset: i64) {
        match self.position(partition_id) {
            Ok(at) => self.0[at].1 = self.0[at].1.max(offset),
            Err(at) => self.0.insert(at, (partition_id, offset)),
        }
    }

    /// Removes a partition, because its offset is no longer valid.
    pub fn forget(&mut self, partition_id: PartitionId) {
        self.0.retain(|&(known, _)| known != partition_id);
    }

    pub fn partitions(&self) -> impl Iterator<Item = (PartitionId, i64)> {
        self.0.iter().copied()
    }

    /// Returns the positions that both cursors have reached.
    pub fn within(&self, other: &Self) -> Self {
        let both = self.0.iter().map(|&(partition_id, offset)| (partition_id, offset.min(other.seen(partition_id))));
        Self(both.filter(|&(_, offset)| offset >= 0).collect())
    }

    fn position(&self, partition_id: PartitionId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&partition_id, |&(partition_id, _)| partition_id)
    }
}

impl FromIterator<(PartitionId, i64)> for Cursor {
    fn from_iter<I: IntoIterator<Item = (PartitionId, i64)>>(positions: I) -> Self {
        let mut cursor = Self::default();
        positions.into_iter().for_each(|(partition_id, offset)| cursor.advance(partition_id, offset));
        cursor
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("0");
        }
        self.0.iter().enumerate().try_for_each(|(at, (PartitionId { epoch, partition }, offset))| {
            let separator = if at == 0 { "" } else { "_" };
            write!(f, "{separator}{epoch}.{partition}.{offset}")
        })
    }
}

impl FromStr for Cursor {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        if text == "0" {
            return Ok(Self::default());
        }
        if text.len() > MAX_TEXT_BYTES {
            return Err(Malformed);
        }
        let mut cursor = Self::default();
        for position in text.split('_') {
            let mut parts = position.split('.');
            let partition_id = PartitionId { epoch: number(parts.next())?, partition: number(parts.next())? };
            let offset = number(parts.next())?;
            if parts.next().is_some() || cursor.0.last().is_some_and(|&(before, _)| before >= partition_id) {
                return Err(Malformed);
            }
            cursor.0.push((partition_id, offset));
        }
        Ok(cursor)
    }
}

/// Parses digits only: no sign, no space.
fn number<T: FromStr>(digits: Option<&str>) -> Result<T, Malformed> {
    let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit())).ok_or(Malformed)?;
    digits.parse().map_err(|_| Malformed)
}

/// Position of a receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReceiverPosition {
    /// Last message of each partition.
    pub last: Cursor,
    /// Last message of each partition that is known to be delivered.
    pub delivered: Cursor,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partition_id(partition: i32) -> PartitionId {
        PartitionId { epoch: 0, partition }
    }

    #[test]
    fn a_cursor_knows_the_last_offset_and_never_moves_back() {
        let mut cursor = Cursor::default();
        assert_eq!((cursor.to_string().as_str(), cursor.seen(partition_id(3))), ("0", -1));
        cursor.advance(partition_id(3), 7);
        cursor.advance(partition_id(3), 5);
        cursor.advance(partition_id(1), 0);
        assert_eq!(cursor.to_string(), "0.1.0_0.3.7");
        assert_eq!((cursor.seen(partition_id(3)), cursor.seen(partition_id(2))), (7, -1));
    }

    #[test]
    fn an_acknowledgement_is_limited_to_what_was_sent() {
        let sent: Cursor = "0.1.5_0.3.7".parse().unwrap();
        let acknowledged: Cursor = "0.1.9_0.2.1_0.3.2".parse().unwrap();
        assert_eq!(acknowledged.within(&sent).to_string(), "0.1.5_0.3.2");
    }

    #[test]
    fn malformed_cursors_are_rejected() {
        let long = "0.1.1_".repeat(1_000);
        for bad in
            ["", "1", "0.1", "0.1.", "0.1.-1", "0.1.+1", "0.1.2.3", "0.1.2_", "0.2.1_0.1.1", "0.1.1_0.1.1", &long]
        {
            assert_eq!(bad.parse::<Cursor>(), Err(Malformed), "{bad:.20}");
        }
    }

    proptest! {
        #[test]
        fn a_cursor_reads_back_as_written(positions in prop::collection::vec((0..3_u32, 0..50_i32, 0..=i64::MAX), 0..9)) {
            let cursor: Cursor = positions.into_iter().map(|(epoch, partition, at)| (PartitionId { epoch, partition }, at)).collect();
            prop_assert_eq!(cursor.to_string().parse::<Cursor>(), Ok(cursor));
        }

        #[test]
        fn any_text_is_parsed_without_a_panic(text in ".{0,60}") {
            let _ = text.parse::<Cursor>();
        }
    }
}
