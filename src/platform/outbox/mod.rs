//! The writers' end of the outbox: how much may wait in it, and the hint to whoever drains it.

mod backlog;

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sqlx::PgPool;

pub use self::backlog::{Backlog, Config};
use super::query::within;

/// The channel of NOTIFY, as an SQL expression: channels belong to the whole database, and so have the schema's name.
pub const CHANNEL: &str = "current_schema() || '.outbox'";

/// Who drains looks by itself at least so often while there is something to do.
const EVERY: Duration = Duration::from_millis(100);

/// After the commit and beside it: a NOTIFY within would take a lock of the whole database until the disk has the commit.
const NOTIFY: &str =
    "SELECT set_config('synchronous_commit', 'off', true), pg_notify(current_schema() || '.outbox', '')";

/// Hints of one process, at most one in 100 ms.
pub struct Hint {
    pool: PgPool,
    last: Mutex<Option<Instant>>,
}

impl Hint {
    pub fn new(pool: PgPool) -> Self {
        Self { pool, last: Mutex::default() }
    }

    /// To be called after the commit. A hint that is lost costs up to 50 ms.
    pub async fn give(&self) {
        if !self.is_due() {
            return;
        }
        if let Err(error) = within(sqlx::query(NOTIFY).execute(&self.pool)).await {
            tracing::debug!(error = %error, "a hint to the outbox was lost");
        }
    }

    fn is_due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}
