//! Moves back commits that are beyond the end of their partition.
//!
//! A topic that was truncated, or deleted and created again, can be shorter than the group's
//! commit. The library then begins with the oldest record, but it never commits an offset below the
//! commit that it knows: every restart would process the records again.

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer},
    statistics::Partition,
};

use super::membership::{Client, Owned};

/// Returns whether the commit that the library knows is beyond the end of the partition. The end is
/// that of the last fetch, which may be of an earlier ownership: until something was read and
/// stored in this one, it is not trusted.
pub(super) fn is_beyond_end(partition: &Partition, stored: i64) -> bool {
    (0..=partition.hi_offset).contains(&stored) && partition.committed_offset > partition.hi_offset
}

/// Commits the commit points of partitions whose commit is beyond their end. The polling thread
/// calls this.
pub(super) fn move_back(client: &Client, topic: &str, owned: &mut Owned) {
    let mut list = TopicPartitionList::new();
    for (&partition, held) in &mut owned.partitions {
        if std::mem::take(&mut held.commit_is_beyond_end) {
            held.committed = Some(held.stored);
            if list.add_partition_offset(topic, partition, Offset::Offset(held.stored)).is_ok() {
                tracing::info!(topic, partition, offset = held.stored, "moving back a commit that is beyond the end");
            }
        }
    }
    if list.count() > 0
        && let Err(error) = client.commit(&list, CommitMode::Async)
    {
        tracing::debug!(error = %error, "cannot move back commits");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_commit_beyond_a_known_end_is_moved_back() {
        let beyond = |committed_offset, stored, hi_offset| {
            is_beyond_end(&Partition { committed_offset, hi_offset, ..Partition::default() }, stored)
        };
        assert!(beyond(9, 2, 2) && beyond(9, 1, 2) && beyond(1, 0, 0));
        assert!(!beyond(2, 2, 2) && !beyond(0, 2, 2) && !beyond(-1001, 2, 2), "the commit is within the partition");
        assert!(!beyond(9, -1, -1001) && !beyond(9, -1, 2), "nothing was read yet");
        assert!(!beyond(9, 9, 2), "the end is of an earlier ownership of the partition");
    }
}
