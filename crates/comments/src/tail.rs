//! Polls the table for all live streams of a process: reads and renders each new row once and
//! broadcasts it to all streams.
//!
//! The tail polls on each notification, and otherwise at growing intervals up to
//! `comments.stream_sweep_interval_ms`.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use metrics::counter;
use parking_lot::Mutex as SyncMutex;
use postrider_limits::memory::{Budget, Lease, budgets};
use postrider_postgres::query::Error;
use tokio::sync::{Mutex, Notify, broadcast};

use super::{
    Config,
    cursor::Position,
    model::Listed,
    store::{Row, Store},
};

/// Maximum time that a new stream waits to join while the table is being read.
const JOIN_PATIENCE: Duration = Duration::from_secs(2);
/// Maximum number of rows of one partition per read.
const PAGE: usize = 64;
/// Target number of rows of all partitions together per read.
const PAGE_TOTAL: usize = 256;

/// A comment rendered for the streams.
#[derive(Debug)]
pub struct Item {
    pub partition: i32,
    pub offset: i64,
    /// The comment as JSON.
    pub data: Bytes,
}

impl From<&Row> for Item {
    fn from(row: &Row) -> Self {
        // The struct has only strings and numbers, so serialization cannot fail.
        let data = serde_json::to_vec(&Listed::from(row)).unwrap_or_default();
        Self { partition: row.partition, offset: row.offset, data: data.into() }
    }
}

/// A comment shared by all streams until each of them has sent it or its memory is needed.
pub struct Shared {
    pub partition: i32,
    pub offset: i64,
    held: SyncMutex<Option<(Bytes, Lease)>>,
}

impl Shared {
    /// Returns the comment as JSON; `None` if its memory was needed before this stream sent it.
    pub fn data(&self) -> Option<Bytes> {
        self.held.lock().as_ref().map(|(data, _)| data.clone())
    }

    fn forget(&self) {
        *self.held.lock() = None;
    }
}

/// Comments that some stream has not sent yet, the oldest first, within a memory budget.
struct Recent {
    budget: &'static Budget,
    waiting: VecDeque<Weak<Shared>>,
}

impl Recent {
    /// Leases memory for a comment, dropping the oldest comments if necessary.
    fn share(&mut self, item: Item) -> Arc<Shared> {
        let Item { partition, offset, data } = item;
        while self.waiting.front().is_some_and(|oldest| oldest.strong_count() == 0) {
            self.waiting.pop_front();
        }
        let lease = loop {
            if let Some(lease) = self.budget.lease(data.len()) {
                break Some(lease);
            }
            let Some(oldest) = self.waiting.pop_front() else { break None };
            if let Some(oldest) = oldest.upgrade() {
                counter!("postrider_comments_forgotten_total").increment(1);
                oldest.forget();
            }
        };
        let shared = Arc::new(Shared { partition, offset, held: SyncMutex::new(lease.map(|lease| (data, lease))) });
        self.waiting.push_back(Arc::downgrade(&shared));
        shared
    }
}

/// Returns the number of rows of each partition in one page.
pub fn page_rows(partitions: usize) -> usize {
    (PAGE_TOTAL / partitions.max(1)).clamp(1, PAGE)
}

/// The shared reader of new comments; one per process.
pub struct Tail {
    store: Store,
    epoch: u32,
    partitions: i32,
    /// Maximum pause between two polls.
    interval: Duration,
    sender: broadcast::Sender<Arc<Shared>>,
    /// Position up to which comments were broadcast; `None` until Postgres has answered once. The
    /// lock is held during a poll, so that no stream joins in the middle of one.
    position: Mutex<Option<Position>>,
    recent: SyncMutex<Recent>,
    hinted: Notify,
}

impl Tail {
    pub fn new(store: Store, config: &Config) -> Arc<Self> {
        Arc::new(Self {
            store,
            epoch: config.epoch,
            partitions: config.partitions,
            interval: Duration::from_millis(config.stream_sweep_interval_ms.max(20)),
            sender: broadcast::Sender::new(config.stream_buffer_records.max(1)),
            position: Mutex::new(None),
            recent: SyncMutex::new(Recent { budget: &budgets().live_comments, waiting: VecDeque::new() }),
            hinted: Notify::new(),
        })
    }

    /// Makes the tail poll now.
    pub fn wake(&self) {
        self.hinted.notify_one();
    }

    /// Returns the current position of the table and a receiver of all comments after it. Returns
    /// `None` until Postgres has answered once, or if the lock was not free in time.
    pub async fn join(&self) -> Option<(Position, broadcast::Receiver<Arc<Shared>>)> {
        let position = tokio::time::timeout(JOIN_PATIENCE, self.position.lock()).await.ok()?;
        // A receiver that joins between two polls misses nothing: the next poll begins at the
        // position.
        Some((position.clone()?, self.sender.subscribe()))
    }

    /// Polls the table forever.
    pub async fn run(self: Arc<Self>) {
        let soonest = self.interval / 20;
        let (mut pause, mut failing) = (soonest, false);
        loop {
            let polled = self.poll().await;
            pause = if matches!(polled, Ok(true)) { soonest } else { (pause * 2).min(self.interval) };
            if let Err(error) = &polled
                && !failing
            {
                tracing::warn!(error = %error, "live comment streams cannot read postgres, retrying");
            }
            failing = polled.is_err();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.hinted.notified() => {}
            }
        }
    }

    /// Broadcasts new comments, a page at a time. Returns whether there were any.
    async fn poll(&self) -> Result<bool, Error> {
        let mut found = false;
        loop {
            let mut position = self.position.lock().await;
            let known = match &mut *position {
                Some(known) if self.sender.receiver_count() > 0 => known,
                idle => {
                    let end = self.store.end(self.epoch, self.partitions).await?;
                    *idle = Some(end);
                    return Ok(false);
                }
            };
            let (rows, complete) = self.store.after(known, page_rows(known.partitions())).await?;
            found |= !rows.is_empty();
            for row in &rows {
                known.advance(row.partition, row.offset + 1);
                // Sending fails if the last receiver was just dropped.
                let shared = self.recent.lock().share(Item::from(row));
                let _ = self.sender.send(shared);
            }
            if complete {
                return Ok(found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_comments_are_dropped_for_new_ones() {
        let budget = Box::leak(Box::new(Budget::new("test", 100)));
        let mut recent = Recent { budget, waiting: VecDeque::new() };
        let mut share = |offset| recent.share(Item { partition: 0, offset, data: Bytes::from(vec![b'x'; 40]) });
        let shared: Vec<Arc<Shared>> = (0..4).map(&mut share).collect();
        let kept: Vec<bool> = shared.iter().map(|shared| shared.data().is_some()).collect();
        assert_eq!(kept, [false, false, true, true]);
        drop(shared);
        let [fifth, sixth] = [share(4), share(5)];
        assert!(fifth.data().is_some() && sixth.data().is_some(), "sent comments use no memory");
        assert_eq!(recent.waiting.len(), 2);
        let large = recent.share(Item { partition: 0, offset: 6, data: Bytes::from(vec![b'x'; 101]) });
        assert!(large.data().is_none(), "it is larger than the budget");
    }
}
