//! Chooses what to search next, without I/O.
//!
//! The marks of a partition divide its offsets into segments of about a second. A segment is due
//! when everything in it is old enough. A round covers the due segments of all partitions that were
//! stored at about the same time, because their receivers are looked up by time, once for all
//! partitions.

use std::iter;

use postrider_kafka::PartitionId;

/// Maximum number of marks read per partition. The last one only limits the segment before it.
pub const MARKS: i64 = 12;
/// Rows of a segment were stored within this time after its mark, in microseconds.
const SEGMENT_US: i64 = 1_000_000;
/// Time that a round covers, in microseconds.
const ROUND_US: i64 = 10 * SEGMENT_US;
/// Margin on both sides of a time range, in microseconds, because Postgres computes with rounded
/// numbers.
const SLACK_US: i64 = 1_000;

/// A partition that has unsearched messages, with one of its marks; `None` if it has no marks.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Waiting {
    #[sqlx(try_from = "i64")]
    topic_epoch: u32,
    partition: i32,
    /// Search position: messages below were searched.
    place: i64,
    /// Progress of the projection: messages below are stored.
    until: i64,
    offset: Option<i64>,
    stored_us: Option<i64>,
    now_us: i64,
}

impl Waiting {
    fn partition_id(&self) -> PartitionId {
        PartitionId { epoch: self.topic_epoch, partition: self.partition }
    }
}

/// Part of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub partition_id: PartitionId,
    /// Search position. Below `low` if the messages between were deleted together with their marks.
    pub place: i64,
    pub low: i64,
    pub high: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// Ordered by partition.
    pub spans: Vec<Span>,
    /// Lower bound of the time when its messages were stored, in microseconds since the Unix epoch,
    /// inclusive.
    pub from_us: i64,
    /// Upper bound, exclusive.
    pub to_us: i64,
}

/// Returns the next round, if anything is due.
pub fn choose(waiting: &[Waiting], delay_us: i64) -> Option<Round> {
    let due_at = |mark: &Waiting| mark.stored_us?.checked_add(SEGMENT_US + delay_us).filter(|due| *due <= mark.now_us);
    let partitions = || waiting.chunk_by(|one, other| one.partition_id() == other.partition_id());
    let first = |partition_id: &[Waiting]| {
        partition_id.first().filter(|mark| due_at(mark).is_some()).and_then(|mark| mark.stored_us)
    };
    let begin = partitions().filter_map(first).min();
    let mut round = Round { spans: Vec::new(), from_us: i64::MAX, to_us: i64::MIN };
    for partition_id in partitions() {
        let Some(head) = partition_id.first() else { continue };
        let Some(low) = head.offset else {
            // All marks were deleted, together with their messages.
            round.spans.push(Span {
                partition_id: head.partition_id(),
                place: head.place,
                low: head.until,
                high: head.until,
            });
            continue;
        };
        let listed_all = partition_id.len() < usize::try_from(MARKS).unwrap_or(usize::MAX);
        let last_end = listed_all.then_some(head.until);
        let ends = partition_id.iter().skip(1).map(|mark| mark.offset).chain(iter::once(last_end));
        let low = low.max(head.place);
        let mut high = low;
        for (mark, end) in partition_id.iter().zip(ends) {
            let (Some(end), Some(stored_us), Some(begin)) = (end, mark.stored_us, begin) else { break };
            if due_at(mark).is_none() || !(begin..begin + ROUND_US).contains(&stored_us) {
                break;
            }
            high = end.max(high);
            round.from_us = round.from_us.min(stored_us - SLACK_US);
            round.to_us = round.to_us.max(stored_us + SEGMENT_US + SLACK_US);
        }
        if high > head.place {
            round.spans.push(Span { partition_id: head.partition_id(), place: head.place, low, high });
        }
    }
    if round.from_us > round.to_us {
        // The round contains only skipped messages.
        (round.from_us, round.to_us) = (0, 0);
    }
    (!round.spans.is_empty()).then_some(round)
}

/// Returns for how long the oldest unsearched message has been due, in seconds.
pub fn behind_seconds(waiting: &[Waiting], delay_us: i64) -> f64 {
    let late = waiting.iter().filter_map(|mark| Some(mark.now_us - mark.stored_us? - delay_us));
    late.max().unwrap_or(0).max(0) as f64 / 1e6
}

impl Round {
    /// Returns the new positions after the whole round, or after everything up to one message.
    pub fn moves(&self, up_to: Option<(PartitionId, i64)>) -> Vec<(PartitionId, i64, i64)> {
        let end = |span: &Span| match up_to {
            Some((partition_id, offset)) if partition_id == span.partition_id => offset + 1,
            Some((partition_id, _)) if partition_id < span.partition_id => span.low,
            _ => span.high,
        };
        let moves = self.spans.iter().map(|span| (span.partition_id, span.place, end(span)));
        moves.filter(|(_, place, next)| next > place).collect()
    }

