//! Projection of messages: stores batches of the topic in Postgres, each message once, then
//! publishes them to connected receivers.

use std::{collections::HashMap, sync::Arc};

use metrics::counter;
use postrider_kafka::{PartitionId, batch::Record, consumer::Failure, dead_letter::Reason};
use postrider_postgres::query::Error;
use postrider_projection::{Partition, Progress, Project, Projection};
use sqlx::PgPool;

use super::{
    Config,
    append::{Appender, Writer},
    publish::{News, Publisher},
    record,
    store::{Appended, Batch, Row, Store},
};

/// The messages capability in the processor role.
pub struct Projector {
    progress: Progress,
    appender: Appender,
    epoch: u32,
    publisher: Arc<Publisher>,
}

impl Projector {
    /// Returns the projector and the writer that stores its batches.
    pub fn new(config: &Config, pool: PgPool, publisher: Arc<Publisher>) -> (Arc<Self>, Writer) {
        let (store, epoch) = (Store::new(pool), config.epoch);
        let (appender, writer) = Appender::new(store.clone(), epoch);
        let progress = store.progress(epoch);
        (Arc::new(Self { progress, appender, epoch, publisher }), writer)
    }

    fn partition_id(&self, partition: i32) -> PartitionId {
        PartitionId { epoch: self.epoch, partition }
    }

    fn announce(&self, partition_id: PartitionId, rows: &[Row], appended: &Appended) {
        let mut stored = appended.offsets.iter().zip(&appended.prevs).peekable();
        // Both lists are in the order of offsets.
        let news = rows.iter().filter_map(|row| {
            let (_, &prev) = stored.next_if(|(offset, _)| **offset == row.offset)?;
            Some(News { receiver: &row.receiver_id, offset: row.offset, prev, value: &row.value })
        });
        self.publisher.publish(partition_id, news);
    }

    fn announce_heads<'a>(&self, partition_id: PartitionId, rows: impl Iterator<Item = &'a Row>) {
        let heads: HashMap<&str, i64> = rows.map(|row| (row.receiver_id.as_str(), row.offset)).collect();
        let news = heads.iter().map(|(&receiver, &offset)| News { receiver, offset, prev: -1, value: "" });
        self.publisher.publish(partition_id, news);
    }
}

impl Project for Projector {
    type Row = Row;

    const EPOCH: &'static str = "messages.epoch";

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn began(&self) {
        // The previous owner of the partition may have stopped between storing and announcing.
        self.publisher.suspect_missed();
    }

    fn row(&self, partition: i32, record: &Record<'_>) -> Result<Row, Reason> {
        record::row(record, self.partition_id(partition))
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
        let (partition_id, from) = (self.partition_id(partition.number), partition.next);
        let batch = Batch { partition: partition.number, expected: from, next, rows: rows.to_vec() };
        let appended = match self.appender.append(batch).await? {
            Ok(appended) => appended,
            Err(refused) => return Ok(Err(refused)),
        };
        projection.advance(partition, next, appended.moved).await?;
        // Messages that were stored earlier may not have been announced, so announce their
        // positions.
        let known = if appended.moved { from } else { next };
        self.announce_heads(partition_id, rows.iter().filter(|row| row.offset < known));
        let fresh = appended.offsets.len();
        let duplicates = rows.len().saturating_sub(fresh);
        self.announce(partition_id, rows, &appended);
        counter!("postrider_messages_stored_total").increment(fresh as u64);
        counter!("postrider_messages_duplicate_records_total").increment(duplicates as u64);
        Ok(Ok(()))
    }
}
