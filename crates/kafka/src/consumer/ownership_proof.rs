//! Proves to the other members of a group that a partition has an owner, although its commit does
//! not move.
//!
//! A partition whose records wait for a dependency looks to others like one that no member reads:
//! its commit stays where it is. So the owner of such a partition commits the same offset again
//! every few seconds, with the time as the commit's metadata. [`super::exclusion`] looks for
//! partitions whose commit and metadata both stay as they are.

use std::sync::atomic::Ordering;

use postrider_time::clock;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer},
};

use super::membership::{Client, Owned, OwnedPartition};

/// Time between two proofs.
pub(super) const PROOF_INTERVAL: std::time::Duration = std::time::Duration::from_secs(5);

/// Commits the commit points again that have not moved since the last call, where records wait. The
/// polling thread calls this; it also stores commit points. The library may still send an older
/// commit after a newer one when it repeats a request; the next commit corrects that.
pub(super) fn prove(client: &Client, topic: &str, owned: &mut Owned) {
    let lags = client.context().lag.load(Ordering::Relaxed) > 0;
    let mut list = TopicPartitionList::new();
    let now = clock::now_ms().to_string();
    for (&partition, held) in &mut owned.partitions {
        let Some(commit) = commit_of(held) else { continue };
        let unmoved = held.proved.replace(commit) == Some(commit);
        // While its work has not begun, nothing is fetched, and nothing is known of what waits.
        if unmoved && (held.start == 0 || lags || held.work.span().records > 0) {
            let mut element = list.add_partition(topic, partition);
            element.set_metadata(&now);
            if let Err(error) = element.set_offset(Offset::Offset(commit)) {
                tracing::debug!(partition, error = %error, "cannot prove that a partition has an owner");
                return;
            }
        }
    }
    if list.count() > 0
        && let Err(error) = client.commit(&list, CommitMode::Async)
    {
        tracing::debug!(error = %error, "cannot prove that partitions have an owner");
    }
}

/// Returns the offset that the group has of a partition; `None` until it was looked up. A replay
/// stores lower ones.
fn commit_of(held: &OwnedPartition) -> Option<i64> {
    held.committed.map(|committed| committed.max(held.stored))
}
