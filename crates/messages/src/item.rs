//! Messages on their way to connections, and their encoding between the projection and api
//! processes.

use axum::extract::ws::Utf8Bytes;
use postrider_kafka::PartitionId;

/// Values above this size are not published; receivers are notified and read them from Postgres.
const MAX_PUBLISHED_BYTES: usize = 64 << 10;

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub partition_id: PartitionId,
    pub offset: i64,
    /// Offset of the receiver's previous message in the partition; -1 for the first.
    pub prev: i64,
    /// JSON as produced.
    pub value: Utf8Bytes,
}

/// Notice to a receiver's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    Item(Item),
    /// There are messages up to this offset.
    Head(PartitionId, i64),
}

impl Notice {
    /// Encodes a notice: `EPOCH PARTITION OFFSET PREV` and, after a newline, the value. A notice
    /// without a value is a head.
    pub fn encode(partition_id: PartitionId, offset: i64, prev: i64, value: &str) -> Vec<u8> {
        let PartitionId { epoch, partition } = partition_id;
        let value = if value.len() > MAX_PUBLISHED_BYTES { "" } else { value };
        let mut payload = Vec::with_capacity(value.len() + 48);
        payload.extend_from_slice(format!("{epoch} {partition} {offset} {prev}\n").as_bytes());
        payload.extend_from_slice(value.as_bytes());
        payload
    }

    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (head, value) = std::str::from_utf8(payload).ok()?.split_once('\n')?;
        let mut parts = head.split(' ');
        let partition_id = PartitionId { epoch: parts.next()?.parse().ok()?, partition: parts.next()?.parse().ok()? };
        let (offset, prev) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let none_left = parts.next().is_none();
        let notice = match value {
            "" => Self::Head(partition_id, offset),
            value => Self::Item(Item { partition_id, offset, prev, value: value.into() }),
        };
        none_left.then_some(notice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_reads_back_as_written_and_large_values_become_heads() {
        let partition_id = PartitionId { epoch: 1, partition: 2 };
        let item = Item { partition_id, offset: 9, prev: -1, value: "{\"a\":\n1}".into() };
        assert_eq!(Notice::decode(&Notice::encode(partition_id, 9, -1, &item.value)), Some(Notice::Item(item)));
        let large = "x".repeat(MAX_PUBLISHED_BYTES + 1);
        assert_eq!(Notice::decode(&Notice::encode(partition_id, 9, 3, &large)), Some(Notice::Head(partition_id, 9)));
        for bad in [&b""[..], b"1 2 3\n", b"1 2 3 4 5\n", b"1 2 3 4", b"a 2 3 4\n", b"1 2 3 4\n\xff"] {
            assert_eq!(Notice::decode(bad), None);
        }
    }
}
