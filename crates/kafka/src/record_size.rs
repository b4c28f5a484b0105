//! Size of a record in Kafka's format, as brokers compare it with `max.message.bytes`.
//!
//! The format is described in Kafka's protocol guide, "Record Batch" (magic 2).

use rdkafka::message::Headers;

use super::outgoing::Outgoing;

/// Size of a batch without records.
const BATCH_HEADER: usize = 61;
/// Size of the attributes and of the time and offset deltas of a batch's first record, one byte
/// each.
const FIXED: usize = 3;

/// Returns the size of a batch that contains only this record, before compression.
pub fn batch_bytes(record: &Outgoing<'_>) -> usize {
    batch_bytes_of(record.key, record.payload, record.headers.as_ref())
}

/// Like [`batch_bytes`], for the parts of a record.
pub fn batch_bytes_of(key: Option<&[u8]>, payload: Option<&[u8]>, headers: Option<&impl Headers>) -> usize {
    let (count, headers) = headers.map_or((0, 0), |headers| {
        let field = |bytes: usize| varint(bytes as i64) + bytes;
        let header = |(name, value): (&str, Option<&[u8]>)| field(name.len()) + optional(value);
        (headers.count(), headers.iter().map(|found| header((found.key, found.value))).sum())
    });
    let body = FIXED + optional(key) + optional(payload) + varint(count as i64) + headers;
    BATCH_HEADER + varint(body as i64) + body
}

fn optional(bytes: Option<&[u8]>) -> usize {
    bytes.map_or_else(|| varint(-1), |bytes| varint(bytes.len() as i64) + bytes.len())
}

/// Returns the size of a number in zigzag encoding, seven bits per byte.
fn varint(number: i64) -> usize {
    let zigzag = ((number << 1) ^ (number >> 63)) as u64;
    (64 - (zigzag | 1).leading_zeros() as usize).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_take_a_byte_per_seven_bits() {
        let sizes = [-1, 0, 63, 64, 8_191, 8_192, 1_048_575, 1_048_576].map(varint);
        assert_eq!(sizes, [1, 1, 1, 2, 2, 3, 3, 4]);
    }

    #[test]
    fn an_empty_record_is_the_smallest() {
        // Length, attributes, two deltas, no key, no value, no headers.
        assert_eq!(batch_bytes(&Outgoing::default()), 61 + 7);
        let record = Outgoing { key: Some(b"k"), payload: Some(b"12345"), ..Outgoing::default() };
        assert_eq!(batch_bytes(&record), 61 + 7 + 1 + 5);
    }
}