    /// Returns the number of offsets that are skipped because their marks were deleted.
    pub fn skipped(&self) -> i64 {
        self.spans.iter().map(|span| span.low - span.place).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const SECOND: i64 = 1_000_000;

    /// Builds a partition with its marks, as the query returns it.
    fn partition_id(partition: i32, place: i64, until: i64, marks: &[(i64, i64)], now_us: i64) -> Vec<Waiting> {
        let row = |offset, stored_us| Waiting { topic_epoch: 0, partition, place, until, offset, stored_us, now_us };
        let from = marks.iter().rposition(|(offset, _)| *offset <= place).unwrap_or(0);
        let listed: Vec<Waiting> = marks[from.min(marks.len())..]
            .iter()
            .take(MARKS as usize)
            .map(|&(at, us)| row(Some(at), Some(us)))
            .collect();
        if listed.is_empty() { vec![row(None, None)] } else { listed }
    }

    fn at(partition: i32) -> PartitionId {
        PartitionId { epoch: 0, partition }
    }

    #[test]
    fn only_old_enough_segments_are_searched_including_the_open_one() {
        let marks = [(0, 0), (5, SECOND), (9, 3 * SECOND)];
        let spans = |now_us| {
            let round = choose(&partition_id(0, 0, 12, &marks, now_us), 10 * SECOND)?;
            Some((round.spans[0].low, round.spans[0].high, round.from_us, round.to_us))
        };
        assert_eq!(spans(11 * SECOND - 1), None);
        assert_eq!(spans(11 * SECOND), Some((0, 5, -SLACK_US, SECOND + SLACK_US)));
        assert_eq!(spans(13 * SECOND), Some((0, 9, -SLACK_US, 2 * SECOND + SLACK_US)));
        assert_eq!(spans(14 * SECOND), Some((0, 12, -SLACK_US, 4 * SECOND + SLACK_US)));
    }

    #[test]
    fn messages_without_marks_are_skipped() {
        let round = choose(&partition_id(0, 3, 20, &[(10, 0)], 100 * SECOND), SECOND).unwrap();
        assert_eq!((round.skipped(), round.moves(None)), (7, vec![(at(0), 3, 20)]));
        let round = choose(&partition_id(0, 3, 20, &[], 100 * SECOND), SECOND).unwrap();
        assert_eq!((round.skipped(), round.moves(None)), (17, vec![(at(0), 3, 20)]));
    }

    #[test]
    fn part_of_a_round_advances_only_up_to_its_last_message() {
        let waiting: Vec<Waiting> =
            (0..3).flat_map(|number| partition_id(number, 4, 10, &[(0, 0)], 100 * SECOND)).collect();
        let round = choose(&waiting, SECOND).unwrap();
        assert_eq!(round.moves(Some((at(1), 6))), [(at(0), 4, 10), (at(1), 4, 7)]);
    }

    /// Batches of partitions: rows, and the time between transaction starts, which may be negative.
    fn batches() -> impl Strategy<Value = Vec<(i32, i64, i64)>> {
        prop::collection::vec((0..3_i32, 1..4_i64, -500_000..1_500_000_i64), 1..60)
    }

    proptest! {
        /// Whatever the marks, commits and rounds: every row is in exactly one round, within that
        /// round's time, and old enough.
        #[test]
        fn every_row_is_searched_once_in_its_time(batches in batches(), rounds_every in 1..5_usize) {
            let delay = 5 * SECOND;
            let (mut clock, mut rows) = (0_i64, BTreeMap::new());
            let mut marks: BTreeMap<i32, Vec<(i64, i64)>> = BTreeMap::new();
            let (mut next, mut place): (BTreeMap<i32, i64>, BTreeMap<i32, i64>) = Default::default();
            let mut step = |now_us: i64, next: &BTreeMap<i32, i64>, marks: &BTreeMap<i32, Vec<(i64, i64)>>, rows: &mut BTreeMap<(i32, i64), i64>| {
                let waiting: Vec<Waiting> = next.iter().filter_map(|(&number, &until)| {
                    let place = place.get(&number).copied().unwrap_or(0);
                    (place < until).then(|| partition_id(number, place, until, &marks[&number], now_us))
                }).flatten().collect();
                let Some(round) = choose(&waiting, delay) else { return Ok(false) };
                for span in &round.spans {
                    prop_assert!(span.low == span.place && span.high > span.low);
                    for offset in span.low..span.high {
                        let stored = rows.remove(&(span.partition_id.partition, offset)).unwrap();
                        prop_assert!((round.from_us..round.to_us).contains(&stored), "{stored} {round:?}");
                        prop_assert!(stored + delay <= now_us);
                    }
                    place.insert(span.partition_id.partition, span.high);
                }
                Ok(true)
            };
            for (number, (partition, count, elapsed)) in batches.into_iter().enumerate() {
                clock += elapsed;
                let from = *next.entry(partition).or_insert(0);
                let of = marks.entry(partition).or_default();
                // Same rule as the statement that stores batches.
                if !of.last().is_some_and(|&(_, marked)| (marked..marked + SECOND).contains(&clock)) {
                    of.push((from, clock));
                }
                (from..from + count).for_each(|offset| { rows.insert((partition, offset), clock); });
                next.insert(partition, from + count);
                if number % rounds_every == 0 {
                    step(clock, &next, &marks, &mut rows)?;
                }
            }
            let end = clock + 1_000 * SECOND;
            while step(end, &next, &marks, &mut rows)? {}
            prop_assert!(rows.is_empty(), "{rows:?}");
        }
    }
}
