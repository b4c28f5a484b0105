//! Restarts the fetch of a partition of which neither a record nor the end of the log arrives.

use std::time::{Duration, Instant};

use metrics::counter;
use postrider_time::backoff::Backoff;
use rdkafka::{Offset, TopicPartitionList, consumer::Consumer, error::KafkaError};

use super::{
    Subscription,
    fetch_buffer::FetchBuffer,
    membership::{Client, OwnedPartition},
};

/// Watches a partition that is being read until its first record or its end arrives.
#[derive(Debug)]
pub(super) struct FetchWatchdog {
    /// Offset at which reading started; `None` is the group's commit.
    offset: Option<i64>,
    since: Instant,
    /// Number of restarts.
    tries: u32,
    due: Instant,
}

impl FetchWatchdog {
    /// Worst-case time until the first response while brokers answer; doubled with every restart.
    const PATIENCE: Duration = Duration::from_secs(5);
    const BACKOFF: Backoff = Backoff::doubling(Self::PATIENCE, Duration::from_secs(320));

    pub fn new(offset: Option<i64>, now: Instant) -> Self {
        Self { offset, since: now, tries: 0, due: now + Self::PATIENCE }
    }

    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.due
    }

    /// Restarts a stalled fetch of a partition: in turns by a resume, which has no effect if none
    /// was lost, and by a new assignment.
    pub fn restart(&mut self, client: &Client, subscription: &Subscription, partition: i32, now: Instant) {
        if self.tries.is_multiple_of(2) {
            let mut list = TopicPartitionList::new();
            list.add_partition(&subscription.topic, partition);
            self.attempt(subscription.name, partition, now, || client.resume(&list));
        } else {
            self.assign_again(client, subscription, partition, now);
        }
    }

    /// Assigns a partition anew, to be read from the offset at which reading started. Returns
    /// whether that succeeded.
    pub fn assign_again(&mut self, client: &Client, subscription: &Subscription, partition: i32, now: Instant) -> bool {
        let offset = self.offset.map_or(Offset::Stored, Offset::Offset);
        self.attempt(subscription.name, partition, now, || {
            let mut list = TopicPartitionList::new();
            list.add_partition(&subscription.topic, partition);
            if let Err(error) = client.incremental_unassign(&list) {
                // An earlier attempt may have got no further than this.
                tracing::debug!(partition, error = %error, "cannot unassign a partition");
            }
            list.set_partition_offset(&subscription.topic, partition, offset)?;
            client.incremental_assign(&list)
        })
    }

    fn attempt(
        &mut self,
        consumer: &'static str,
        partition: i32,
        now: Instant,
        remedy: impl FnOnce() -> Result<(), KafkaError>,
    ) -> bool {
        let silent_s = now.duration_since(self.since).as_secs();
        tracing::warn!(consumer, partition, silent.s = silent_s, "fetch stalled; restarting the partition");
        counter!("postrider_consumer_fetch_restarts_total", "consumer" => consumer).increment(1);
        let outcome = remedy();
        if let Err(error) = &outcome {
            tracing::warn!(consumer, partition, error = %error, "cannot restart stalled fetch");
        }
        self.tried(now);
        outcome.is_ok()
    }

    fn tried(&mut self, now: Instant) {
        self.tries += 1;
        self.due = now + Self::BACKOFF.delay(self.tries + 1, 0.0);
    }
}

/// Restarts stalled fetches. The client library silently loses a start or a resume that crosses
/// another one of its own (librdkafka #2190, #5591); without a restart the partition would not be
/// read until it has another owner.
pub(super) fn restart_stalled(buffers: &mut [FetchBuffer], client: &Client, subscription: &Subscription) {
    let now = Instant::now();
    for (partition, buffer) in (0..).zip(buffers) {
        let should_be_read =
            |held: &OwnedPartition| held.generation == buffer.generation && held.start != 0 && !held.paused;
        let Some(fetch_watchdog) = buffer.fetch_watchdog.as_mut().filter(|fetch_watchdog| fetch_watchdog.is_due(now))
        else {
            continue;
        };
        if client.context().owned().partitions.get(&partition).is_some_and(should_be_read) {
            fetch_watchdog.restart(client, subscription, partition, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalled_fetches_are_restarted_less_and_less_often() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut fetch_watchdog = FetchWatchdog::new(Some(7), begun);
        assert!(!fetch_watchdog.is_due(at(4)) && fetch_watchdog.is_due(at(5)));
        fetch_watchdog.tried(at(5));
        assert!(!fetch_watchdog.is_due(at(14)) && fetch_watchdog.is_due(at(15)));
        (0..20).for_each(|_| fetch_watchdog.tried(at(100)));
        assert!(!fetch_watchdog.is_due(at(100 + 319)) && fetch_watchdog.is_due(at(100 + 320)));
    }
}
