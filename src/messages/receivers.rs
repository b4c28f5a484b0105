//! The bound on receivers in Postgres. Every message names its receiver, and each new name
//! is a row until its receiver has had no message for long, so that names could be made up until the disk is full.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{follower::unreachable, store::Store};
use crate::platform::{
    bound::Bound,
    http::{Code, Problem},
    table_size::{Table, pause_after},
};

const RECEIVERS: Table = Table { name: "message_receivers", row_bytes: "0" };
/// The shortest time between two looks. Names come slowly, compared with what a bound has room for.
const LOOK: Duration = Duration::from_secs(5);
/// Seconds after which a refused message may come again: receivers are forgotten once a day.
const RETRY_AFTER_S: u32 = 60;

/// The bound on receivers, as one api process knows it.
pub struct Receivers {
    bound: Arc<Bound>,
    store: Store,
}

impl Receivers {
    pub fn new(limit: u64, store: Store) -> Arc<Self> {
        Arc::new(Self { bound: Bound::new("receivers", limit), store })
    }

    /// Admits a message, or refuses it where the bound is reached and its receiver is a new one. Below the bound nothing is
    /// asked.
    pub async fn admit(&self, receiver: &str) -> Result<(), Problem> {
        if self.bound.has_room(1) || self.store.knows(receiver).await.map_err(|error| unreachable(&error))? {
            return Ok(());
        }
        self.bound.count_refusal();
        let detail = format!(
            "`{receiver}` has had no message yet, and there are {} receivers, the limit of `messages.max_receivers`; nothing was stored",
            self.bound.limit()
        );
        Err(Problem { retry_after_s: Some(RETRY_AFTER_S), ..Problem::new(Code::TooManyReceivers, detail) })
    }

    /// Counts again and again; never ends by itself. Without a limit there is nothing to count for.
    pub async fn watch(self: Arc<Self>) {
        if self.bound.limit() == 0 {
            return std::future::pending().await;
        }
        loop {
            let begun = Instant::now();
            let look = self.bound.look();
            match RECEIVERS.measure(self.store.pool()).await {
                Ok(size) => self.bound.set(look, size.rows),
                Err(error) => tracing::debug!(error = %error, "could not count receivers"),
            }
            tokio::time::sleep(pause_after(begun, LOOK)).await;
        }
    }
}
