//! Maintains the tables of messages: creates and drops the daily partitions, deletes event ids
//! together with their messages, and deletes receivers that have had no message for long.

use std::time::{Duration, Instant};

use postrider_postgres::{
    query::{Error, within_at_most},
    upkeep::{
        Upkeep,
        days::{Cutoff, Days},
        in_chunks,
        partitions::DailyTable,
    },
};
use sqlx::PgPool;

const TABLE: DailyTable = DailyTable { name: "messages", title: "messages", time: "stored_at", days_ahead: 3 };
/// Maximum number of ids or receivers deleted per statement.
const CHUNK: u32 = 10_000;
/// Interval between deletions of idle receivers, each of which reads the whole table.
const RECEIVERS_EVERY: Duration = Duration::from_secs(24 * 3_600);
/// Timeout of one statement that deletes idle receivers.
const RECEIVERS_TIMEOUT: Duration = Duration::from_secs(300);

const FORGET: &str = "
    DELETE FROM message_ids WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM message_ids WHERE stored_at < $1::text::timestamptz LIMIT $2))";

/// Skips a receiver that gets a message meanwhile: the statement that stores it holds the lock.
const FORGET_RECEIVERS: &str = "
    WITH idle AS (
        SELECT receiver_id, topic_epoch, partition, last FROM message_receivers
        WHERE last_stored_at < $1::text::timestamptz LIMIT $2 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM message_receivers AS head USING idle
        WHERE head.receiver_id = idle.receiver_id AND head.topic_epoch = idle.topic_epoch
          AND head.partition = idle.partition AND head.last = idle.last
        RETURNING 1
    ), known AS (
        DELETE FROM message_cursors AS known USING idle
        WHERE known.receiver_id = idle.receiver_id AND known.topic_epoch = idle.topic_epoch
          AND known.partition = idle.partition AND known.delivered <= idle.last
    )
    SELECT count(*) FROM gone";

/// Maintains the tables until dropped. Logs what it did and what failed.
pub async fn keep(pool: PgPool, retention_days: u32) {
    let (mut upkeep, mut days) = (Upkeep::new("messages"), Days::default());
    let mut receivers_looked: Option<Instant> = None;
    loop {
        upkeep.step("days", days.note(&pool)).await;
        upkeep.step("create", TABLE.create(&pool)).await;
        upkeep.step("count", TABLE.count_default(&pool)).await;
        upkeep.step("expire", TABLE.expire(&pool, retention_days)).await;
        upkeep.step("ids", forget_ids(&pool, retention_days)).await;
        if receivers_looked.is_none_or(|at| at.elapsed() > RECEIVERS_EVERY) {
            let forgetting = async {
                forget_receivers(&pool, retention_days).await?;
                receivers_looked = Some(Instant::now());
                Ok::<_, Error>(())
            };
            upkeep.step("receivers", forgetting).await;
        }
        upkeep.pause().await;
    }
}

async fn forget_ids(pool: &PgPool, retention_days: u32) -> Result<(), Error> {
    let cutoff = Cutoff::of(pool, retention_days).await?;
    let forget = || async {
        let query = sqlx::query(FORGET).bind(&cutoff.time).bind(i64::from(CHUNK));
        query.execute(pool).await.map(|done| done.rows_affected())
    };
    in_chunks(u64::from(CHUNK), forget).await.map(|_| ())
}

/// Keeps receivers twice as long as messages, so that a client that resumes meanwhile learns of the
/// gap.
async fn forget_receivers(pool: &PgPool, retention_days: u32) -> Result<(), Error> {
    let cutoff = Cutoff::of(pool, retention_days.saturating_mul(2).saturating_add(1)).await?;
    let mut forgotten = 0;
    loop {
        let query = sqlx::query_scalar(FORGET_RECEIVERS).bind(&cutoff.time).bind(i64::from(CHUNK));
        let gone: i64 = within_at_most(RECEIVERS_TIMEOUT, query.fetch_one(pool)).await?;
        forgotten += gone;
        if gone < i64::from(CHUNK) {
            break;
        }
    }
    if forgotten > 0 {
        tracing::info!(receivers = forgotten, "deleted idle receivers");
    }
    Ok(())
}
