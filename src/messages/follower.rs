//! One reader of a receiver's messages: first what it has missed, from Postgres, then what it is told.
//!
//! It has its subscription before it reads, so what is stored in between comes twice rather than never, and the
//! cursor tells. Every message says which one was before it, so that a hole is seen and read.

use std::{collections::VecDeque, net::IpAddr, sync::Arc, time::Duration};

use axum::extract::ws::Utf8Bytes;
use metrics::counter;

use super::{
    cursor::Cursor,
    hub::{Hub, Subscription},
    item::Notice,
    position_lookup::ReceiverPosition,
    send_queue::{Ending, Next, TIGHT_BYTES},
    store::{Found, Limits},
};
use crate::platform::kafka::PartitionId;
use crate::platform::{
    http::{Code, Problem},
    memory::{Lease, budgets},
    query::Error,
};

/// Messages read at a time, and their bytes.
const PAGE: u16 = 64;
const PAGE_BYTES: usize = 64 << 10;
/// Time for which a page waits for memory before its connection looks around again.
const MEMORY_PATIENCE: Duration = Duration::from_secs(2);

/// What comes next for a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Message(Utf8Bytes),
    /// There were messages here that are gone.
    Gap,
    Ping,
    End(Ending),
}

pub struct Follower {
    pub subscription: Subscription,
    /// After the last step that was handed out.
    pub cursor: Cursor,
    /// Read and not handed out yet.
    page: VecDeque<Entry>,
    /// For the page.
    lease: Option<Lease>,
    /// Nothing was read yet: the cursor may be from long ago.
    resumes: bool,
}

struct Entry {
    partition_id: PartitionId,
    /// `None` where the cursor's place is known no longer.
    offset: Option<i64>,
    /// `None` where history ends before the cursor.
    value: Option<Utf8Bytes>,
}

impl Follower {
    /// Takes a subscription, and begins after the cursor given or, without one, after what the receiver has got.
    pub async fn open(
        hub: &Arc<Hub>,
        receiver: &str,
        client: Option<IpAddr>,
        after: Option<Cursor>,
    ) -> Result<Self, Problem> {
        let subscription = hub.join(receiver, client).await?;
        let found = hub.positions.find(subscription.receiver.clone()).await;
        let ReceiverPosition { last, delivered } =
            found.map_err(|error| Problem::new(Code::PostgresUnavailable, error))?;
        let cursor = after.unwrap_or(delivered);
        // What is stored from here on, the subscription is told of. A place that is known no longer is a gap.
        let forgotten = cursor.partitions().any(|(partition_id, _)| last.seen(partition_id) < 0);
        let resumes = forgotten || last.partitions().any(|(partition_id, offset)| cursor.seen(partition_id) < offset);
        if resumes {
            subscription.queue.fall_behind();
        }
        Ok(Self { subscription, cursor, page: VecDeque::new(), lease: None, resumes })
    }

    /// What comes next, or `None` when there is nothing and the subscription's queue will wake.
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

    /// Reads a page of what comes after the cursor. While Postgres is away, it is tried again and again.
    async fn catch_up(&mut self) {
        let hub = self.subscription.hub.clone();
        let queues = &budgets().queues;
        let bytes = if queues.is_tight() { TIGHT_BYTES } else { PAGE_BYTES.min(hub.config.connection_buffer_bytes) };
        let Some(mut lease) = queues.lease_within(bytes, MEMORY_PATIENCE).await else {
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
                // A message larger than the page comes alone; where there is no memory for it, later.
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
                tracing::debug!(error = %error, "a connection waits for Postgres");
                self.subscription.queue.fall_behind();
                tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..800))).await;
            }
        }
    }
}

/// What was read as it is handed out, and whether it is all there is. Whoever `resumes` may have missed what
/// there was before its receiver was forgotten; whoever stayed has not.
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
        let last_of_lane = rows.peek().is_none_or(|next| next.partition_id() != partition_id);
        complete &= !last_of_lane || offset >= row.last;
    }
    (page, complete)
}

/// What is said when the tables cannot be read.
pub fn unreachable(error: &Error) -> Problem {
    Problem::new(Code::PostgresUnavailable, error.to_string())
}
