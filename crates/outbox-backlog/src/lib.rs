//! Writers' side of the outbox: the bound on waiting rows, and the notification of the outbox
//! drain.

mod backlog;
pub mod codes;

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postrider_postgres::query::within;
use sqlx::PgPool;

pub use self::backlog::{Backlog, Config};

/// Channel of NOTIFY, as an SQL expression. Channels belong to the whole database, so the name
/// contains the schema's.
pub const CHANNEL: &str = "current_schema() || '.outbox'";

/// The outbox drain polls at least this often while there is something to do.
const EVERY: Duration = Duration::from_millis(100);

/// Sent after the commit, in a transaction of its own: a NOTIFY in the same transaction would hold
/// a lock of the whole database until the commit is on disk.
const NOTIFY: &str =
    "SELECT set_config('synchronous_commit', 'off', true), pg_notify(current_schema() || '.outbox', '')";

/// Notifies the outbox drain, at most once per 100 ms and process.
pub struct Hint {
    pool: PgPool,
    last: Mutex<Option<Instant>>,
}

impl Hint {
    pub fn new(pool: PgPool) -> Self {
        Self { pool, last: Mutex::default() }
    }

    /// Notifies the outbox drain. Call it after the commit. A lost notification costs up to 50 ms.
    pub async fn give(&self) {
        if !self.is_due() {
            return;
        }
        if let Err(error) = within(sqlx::query(NOTIFY).execute(&self.pool)).await {
            tracing::debug!(error = %error, "outbox drain not notified");
        }
    }

    fn is_due(&self) -> bool {
        let mut last = self.last.lock();
        let due = last.is_none_or(|last| last.elapsed() >= EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}
