//! The projection: batches of the topic into Postgres, one partition at a time, each message once; then
//! the news of them to whoever is connected.
//!
//! Reading starts at the group's commit, though Postgres may have more: a crash may have come between the
//! tables and a dead letter, or before the news. Where Postgres has less, as after a restore, it starts there.

use std::{collections::HashMap, sync::Arc};

use metrics::counter;
use sqlx::PgPool;

use super::{
    Config,
    cursor::Lane,
    publish::{News, Publisher},
    record,
    store::{Appended, Row, Store},
};
use crate::platform::{
    kafka::{
        Standing,
        batch::Batch,
        lanes::{Assignment, BatchHandler, Failure, Poison},
    },
    ops::Check,
    query::Error,
};

/// The messages room's part of the processor role.
pub struct Projector {
    store: Store,
    epoch: u32,
    standing: Standing,
    publisher: Arc<Publisher>,
}

/// Where one partition is.
pub struct Partition {
    lane: Lane,
    /// Everything below is stored.
    next: i64,
    /// Where the topic ended when the partition was gained, until that is reached.
    behind: Option<i64>,
}

impl Projector {
    pub fn new(config: &Config, pool: PgPool, publisher: Arc<Publisher>, check: Check) -> Arc<Self> {
        let standing = Standing::new(check);
        Arc::new(Self { store: Store::new(pool), epoch: config.epoch, standing, publisher })
    }

    fn lane(&self, partition: i32) -> Lane {
        Lane { epoch: self.epoch, partition }
    }

    /// Stores rows and moves on.
    async fn append(&self, partition: &mut Partition, rows: &[Row], end: i64) -> Result<(), Failure> {
        // What is read again takes nothing back.
        let (from, next) = (partition.next, end.max(partition.next));
        let appended = self.store.append(partition.lane, from, next, rows).await.map_err(retry)?;
        if !appended.moved {
            // An attempt whose answer was lost may have done it already.
            let found = self.store.progress(partition.lane).await.map_err(retry)?;
            if found != Some(next) {
                return Err(moved(found));
            }
        }
        partition.next = next;
        // Whether those that were stored before were announced, nobody knows.
        let known = if appended.moved { from } else { next };
        self.announce_heads(partition.lane, rows.iter().filter(|row| row.offset < known));
        let fresh = appended.offsets.len();
        let taken_again = rows.len().saturating_sub(fresh);
        self.announce(partition.lane, rows, &appended);
        counter!("postrider_messages_stored_total").increment(fresh as u64);
        counter!("postrider_messages_repeated_records_total").increment(taken_again as u64);
        Ok(())
    }

    fn announce(&self, lane: Lane, rows: &[Row], appended: &Appended) {
        let mut stored = appended.offsets.iter().zip(&appended.prevs).peekable();
        // Both are in the order of offsets.
        let news = rows.iter().filter_map(|row| {
            let (_, &prev) = stored.next_if(|(offset, _)| **offset == row.offset)?;
            Some(News { receiver: &row.receiver_id, offset: row.offset, prev, value: &row.value })
        });
        self.publisher.publish(lane, news);
    }

    fn announce_heads<'a>(&self, lane: Lane, rows: impl Iterator<Item = &'a Row>) {
        let heads: HashMap<&str, i64> = rows.map(|row| (row.receiver_id.as_str(), row.offset)).collect();
        let news = heads.iter().map(|(&receiver, &offset)| News { receiver, offset, prev: -1, value: "" });
        self.publisher.publish(lane, news);
    }

    /// The partition has what there was when it was gained.
    fn reached(&self, partition: &mut Partition) {
        if partition.behind.take().is_some() {
            self.standing.report(partition.lane.partition, None);
        }
    }

    /// Holds a partition whose topic is not the one that was read.
    fn refuse(&self, partition: i32, high: i64, done: i64) -> Failure {
        let problem = format!(
            "the topic ends at offset {high}, before {done}, which was stored: it was replaced or truncated; raise `messages.epoch`, which keeps what is stored and reads the topic under a new group position"
        );
        self.standing.report(partition, Some(problem.clone()));
        Failure::Retry(problem)
    }
}

impl BatchHandler for Projector {
    type Partition = Partition;

    async fn assigned(&self, assignment: Assignment) -> Result<(Partition, i64), Failure> {
        let Assignment { partition: number, committed, low, high } = assignment;
        let lane = self.lane(number);
        let next = self.store.begin(lane, low).await.map_err(|error| {
            self.standing.report(number, Some(error.to_string()));
            Failure::Retry(error.to_string())
        })?;
        let done = next.max(committed.unwrap_or(0));
        if done > high {
            return Err(self.refuse(number, high, done));
        }
        if next < low {
            tracing::warn!(partition = number, next, low, "the topic no longer has what comes next; it is passed over");
        }
        let from = committed.unwrap_or(next).min(next).max(low);
        let behind = (from < high).then_some(high);
        self.standing.report(number, behind.map(|high| format!("at offset {from} of {high}")));
        Ok((Partition { lane, next, behind }, from))
    }

    async fn apply(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let Some(end) = batch.next_offset() else { return Ok(Vec::new()) };
        let (mut rows, mut poison) = (Vec::with_capacity(batch.len()), Vec::new());
        for record in batch.iter() {
            match record::row(&record, partition.lane) {
                Ok(row) => rows.push(row),
                Err(reason) => poison.push(Poison { offset: record.offset(), reason }),
            }
        }
        self.append(partition, &rows, end).await?;
        // The end of the log may never be met, where messages keep coming.
        if partition.behind.is_some_and(|high| end >= high) {
            self.reached(partition);
        }
        Ok(poison)
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // Postgres may have been restored to what it was while nothing was written.
        match self.store.progress(partition.lane).await.map_err(retry)? {
            Some(next) if next == partition.next => Ok(()),
            found => Err(moved(found)),
        }
    }

    async fn caught_up(&self, partition: &mut Partition) -> Result<(), Failure> {
        self.reached(partition);
        Ok(())
    }

    fn revoked(&self, partition: i32) {
        self.standing.revoked(partition);
    }

    fn joined(&self, gained: &[i32]) {
        self.standing.joined(gained);
    }

    fn left(&self) {
        self.standing.left();
    }
}

fn retry(error: Error) -> Failure {
    Failure::Retry(error.to_string())
}

/// Another writer was there, or Postgres lost something: the partition is looked at anew.
fn moved(found: Option<i64>) -> Failure {
    Failure::Restart(
        found.map_or("its progress is gone".to_owned(), |next| format!("its progress is at offset {next}")),
    )
}
