//! Follows a receiver's messages: first those it missed, from Postgres, then notices.
//!
//! The follower subscribes before it reads, so a message stored in between arrives twice rather
//! than never, and the cursor drops the duplicate. Every notice has the offset of the previous
//! message, so a hole is noticed and read from Postgres.

use std::{collections::VecDeque, net::IpAddr, sync::Arc, time::Duration};

use axum::extract::ws::Utf8Bytes;
use metrics::counter;
use postrider_http::Problem;
use postrider_kafka::PartitionId;
use postrider_limits::memory::{Lease, budgets};

use super::{
    cursor::{Cursor, ReceiverPosition},
    hub::{Hub, Subscription},
    item::Notice,
    send_queue::{Ending, Next, TIGHT_BYTES},
    store::{Found, Limits},
};

/// Maximum number of messages per page, and maximum page size in bytes.
const PAGE: u16 = 64;
const PAGE_BYTES: usize = 64 << 10;
/// Maximum wait of a page for memory before the connection checks its queue again.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(2);

/// Next step of a client's stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Message(Utf8Bytes),
    /// Messages at this position were deleted.
    Gap,
    Ping,
    End(Ending),
}

pub struct Follower {
    pub subscription: Subscription,
    /// Position after the last returned step.
    pub cursor: Cursor,
    /// Messages that were read but not returned yet.
    page: VecDeque<Entry>,
    /// Memory reserved for the page.
    lease: Option<Lease>,
    /// True until the first read of a client that missed something: its cursor may be old.
    resumes: bool,
}

struct Entry {
    partition_id: PartitionId,
    /// `None` if the position of the cursor was deleted, with its receiver or by retention.
    offset: Option<i64>,
    /// `None` if this marks a gap: messages after the cursor were deleted.
    value: Option<Utf8Bytes>,
}

impl Follower {
    /// Subscribes, and starts after the given cursor or, without one, after the last delivered
    /// message.
    pub async fn open(
        hub: &Arc<Hub>,
        receiver: &str,
        client: Option<IpAddr>,
        after: Option<Cursor>,
    ) -> Result<Self, Problem> {
        let subscription = hub.join(receiver, client).await?;
        let found = hub.positions.find(subscription.receiver.clone()).await;
        let ReceiverPosition { last, delivered } = found.map_err(Problem::postgres_unavailable)?;
        let cursor = after.unwrap_or(delivered);
        // Messages stored from now on produce notices. A position that is no longer known is a gap.
        let forgotten = cursor.partitions().any(|(partition_id, _)| last.seen(partition_id) < 0);
        let resumes = forgotten || last.partitions().any(|(partition_id, offset)| cursor.seen(partition_id) < offset);
        if resumes {
            subscription.queue.fall_behind();
        }
        Ok(Self { subscription, cursor, page: VecDeque::new(), lease: None, resumes })
    }

    /// Returns the next step, or `None` if there is none until the send queue wakes.
    pub async fn step(&mut self) -> Option<Step> {
        loop {
            if let Some(entry) = self.page.pop_front() {
                match entry.offset {
                    Some(offset) => self.cursor.advance(entry.partition_id, offset),
                    None => self.cursor.forget(entry.partition_id),
                }
                return Some(entry.value.map_or(Step::Gap, Step::Message));
            }
            self.lease = None;
            match self.subscription.queue.take()? {
                Next::End(ending) => return Some(Step::End(ending)),
                Next::Ping => return Some(Step::Ping),
                Next::CatchUp => self.catch_up().await,
                Next::Notice(notice) => match &*notice {
                    Notice::Item(item) if item.offset <= self.cursor.seen(item.partition_id) => {}
                    Notice::Item(item) if item.prev <= self.cursor.seen(item.partition_id) => {
                        self.cursor.advance(item.partition_id, item.offset);
                        return Some(Step::Message(item.value.clone()));
                    }
                    Notice::Head(partition_id, offset) if *offset <= self.cursor.seen(*partition_id) => {}
                    Notice::Item(_) | Notice::Head(..) => self.catch_up().await,
                },
            }
        }
    }

    /// Reads a page of messages after the cursor. If Postgres is unavailable, it pauses and marks
    /// the queue so that the read is repeated.
    async fn catch_up(&mut self) {
        let hub = self.subscription.hub.clone();
        let queues = &budgets().queues;
        let bytes = if queues.is_tight() { TIGHT_BYTES } else { PAGE_BYTES.min(hub.config.connection_buffer_bytes) };
        let Some(mut lease) = queues.lease_within(bytes, MEMORY_TIMEOUT).await else {
            return self.subscription.queue.fall_behind();
        };
        let limits = Limits { rows: PAGE, bytes };
        let read = {
            let Ok(_turn) = hub.readers.acquire().await else { return };
            hub.store.after(&self.subscription.receiver, &self.cursor, limits).await
        };
        match read {
            Ok(found) => {
                let needed = found.iter().map(|row| row.value.as_ref().map_or(0, String::len)).sum();
                // A message larger than the page is returned alone, later if there is no memory for
                // it.
                if needed > lease.bytes() && !lease.grow(needed - lease.bytes()) {
                    self.subscription.queue.fall_behind();
                    return tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..800))).await;
                }
                lease.shrink_to(needed);
                self.lease = Some(lease);
                counter!("postrider_messages_caught_up_total").increment(found.len() as u64);
                let (page, complete) = arrange(&self.cursor, found, self.resumes);
                (self.page, self.resumes) = (page, false);
                if !complete {
                    self.subscription.queue.fall_behind();
                }
            }
            Err(error) => {
                tracing::debug!(error = %error, "catch-up read failed, retrying");
                self.subscription.queue.fall_behind();
                tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..800))).await;
            }
        }
    }
}

/// Converts rows to entries. Returns them, and whether they include the newest message. A client
/// that `resumes` may have missed messages from before its receiver was deleted; one that stayed
/// connected has not.
fn arrange(cursor: &Cursor, found: Vec<Found>, resumes: bool) -> (VecDeque<Entry>, bool) {
    let (mut page, mut complete) = (VecDeque::with_capacity(found.len()), true);
    let mut seen = cursor.clone();
    let mut rows = found.into_iter().peekable();
    while let Some(row) = rows.next() {
        let (partition_id, before) = (row.partition_id(), seen.seen(row.partition_id()));
        if row.is_forgotten() {
            page.extend(resumes.then_some(Entry { partition_id, offset: None, value: None }));
            continue;
        }
        let offset = row.offset.unwrap_or(row.last);
        if row.is_after_gap(before, resumes) {
            page.push_back(Entry { partition_id, offset: Some(row.prev.unwrap_or(offset)), value: None });
        }
        if let Some(value) = row.value {
            page.push_back(Entry { partition_id, offset: Some(offset), value: Some(value.into()) });
        }
        seen.advance(partition_id, offset);
        let last_of_partition = rows.peek().is_none_or(|next| next.partition_id() != partition_id);
        complete &= !last_of_partition || offset >= row.last;
    }
    (page, complete)
}
