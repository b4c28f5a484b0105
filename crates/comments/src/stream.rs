//! One live stream: sends the comments that its client has missed, read from Postgres, and then the
//! comments that the tail broadcasts.
//!
//! The stream subscribes to the tail before it reads Postgres. Comments stored in between arrive
//! twice rather than never, and the position filters out the duplicates. The id of each event is
//! the position after it, from which any process can resume.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{body::Body, http::Response};
use bytes::Bytes;
use futures_util::stream;
use metrics::{counter, gauge};
use postrider_http::{Code, Problem, decode::quoted, sse};
use postrider_identity::Principal;
use postrider_limits::memory::{Lease, budgets};
use postrider_postgres::query::Error;
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        broadcast::{Receiver, error::RecvError},
    },
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Comments,
    cursor::Position,
    store::Store,
    tail::{Item, Shared, page_rows},
};

/// Maximum time for which a page waits for memory.
const MEMORY_PATIENCE: Duration = Duration::from_secs(2);

struct Live {
    store: Store,
    topic_epoch: u32,
    partitions: i32,
    position: Position,
    items: Receiver<Arc<Shared>>,
    /// Comments read from Postgres and not sent yet.
    missed: VecDeque<Item>,
    /// Memory of `missed`.
    lease: Option<Lease>,
    max_text_bytes: usize,
    /// True if Postgres must be read before `items`.
    behind: bool,
    /// True if a comment from `items` was sent since the last read of Postgres.
    followed: bool,
    heartbeat: Interval,
    ends: Instant,
    stop: CancellationToken,
    _open: Open,
}

/// Counts the stream while it is open.
struct Open(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Open {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        gauge!("postrider_comments_open_streams").increment(1);
        Self(permit)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!("postrider_comments_open_streams").decrement(1);
    }
}

/// Opens a stream after a position, or after the newest comment.
pub async fn open(
    comments: &Comments,
    after: Option<Position>,
    principal: Arc<Principal>,
) -> Result<Response<Body>, Problem> {
    let inner = &comments.inner;
    let shelf = comments.shelf()?;
    let limit = inner.config.max_streams;
    let full = || Problem::new(Code::TOO_MANY_STREAMS, format!("{limit} live streams are open; retry later"));
    let permit = inner.streams.clone().try_acquire_owned().map_err(|_| full())?;
    let no_answer = || Problem::new(Code::POSTGRES_UNAVAILABLE, "Postgres does not answer; retry later");
    let (now, items) = shelf.tail.join().await.ok_or_else(no_answer)?;
    let behind = after.is_some();
    let mut position = after.unwrap_or_else(|| now.clone());
    check(&position, &now)?;
    if position.topic_epoch == now.topic_epoch {
        position.widen(now.partitions());
    }
    let heartbeat = Duration::from_millis(inner.config.stream_heartbeat_ms.max(1));
    let mut heartbeat = interval_at(Instant::now() + heartbeat, heartbeat);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut live = Live {
        store: shelf.store.clone(),
        topic_epoch: inner.config.epoch,
        partitions: inner.config.partitions,
        position,
        items,
        missed: VecDeque::new(),
        lease: None,
        max_text_bytes: inner.config.max_text_bytes,
        behind,
        followed: false,
        heartbeat,
        ends: Instant::now() + sse::age(inner.config.stream_max_age_ms),
        stop: inner.stop.clone(),
        _open: Open::new(permit),
    };
    if behind {
        live.catch_up().await.map_err(Problem::postgres_unavailable)?;
    }
    Ok(respond(live, principal))
}

/// Rejects a position that this API cannot have issued.
fn check(position: &Position, now: &Position) -> Result<(), Problem> {
    let fits = position.topic_epoch < now.topic_epoch || position.partitions() <= now.partitions();
    if position.topic_epoch <= now.topic_epoch && fits && position.partitions() <= 10_000 {
        return Ok(());
    }
    let found = quoted(&position.to_string());
    let detail = format!("{found} is not a position in this stream; pass the `id` of one of its events");
    Err(Problem::new(Code::INVALID_REQUEST, detail))
}

