//! Limits the number of receivers in Postgres. Every message names a receiver, and each new name
//! becomes a row until the receiver has had no message for long; without a limit, invented names
//! could fill the disk.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use postrider_http::Problem;
use postrider_limits::bound::Bound;
use postrider_postgres::table_size::{Table, pause_after};

use super::store::Store;
use crate::codes;

const RECEIVERS: Table = Table { name: "message_receivers", row_bytes: "0" };
/// Shortest interval between counts. New names arrive slowly compared with the limit.
const LOOK: Duration = Duration::from_secs(5);
/// Seconds after which a refused message may be retried. Idle receivers are deleted once a day.
const RETRY_AFTER_S: u32 = 60;

/// The limit on receivers and the latest count of an api process.
pub struct Receivers {
    bound: Arc<Bound>,
    store: Store,
}

impl Receivers {
    pub fn new(limit: u64, store: Store) -> Arc<Self> {
        Arc::new(Self { bound: Bound::new("receivers", limit), store })
    }

    /// Admits a message, or refuses it if the limit is reached and its receiver is new. Below the
    /// limit no query is needed.
    pub async fn admit(&self, receiver: &str) -> Result<(), Problem> {
        if self.bound.has_room(1) || self.store.knows(receiver).await.map_err(Problem::postgres_unavailable)? {
            return Ok(());
        }
        self.bound.count_refusal();
        let detail = format!(
            "`{receiver}` is new and {} receivers exist, the limit (`messages.max_receivers`); nothing was stored",
            self.bound.limit()
        );
        Err(Problem { retry_after_s: Some(RETRY_AFTER_S), ..Problem::new(codes::TOO_MANY_RECEIVERS, detail) })
    }

    /// Counts receivers repeatedly; runs forever. Without a limit it does not count.
    pub async fn watch(self: Arc<Self>) {
        if self.bound.limit() == 0 {
            return std::future::pending().await;
        }
        loop {
            let begun = Instant::now();
            let look = self.bound.look();
            match RECEIVERS.measure(self.store.pool()).await {
                Ok(size) => self.bound.set(look, size.rows),
                Err(error) => tracing::debug!(error = %error, "counting receivers failed"),
            }
            tokio::time::sleep(pause_after(begun, LOOK)).await;
        }
    }
}
