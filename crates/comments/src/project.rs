//! The projection: stores batches of the topic in Postgres, one partition at a time and each
//! comment once.

use std::{collections::HashSet, sync::Arc};

use metrics::counter;
use postrider_kafka::{PartitionId, batch::Record, consumer::Failure, dead_letter::Reason};
use postrider_postgres::query::Error;
use postrider_projection::{Partition, Progress, Project, Projection};
use postrider_redis::Redis;
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{
    Config, hint_channel, record,
    store::{Fault, Row, Store, fault},
};

/// Maximum number of characters of a text in the log.
const SHOWN_CHARS: usize = 1_000;

/// The part of the capability that the processor role runs.
pub struct Projector {
    store: Store,
    progress: Progress,
    config: Config,
    /// Signalled when something was stored since the last notification.
    stored: Notify,
}

impl Projector {
    pub fn new(config: Config, pool: PgPool) -> Arc<Self> {
        let store = Store::new(pool);
        Arc::new(Self { progress: store.progress(config.epoch), store, config, stored: Notify::new() })
    }

    /// Publishes a Redis notification when new comments are stored, one at a time: the next one
    /// only after Redis answered. A lost notification only delays readers until they next poll the
    /// table.
    pub async fn hint_forever(self: Arc<Self>, redis: tokio::sync::watch::Receiver<Option<Redis>>, key_prefix: String) {
        let channel = hint_channel(&key_prefix);
        loop {
            self.stored.notified().await;
            let connected = redis.borrow().clone();
            let Some(mut redis) = connected else { continue };
            let mut publish = redis::cmd("PUBLISH");
            if let Err(error) = publish.arg(&channel).arg("").query_async::<()>(&mut redis).await {
                tracing::debug!(error = %error, "comment notification lost");
            }
        }
    }

    fn partition_id(&self, partition: i32) -> PartitionId {
        PartitionId { epoch: self.config.epoch, partition }
    }
}

impl Project for Projector {
    type Row = Row;

    const EPOCH: &'static str = "comments.epoch";

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn row(&self, partition: i32, record: &Record<'_>) -> Result<Row, Reason> {
        record::row(record, self.config.epoch, partition, self.config.max_text_bytes)
    }

    fn offset(row: &Row) -> i64 {
        row.offset
    }

    async fn append(
        &self,
        projection: &Projection<Self>,
        partition: &mut Partition,
        rows: &[Row],
        next: i64,
    ) -> Result<Result<(), Error>, Failure> {
        let appended = match self.store.append(self.partition_id(partition.number), partition.next, next, rows).await {
            Ok(appended) => appended,
            Err(error) => {
                return match fault(&error) {
                    Fault::Row => Ok(Err(error)),
                    Fault::Dependency => Err(Failure::Retry(error.to_string())),
                    Fault::Position => {
                        Err(projection.refuse(partition.number, "has other comments at stored positions"))
                    }
                };
            }
        };
        projection.advance(partition, next, appended.moved).await?;
        // A retry after a lost answer displays its rows, because the first attempt did not.
        let fresh: HashSet<i64> = match appended.moved {
            true => appended.stored.into_iter().collect(),
            false => rows.iter().map(|row| row.offset).collect(),
        };
        rows.iter().filter(|row| fresh.contains(&row.offset)).for_each(display);
        if !fresh.is_empty() {
            self.stored.notify_one();
        }
        counter!("postrider_comments_stored_total").increment(fresh.len() as u64);
        counter!("postrider_comments_duplicate_records_total").increment((rows.len() - fresh.len()) as u64);
        Ok(Ok(()))
    }
}

/// Logs a comment that was just stored. Its text is personal, so only the level `debug` has it.
fn display(row: &Row) {
    tracing::info!(
        comment.id = row.event_id,
        comment.characters = row.text.chars().count(),
        comment.post_id = row.post_id,
        kafka.partition = row.partition,
        kafka.offset = row.offset,
        "comment"
    );
    let text = row.text.char_indices().nth(SHOWN_CHARS).map_or(&*row.text, |(end, _)| &row.text[..end]);
    tracing::debug!(comment.id = row.event_id, comment.text = text, comment.author_id = row.author_id, "comment text");
}
