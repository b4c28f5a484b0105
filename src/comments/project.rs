//! The projection: batches of the topic into Postgres, one partition at a time, each comment once.
//!
//! Reading starts at the group's commit, though Postgres may have more: what it has is not stored again,
//! but records without a comment are looked at again, because a crash may have come between the table
//! and their dead letter. Where Postgres has less, as after a restore, reading starts there.

use std::{collections::HashSet, sync::Arc};

use metrics::counter;
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{
    Config, hint_channel, record,
    store::{Fault, Place, Row, Store, fault},
};
use crate::platform::{
    kafka::{
        Standing,
        batch::Batch,
        dead_letter::Reason,
        lanes::{Assignment, BatchHandler, Failure, Poison},
    },
    ops::Check,
    query::Error,
    redis::Redis,
};

/// Characters of a text that the log shows.
const SHOWN_CHARS: usize = 1_000;

/// The comments room's part of the processor role.
pub struct Projector {
    store: Store,
    config: Config,
    standing: Standing,
    /// Something was stored since the last hint.
    stored: Notify,
}

/// Where one partition is.
pub struct Partition {
    number: i32,
    /// Everything below is stored.
    next: i64,
    /// Where the topic ended when the partition was gained, until that is reached.
    behind: Option<i64>,
}

impl Projector {
    pub fn new(config: Config, pool: PgPool, check: Check) -> Arc<Self> {
        let standing = Standing::new(check);
        Arc::new(Self { store: Store::new(pool), config, standing, stored: Notify::new() })
    }

    /// Says through Redis that something new is stored, at most once per answer of Redis. A hint that is
    /// lost costs its readers a moment and nothing else.
    pub async fn hint_forever(self: Arc<Self>, redis: tokio::sync::watch::Receiver<Option<Redis>>, key_prefix: String) {
        let channel = hint_channel(&key_prefix);
        loop {
            self.stored.notified().await;
            let connected = redis.borrow().clone();
            let Some(mut redis) = connected else { continue };
            let mut publish = redis::cmd("PUBLISH");
            if let Err(error) = publish.arg(&channel).arg("").query_async::<()>(&mut redis).await {
                tracing::debug!(error = %error, "a hint was lost");
            }
        }
    }

    fn place(&self, partition: i32) -> Place {
        Place { topic_epoch: self.config.epoch, partition }
    }

    /// Stores what a batch has, and returns what of it can never be stored.
    async fn store(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let Some(end) = batch.next_offset() else { return Ok(Vec::new()) };
        let (mut rows, mut poison) = (Vec::with_capacity(batch.len()), Vec::new());
        for record in batch.iter() {
            match record::row(&record, self.config.epoch, partition.number, self.config.max_text_bytes) {
                Ok(row) => rows.push(row),
                Err(reason) => poison.push(Poison { offset: record.offset(), reason }),
            }
        }
        // Halves of a batch that has a row which Postgres refuses, the next one on top.
        let mut pieces = vec![(&rows[..], end)];
        while let Some((rows, next)) = pieces.pop() {
            let Err(error) = self.append(partition, rows, next).await? else { continue };
            match rows {
                [] => return Err(Failure::Retry(error.to_string())),
                [row] => {
                    let reason = Reason { class: "refused", message: error.to_string() };
                    poison.push(Poison { offset: row.offset, reason });
                    pieces.push((&[], next));
                }
                rows => {
                    let (left, right) = rows.split_at(rows.len() / 2);
                    pieces.extend([(right, next), (left, right[0].offset)]);
                }
            }
        }
        Ok(poison)
    }

    /// Stores rows and moves on. The inner error is that of a row; it leaves everything as it was.
    async fn append(&self, partition: &mut Partition, rows: &[Row], next: i64) -> Result<Result<(), Error>, Failure> {
        let place = self.place(partition.number);
        // What is read again takes nothing back.
        let next = next.max(partition.next);
        let appended = match self.store.append(place, partition.next, next, rows).await {
            Ok(appended) => appended,
            Err(error) => {
                return match fault(&error) {
                    Fault::Row => Ok(Err(error)),
                    Fault::Dependency => Err(Failure::Retry(error.to_string())),
                    Fault::Place => Err(self.refuse(partition.number, "has other comments where it was read before")),
                };
            }
        };
        let mut fresh: HashSet<i64> = appended.stored.into_iter().collect();
        if !appended.moved {
            // An attempt whose answer was lost may have done it already.
            let found = self.store.progress(place).await.map_err(retry)?;
            if found != Some(next) {
                return Err(moved(found));
            }
            fresh.extend(rows.iter().map(|row| row.offset));
        }
        partition.next = next;
        rows.iter().filter(|row| fresh.contains(&row.offset)).for_each(display);
        if !fresh.is_empty() {
            self.stored.notify_one();
        }
        counter!("postrider_comments_stored_total").increment(fresh.len() as u64);
        counter!("postrider_comments_repeated_records_total").increment((rows.len() - fresh.len()) as u64);
        Ok(Ok(()))
    }

    /// The partition has what there was when it was gained.
    fn reached(&self, partition: &mut Partition) {
        if partition.behind.take().is_some() {
            self.standing.report(partition.number, None);
        }
    }

    /// Holds a partition whose topic is not the one that was read.
    fn refuse(&self, partition: i32, finding: &str) -> Failure {
        let problem = format!(
            "the topic {finding}: it was replaced or truncated; raise `comments.epoch`, which keeps what is stored and reads the topic under a new group position"
        );
        self.standing.report(partition, Some(problem.clone()));
        Failure::Retry(problem)
    }
}

impl BatchHandler for Projector {
    type Partition = Partition;

    async fn assigned(&self, assignment: Assignment) -> Result<(Partition, i64), Failure> {
        let Assignment { partition: number, committed, low, high } = assignment;
        let next = self.store.begin(self.place(number), low).await.map_err(|error| {
            self.standing.report(number, Some(error.to_string()));
            Failure::Retry(error.to_string())
        })?;
        let done = next.max(committed.unwrap_or(0));
        if done > high {
            return Err(self.refuse(number, &format!("ends at offset {high}, before {done}, which was stored")));
        }
        if next < low {
            tracing::warn!(partition = number, next, low, "the topic no longer has what comes next; it is passed over");
        }
        let from = committed.unwrap_or(next).min(next).max(low);
        let behind = (from < high).then_some(high);
        self.standing.report(number, behind.map(|high| format!("at offset {from} of {high}")));
        Ok((Partition { number, next, behind }, from))
    }

    async fn apply(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let poison = self.store(partition, batch).await?;
        // The end of the log may never be met, where comments keep coming.
        if partition.behind.is_some_and(|high| batch.next_offset() >= Some(high)) {
            self.reached(partition);
        }
        Ok(poison)
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // Postgres may have been restored to what it was while nothing was written.
        match self.store.progress(self.place(partition.number)).await.map_err(retry)? {
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

/// Shows a comment that was just stored.
fn display(row: &Row) {
    let text = row.text.char_indices().nth(SHOWN_CHARS).map_or(&*row.text, |(end, _)| &row.text[..end]);
    tracing::info!(
        comment.id = row.event_id,
        comment.text = text,
        comment.author_id = row.author_id,
        comment.post_id = row.post_id,
        kafka.partition = row.partition,
        kafka.offset = row.offset,
        "comment"
    );
}
