//! Follows the table for all live streams of a process: new rows are read once, rendered once, and
//! handed to everybody.
//!
//! It looks when it is hinted to, and without a hint in growing intervals up to `comments.stream_sweep_interval_ms`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::{Mutex, Notify, broadcast};

use super::{
    Config,
    cursor::Position,
    http::Listed,
    store::{Row, Store},
};
use crate::platform::query::Error;

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
    sender: broadcast::Sender<Arc<Item>>,
    /// Up to where comments were handed out; `None` until Postgres has answered once. Held while looking,
    /// so that nobody joins in the middle.
    position: Mutex<Option<Position>>,
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
            hinted: Notify::new(),
        })
    }

    /// There is something new.
    pub fn wake(&self) {
        self.hinted.notify_one();
    }

    /// Where the table is now, and everything that comes after that. `None` while Postgres has not
    /// answered yet.
    pub async fn join(&self) -> Option<(Position, broadcast::Receiver<Arc<Item>>)> {
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
                let _ = self.sender.send(Arc::new(Item::from(row)));
            }
            if complete {
                return Ok(found);
            }
        }
    }
}
