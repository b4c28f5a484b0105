//! Looks up the positions of receivers, many with one query.
//!
//! When a process stops, its clients reconnect to the others within a second or two; one query each
//! would keep Postgres busy for longer. Lookups that arrive during a query share the next one.

use std::{sync::Arc, time::Duration};

use postrider_postgres::query;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};

use super::{cursor::Cursor, store::Store};

/// Maximum number of receivers per query.
const MAX_TOGETHER: usize = 256;
/// Maximum number of queued lookups; beyond it, connections wait to enqueue.
const QUEUE: usize = 4_096;
/// Timeout of a lookup; covers the current query and the next.
const TIMEOUT: Duration = Duration::from_secs(12);

/// Position of a receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReceiverPosition {
    /// Last message of each partition.
    pub last: Cursor,
    /// Last message of each partition that is known to be delivered.
    pub delivered: Cursor,
}

/// Reason why a position is not known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the position lookup timed out")]
    TimedOut,
    /// Shared by all lookups of the query that failed.
    #[error(transparent)]
    Query(#[from] Arc<query::Error>),
}

type Found = Result<ReceiverPosition, Error>;

struct Lookup {
    receiver: Arc<str>,
    answer: oneshot::Sender<Found>,
}

/// Queue of lookups.
pub struct PositionLookup {
    sender: mpsc::Sender<Lookup>,
    lookups: Mutex<mpsc::Receiver<Lookup>>,
}

impl Default for PositionLookup {
    fn default() -> Self {
        let (sender, lookups) = mpsc::channel(QUEUE);
        Self { sender, lookups: Mutex::new(lookups) }
    }
}

impl PositionLookup {
    /// Returns the position of a receiver.
    pub async fn find(&self, receiver: Arc<str>) -> Found {
        let (answer, found) = oneshot::channel();
        let asked = async {
            self.sender.send(Lookup { receiver, answer }).await.ok()?;
            found.await.ok()
        };
        timeout(TIMEOUT, asked).await.ok().flatten().unwrap_or(Err(Error::TimedOut))
    }

    /// Answers lookups; runs forever.
    pub async fn answer_forever(&self, store: &Store) {
        let mut lookups = self.lookups.lock().await;
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while lookups.recv_many(&mut together, MAX_TOGETHER).await > 0 {
            // Skips connections that have closed meanwhile.
            together.retain(|lookup| !lookup.answer.is_closed());
            let receivers: Vec<&str> = together.iter().map(|lookup| &*lookup.receiver).collect();
            let found = store.positions(&receivers).await.map_err(|error| Error::from(Arc::new(error)));
            for Lookup { receiver, answer } in together.drain(..) {
                let position = found.as_ref().map(|positions| positions.get(&*receiver).cloned().unwrap_or_default());
                let _ = answer.send(position.map_err(Clone::clone));
            }
        }
    }
}
