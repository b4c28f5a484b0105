//! The epoch of timelines in Postgres, as api processes see it.
//!
//! Deletions are noted in Redis before they are answered. A process that cannot reach Redis raises
//! the epoch in Postgres instead, and answers only after [`SEEN_AFTER`]: by then every api
//! process has read the new epoch, and uses no timeline until the projection has passed the epoch
//! on to Redis. A process that cannot read Postgres meanwhile keeps the epoch that it knows.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use metrics::counter;
use postrider_postgres::query::{Error, within};
use sqlx::PgPool;
use tokio::sync::Mutex;

/// Interval at which api processes read the epoch.
const READ_INTERVAL: Duration = Duration::from_millis(250);
/// Time that Postgres has to answer.
const READ_TIMEOUT: Duration = Duration::from_millis(500);
/// Time after which every process has read an epoch that was raised.
pub const SEEN_AFTER: Duration = Duration::from_secs(1);

/// Makes all existing timelines obsolete.
pub async fn raise(pool: &PgPool) -> Result<(), Error> {
    counter!("postrider_feed_epochs_raised_total").increment(1);
    let raise = sqlx::query("UPDATE feed_timelines SET epoch = epoch + 1");
    within(raise.execute(pool)).await.map(|_| ())
}

/// The newest epoch that this process has read.
#[derive(Debug, Default)]
pub struct NewestEpoch {
    /// 0 until it was read once.
    epoch: AtomicI64,
}

impl NewestEpoch {
    /// Returns whether timelines of this epoch are not obsolete.
    pub fn is_reached_by(&self, epoch: i64) -> bool {
        let newest = self.epoch.load(Ordering::Relaxed);
        newest > 0 && newest <= epoch
    }

    /// Reads the epoch again and again.
    pub async fn follow(&self, pool: &PgPool) -> Infallible {
        loop {
            let read = sqlx::query_scalar("SELECT epoch FROM feed_timelines").fetch_one(pool);
            match tokio::time::timeout(READ_TIMEOUT, read).await {
                Ok(Ok(epoch)) => self.epoch.store(epoch, Ordering::Relaxed),
                Ok(Err(error)) => tracing::debug!(%error, "epoch of timelines not read, retrying"),
                Err(_) => tracing::debug!("epoch of timelines not read in time, retrying"),
            }
            tokio::time::sleep(READ_INTERVAL).await;
        }
    }
}

/// Raises the epoch once for all callers that wait for it.
#[derive(Debug, Default)]
pub struct Raises {
    /// Number of raises that have begun.
    begun: AtomicU64,
    /// True if the last one succeeded.
    turn: Mutex<bool>,
}

impl Raises {
    /// Returns whether the epoch was raised after this call.
    pub async fn raise(&self, pool: &PgPool) -> bool {
        let arrived = self.begun.load(Ordering::SeqCst);
        let mut succeeded = self.turn.lock().await;
        if self.begun.load(Ordering::SeqCst) == arrived {
            self.begun.fetch_add(1, Ordering::SeqCst);
            let raised = raise(pool).await;
            if let Err(error) = &raised {
                tracing::warn!(%error, "epoch of timelines not raised, the projection updates them later");
            }
            *succeeded = raised.is_ok();
        }
        *succeeded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timelines_are_used_once_redis_has_the_newest_epoch() {
        let newest = NewestEpoch::default();
        assert!(!newest.is_reached_by(7), "nothing was read yet");
        newest.epoch.store(7, Ordering::Relaxed);
        assert!(newest.is_reached_by(7) && newest.is_reached_by(8));
        assert!(!newest.is_reached_by(6));
    }
}