fn respond(live: Live, principal: Arc<Principal>) -> Response<Body> {
    // An event without data only sets the position from which the client resumes if the stream
    // breaks before its first comment.
    let hello = sse::hello(&live.position);
    let hello = stream::once(async { Ok::<_, Infallible>(hello) });
    let events = stream::unfold(live, |mut live| async move { live.next().await.map(|event| (Ok(event), live)) });
    sse::respond(stream::StreamExt::chain(hello, events), principal)
}

impl Live {
    /// Returns the next bytes to send. `None` ends the stream; the client resumes from its
    /// position.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.stop.is_cancelled() || Instant::now() >= self.ends {
                return None;
            }
            if let Some(item) = self.missed.pop_front() {
                return Some(self.event(item.partition, item.offset, &item.data));
            }
            self.lease = None;
            if self.behind {
                let stop = self.stop.clone();
                match stop.run_until_cancelled(self.catch_up()).await? {
                    Ok(true) => continue,
                    // No memory is available at the moment.
                    Ok(false) => return Some(sse::HEARTBEAT),
                    Err(error) => {
                        tracing::debug!(error = %error, "comment stream closed");
                        return None;
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                item = self.items.recv() => match item {
                    Ok(item) if self.position.covers(item.partition, item.offset) => {}
                    Ok(item) => match item.data() {
                        Some(data) => {
                            self.followed = true;
                            return Some(self.event(item.partition, item.offset, &data));
                        }
                        // The comment was dropped to free memory, however fast this stream is.
                        None => self.behind = true,
                    },
                    Err(RecvError::Lagged(_)) => self.lagged()?,
                    Err(RecvError::Closed) => return None,
                },
                _ = self.heartbeat.tick() => return Some(sse::HEARTBEAT),
                () = sleep_until(self.ends) => return None,
            }
        }
    }

    /// Handles comments that are no longer buffered: has them read from Postgres, or closes the
    /// stream if it was too slow.
    fn lagged(&mut self) -> Option<()> {
        if self.followed {
            counter!("postrider_comments_slow_streams_total").increment(1);
            return None;
        }
        self.behind = true;
        Some(())
    }

    fn event(&mut self, partition: i32, offset: i64, data: &[u8]) -> Bytes {
        self.position.advance(partition, offset + 1);
        self.heartbeat.reset();
        counter!("postrider_comments_streamed_events_total").increment(1);
        sse::event(&self.position, data)
    }

    /// Reads a page of the comments after the position. After the last page of an epoch, moves to
    /// the next epoch. Returns `false` if there was no memory for a page.
    async fn catch_up(&mut self) -> Result<bool, Error> {
        let queues = &budgets().queues;
        let partitions = self.position.partitions().max(1);
        let limit = if queues.is_tight() { 1 } else { page_rows(partitions).min(16) };
        let most = limit * partitions * self.max_text_bytes;
        let Some(mut lease) = queues.lease_within(most, MEMORY_PATIENCE).await else { return Ok(false) };
        // One comment of each partition is too few to sort them by time: nearly all would be read
        // again.
        let (rows, complete) = match limit {
            1 => self.store.after(&self.position, limit).await?,
            _ => self.store.replay(&self.position, limit).await?,
        };
        self.missed.extend(rows.iter().map(Item::from));
        lease.shrink_to(self.missed.iter().map(|item| item.data.len()).sum());
        self.lease = Some(lease);
        self.followed = false;
        if self.position.topic_epoch == self.topic_epoch {
            self.behind = !complete;
        } else if complete && rows.is_empty() {
            self.position = Position::start(self.position.topic_epoch + 1, self.partitions);
        }
        Ok(true)
    }
}
