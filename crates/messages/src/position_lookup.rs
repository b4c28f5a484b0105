//! Looks up the positions of receivers, many with one query.
//!
//! When a process stops, its clients reconnect to the others within a second or two; one query each
//! would keep Postgres busy for longer. Lookups that arrive during a query share the next one.

use std::{collections::HashMap, sync::Arc, time::Duration};

use postrider_microbatch::{Batches, Queue, queue};
use postrider_postgres::query;
use tokio::{sync::Mutex, time::timeout};

use super::{cursor::ReceiverPosition, store::Store};

/// Maximum number of receivers per query.
const MAX_TOGETHER: usize = 256;
/// Maximum number of queued lookups; beyond it, connections wait to enqueue.
const QUEUE: usize = 4_096;
/// Timeout of a lookup; covers the current query and the next.
const TIMEOUT: Duration = Duration::from_secs(12);

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

/// Queue of lookups.
pub struct PositionLookup {
    queue: Queue<Arc<str>, Found>,
    lookups: Mutex<Batches<Arc<str>, Found>>,
}

impl Default for PositionLookup {
    fn default() -> Self {
        let (queue, lookups) = queue(QUEUE);
        Self { queue, lookups: Mutex::new(lookups) }
    }
}

impl PositionLookup {
    /// Returns the position of a receiver.
    pub async fn find(&self, receiver: Arc<str>) -> Found {
        let asked = async { self.queue.ask(receiver).await.ok() };
        timeout(TIMEOUT, asked).await.ok().flatten().unwrap_or(Err(Error::TimedOut))
    }

    /// Answers lookups; runs forever.
    pub async fn answer_forever(&self, store: &Store) {
        let mut lookups = self.lookups.lock().await;
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while lookups.next(&mut together, MAX_TOGETHER).await {
            // Skips connections that have closed meanwhile.
            together.retain(|lookup| !lookup.is_abandoned());
            let receivers: Vec<&str> = together.iter().map(|lookup| &*lookup.question).collect();
            let found = store.positions(&receivers).await.map_err(|error| Error::from(Arc::new(error)));
            for lookup in together.drain(..) {
                let position = |positions: &HashMap<String, _>| positions.get(&*lookup.question).cloned();
                let found = found.as_ref().map(|positions| position(positions).unwrap_or_default());
                lookup.answer(found.map_err(Clone::clone));
            }
        }
    }
}
