//! Follows the table for all live streams of a process: new rows are read once, rendered once, and
//! handed to everybody.
//!
//! It looks when it is hinted to, and without a hint in growing intervals up to `comments.stream_sweep_interval_ms`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex as StdMutex, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use metrics::counter;
use tokio::sync::{Mutex, Notify, broadcast};

use super::{
    Config,
    cursor::Position,
    http::Listed,
    store::{Row, Store},
};
use crate::platform::{
    memory::{Budget, Lease, budgets},
    query::Error,
};

/// Time for a stream to join while the table is being looked at.
const JOIN_PATIENCE: Duration = Duration::from_secs(2);
/// Rows of one partition that are read at a time, at most.
const PAGE: usize = 64;
/// Rows of all partitions together that a page aims at.
const PAGE_TOTAL: usize = 256;

/// A comment on its way to the streams.
#[derive(Debug)]
pub struct Item {
    pub partition: i32,
    pub offset: i64,
    /// As JSON.
    pub data: Bytes,
}

impl From<&Row> for Item {
    fn from(row: &Row) -> Self {
        // Strings and numbers only: it cannot fail.
        let data = serde_json::to_vec(&Listed::from(row)).unwrap_or_default();
        Self { partition: row.partition, offset: row.offset, data: data.into() }
    }
}

/// A comment that all streams share, until all of them have it or its memory is needed.
pub struct Shared {
    pub partition: i32,
    pub offset: i64,
    held: StdMutex<Option<(Bytes, Lease)>>,
}

impl Shared {
    /// The comment as JSON; `None` for a stream that comes for it too late.
    pub fn data(&self) -> Option<Bytes> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(data, _)| data.clone())
    }

    fn forget(&self) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Comments that some stream does not have yet, the oldest first, within a budget.
struct Recent {
    budget: &'static Budget,
    waiting: VecDeque<Weak<Shared>>,
}

impl Recent {
    /// Takes memory for a comment, where need be from the oldest ones.
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
        let shared = Arc::new(Shared { partition, offset, held: StdMutex::new(lease.map(|lease| (data, lease))) });
        self.waiting.push_back(Arc::downgrade(&shared));
        shared
    }
}

/// Rows of each partition in one page.
pub fn page_rows(partitions: usize) -> usize {
    (PAGE_TOTAL / partitions.max(1)).clamp(1, PAGE)
}

/// One per process.
pub struct Tail {
    store: Store,
    epoch: u32,
    partitions: i32,
    /// The longest pause between two looks.
    interval: Duration,
    sender: broadcast::Sender<Arc<Shared>>,
    /// Up to where comments were handed out; `None` until Postgres has answered once. Held while looking,
    /// so that nobody joins in the middle.
    position: Mutex<Option<Position>>,
    recent: StdMutex<Recent>,
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
            recent: StdMutex::new(Recent { budget: &budgets().live_comments, waiting: VecDeque::new() }),
            hinted: Notify::new(),
        })
    }

    /// There is something new.
    pub fn wake(&self) {
        self.hinted.notify_one();
    }

    /// Where the table is now, and everything that comes after that. `None` while Postgres has not
    /// answered yet.
    pub async fn join(&self) -> Option<(Position, broadcast::Receiver<Arc<Shared>>)> {
        let position = tokio::time::timeout(JOIN_PATIENCE, self.position.lock()).await.ok()?;
        // A receiver that comes between two looks misses nothing: the next look begins at the position.
        Some((position.clone()?, self.sender.subscribe()))
    }

    /// Looks, again and again.
    pub async fn run(self: Arc<Self>) {
        let soonest = self.interval / 20;
        let (mut pause, mut failing) = (soonest, false);
        loop {
            let looked = self.look().await;
            pause = if matches!(looked, Ok(true)) { soonest } else { (pause * 2).min(self.interval) };
            if let Err(error) = &looked
                && !failing
            {
                tracing::warn!(error = %error, "live streams of comments wait for Postgres");
            }
            failing = looked.is_err();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.hinted.notified() => {}
            }
        }
    }

    /// Hands out what is new, a page at a time; whether there was anything.
    async fn look(&self) -> Result<bool, Error> {
        let mut found = false;
        loop {
            let mut position = self.position.lock().await;
            let known = match &mut *position {
                Some(known) if self.sender.receiver_count() > 0 => known,
                nobody => {
                    let end = self.store.end(self.epoch, self.partitions).await?;
                    *nobody = Some(end);
                    return Ok(false);
                }
            };
            let (rows, complete) = self.store.after(known, page_rows(known.partitions())).await?;
            found |= !rows.is_empty();
            for row in &rows {
                known.advance(row.partition, row.offset + 1);
                // Fails where the last receiver has just gone.
                let shared = self.recent.lock().unwrap_or_else(PoisonError::into_inner).share(Item::from(row));
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
    fn the_oldest_comments_make_room_for_new_ones() {
        let budget = Box::leak(Box::new(Budget::new("test", 100)));
        let mut recent = Recent { budget, waiting: VecDeque::new() };
        let mut share = |offset| recent.share(Item { partition: 0, offset, data: Bytes::from(vec![b'x'; 40]) });
        let shared: Vec<Arc<Shared>> = (0..4).map(&mut share).collect();
        let kept: Vec<bool> = shared.iter().map(|shared| shared.data().is_some()).collect();
        assert_eq!(kept, [false, false, true, true]);
        drop(shared);
        let [fifth, sixth] = [share(4), share(5)];
        assert!(fifth.data().is_some() && sixth.data().is_some(), "what all streams have takes no room");
        assert_eq!(recent.waiting.len(), 2);
        let large = recent.share(Item { partition: 0, offset: 6, data: Bytes::from(vec![b'x'; 101]) });
        assert!(large.data().is_none(), "it does not fit at all");
    }
}
