//! Comments in Postgres.
//!
//! One statement stores a batch and moves the progress of its partition from the offset that the
//! writer expects. A writer that was replaced therefore stores nothing, and readers never see gaps
//! in a partition.

use std::collections::BTreeMap;

use postrider_kafka::PartitionId;
use postrider_postgres::query::{Error, within};
use postrider_projection::Progress;
use sqlx::PgPool;

use super::cursor::{Cursor, Position};

/// A stored comment.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Row {
    /// A UUID.
    pub event_id: String,
    #[sqlx(try_from = "i64")]
    pub topic_epoch: u32,
    pub partition: i32,
    pub offset: i64,
    pub text: String,
    pub author_id: Option<String>,
    pub post_id: Option<String>,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
}

/// Result of storing a batch.
#[derive(Debug, sqlx::FromRow)]
pub struct Appended {
    /// True if the progress was at the expected offset. If not, nothing was stored.
    pub moved: bool,
    /// Offsets of the rows that were not stored before.
    pub stored: Vec<i64>,
}

/// The cause of a failed statement.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// The data of a row: Postgres rejects it on every attempt.
    Row,
    /// A different comment is stored at the same position: the topic is not the one that was read
    /// before.
    Position,
    /// Anything else: the batch is retried.
    Dependency,
}

/// Classifies the error of a batch that was not stored.
pub fn fault(error: &Error) -> Fault {
    match error {
        error if error.breaks("comments_position_key") => Fault::Position,
        error if error.is_a_rows() => Fault::Row,
        _ => Fault::Dependency,
    }
}

/// Reads and writes comments. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
}

/// Inserts in the order of ids, so that two writers that store the same ids from different
/// partitions wait for each other instead of deadlocking.
const APPEND: &str = r#"
    WITH moved AS (
        UPDATE projection_progress SET next = $4
        WHERE projection = 'comments' AND topic_epoch = $1 AND partition = $2 AND next = $3
        RETURNING next
    ), stored AS (
        INSERT INTO comments (event_id, topic_epoch, partition, "offset", text, author_id, post_id, created_at)
        SELECT event_id::uuid, $1, $2, "offset", text, author_id, post_id,
               timestamptz 'epoch' + created_ms * interval '1 millisecond'
        FROM unnest($5::text[], $6::bigint[], $7::text[], $8::text[], $9::text[], $10::bigint[])
             AS incoming (event_id, "offset", text, author_id, post_id, created_ms)
        WHERE EXISTS (SELECT FROM moved)
        ORDER BY event_id, "offset"
        ON CONFLICT (event_id) DO NOTHING
        RETURNING "offset"
    )
    SELECT EXISTS (SELECT FROM moved) AS moved, ARRAY(SELECT "offset" FROM stored) AS stored"#;

macro_rules! columns {
    () => {
        r#"event_id::text, topic_epoch, partition, "offset", text, author_id, post_id,
           (extract(epoch FROM created_at) * 1000)::bigint AS created_ms"#
    };
}

macro_rules! page {
    ($condition:literal) => {
        concat!(
            "SELECT ",
            columns!(),
            " FROM comments
             WHERE ",
            $condition,
            r#" (created_at, topic_epoch, partition, "offset")
                   < (timestamptz 'epoch' + $1::bigint * interval '1 millisecond', $2::bigint, $3::int, $4::bigint)
             ORDER BY created_at DESC, topic_epoch DESC, partition DESC, "offset" DESC LIMIT $5"#
        )
    };
}

const PAGE: &str = page!("");
const PAGE_OF_POST: &str = page!("post_id = $6 AND");

const AFTER: &str = concat!(
    "SELECT found.* FROM unnest($2::int[], $3::bigint[]) AS place (number, next)
     CROSS JOIN LATERAL (SELECT ",
    columns!(),
    r#" FROM comments
         WHERE topic_epoch = $1 AND partition = place.number AND "offset" >= place.next
         ORDER BY "offset" LIMIT $4) AS found"#
);

impl Store {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Returns the progress of the projection.
    pub fn progress(&self, topic_epoch: u32) -> Progress {
        Progress::new(self.pool.clone(), "comments", topic_epoch)
    }

    /// Stores the rows that are not stored yet and moves the progress from `expected` to `next` in
    /// one statement.
    pub async fn append(
        &self,
        partition_id: PartitionId,
        expected: i64,
        next: i64,
        rows: &[Row],
    ) -> Result<Appended, Error> {
        let query = sqlx::query_as(APPEND)
            .bind(i64::from(partition_id.epoch))
            .bind(partition_id.partition)
            .bind(expected)
            .bind(next)
            .bind(column(rows, |row| row.event_id.as_str()))
            .bind(column(rows, |row| row.offset))
            .bind(column(rows, |row| row.text.as_str()))
            .bind(column(rows, |row| row.author_id.as_deref()))
            .bind(column(rows, |row| row.post_id.as_deref()))
            .bind(column(rows, |row| row.created_ms));
        within(query.fetch_one(&self.pool)).await
    }

    /// Returns the newest comments that are older than the cursor.
    pub async fn page(&self, older_than: Cursor, post_id: Option<&str>, limit: u16) -> Result<Vec<Row>, Error> {
        let Cursor { created_ms, topic_epoch, partition, offset } = older_than;
        let query = sqlx::query_as(if post_id.is_some() { PAGE_OF_POST } else { PAGE });
        let query = query.bind(created_ms).bind(i64::from(topic_epoch)).bind(partition).bind(offset);
        let query = query.bind(i64::from(limit));
        let query = if let Some(post_id) = post_id { query.bind(post_id) } else { query };
        within(query.fetch_all(&self.pool)).await
    }

    /// Returns up to `limit` comments of each partition after a position, and whether there are no
    /// more. The comments of one partition are in the order of their offsets; partitions are merged
    /// approximately by time, each call for itself.
    pub async fn after(&self, position: &Position, limit: usize) -> Result<(Vec<Row>, bool), Error> {
        let (timed, complete) = self.read(position, limit).await?;
        Ok((timed.into_iter().map(|(_, row)| row).collect(), complete))
    }

    /// Like [`Self::after`], but leaves comments to the next call that may be newer than one that was
    /// not read, so that the calls together return the comments of all partitions by time.
    pub async fn replay(&self, position: &Position, limit: usize) -> Result<(Vec<Row>, bool), Error> {
        let (timed, complete) = self.read(position, limit).await?;
        Ok((up_to_horizon(timed, limit), complete))
    }

    /// Reads the comments of [`Self::after`], each with its time in the order of its partition.
    async fn read(&self, position: &Position, limit: usize) -> Result<(Vec<(i64, Row)>, bool), Error> {
        let (partitions, next): (Vec<i32>, Vec<i64>) = position.places().unzip();
        let query = sqlx::query_as(AFTER)
            .bind(i64::from(position.topic_epoch))
            .bind(partitions)
            .bind(next)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let rows: Vec<Row> = within(query.fetch_all(&self.pool)).await?;
        let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
        rows.iter().for_each(|row| *counts.entry(row.partition).or_default() += 1);
        Ok((merge(rows), counts.values().all(|&count| count < limit)))
    }

    /// Returns the current end of an epoch's comments.
    pub async fn end(&self, topic_epoch: u32, partitions: i32) -> Result<Position, Error> {
        let mut position = Position::start(topic_epoch, partitions);
        self.progress(topic_epoch)
            .all()
            .await?
            .into_iter()
            .for_each(|(partition, next)| position.advance(partition, next));
        Ok(position)
    }
}

fn column<'a, T>(rows: &'a [Row], field: impl Fn(&'a Row) -> T) -> Vec<T> {
    rows.iter().map(field).collect()
}

/// Sorts rows by time as far as this keeps the order within each partition, where times may go
/// back. Returns each with the time by which it is sorted.
fn merge(mut rows: Vec<Row>) -> Vec<(i64, Row)> {
    rows.sort_by_key(|row| (row.partition, row.offset));
    let mut latest: BTreeMap<i32, i64> = BTreeMap::new();
    let mut timed: Vec<(i64, Row)> = Vec::with_capacity(rows.len());
    for row in rows {
        let latest = latest.entry(row.partition).or_insert(row.created_ms);
        *latest = (*latest).max(row.created_ms);
        timed.push((*latest, row));
    }
    timed.sort_by_key(|(time, _)| *time);
    timed
}

/// Returns the merged rows up to the time from which a partition may have more than the `limit` that
/// was read of it: at least the rows of one such partition.
fn up_to_horizon(timed: Vec<(i64, Row)>, limit: usize) -> Vec<Row> {
    let mut partitions: BTreeMap<i32, (usize, i64)> = BTreeMap::new();
    for (time, row) in &timed {
        let (count, last) = partitions.entry(row.partition).or_default();
        (*count, *last) = (*count + 1, *time);
    }
    let cut = partitions.values().filter(|(count, _)| *count >= limit).map(|(_, last)| *last).min();
    timed.into_iter().take_while(|(time, _)| cut.is_none_or(|cut| *time <= cut)).map(|(_, row)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_merged_by_time_without_reordering_any_of_them() {
        let row = |(partition, offset, created_ms): (i32, i64, i64)| Row {
            event_id: String::new(),
            topic_epoch: 0,
            partition,
            offset,
            text: String::new(),
            author_id: None,
            post_id: None,
            created_ms,
        };
        let rows = [(1, 0, 15), (0, 2, 30), (0, 0, 20), (0, 1, 10), (1, 1, 25)].map(row);
        let positions = |rows: &[Row]| rows.iter().map(|row| (row.partition, row.offset)).collect::<Vec<_>>();
        let merged = merge(rows.to_vec());
        let all: Vec<Row> = merged.iter().map(|(_, row)| row.clone()).collect();
        assert_eq!(positions(&all), [(1, 0), (0, 0), (0, 1), (1, 1), (0, 2)]);
        // With a limit of two, partition 1 may have more comments after its second one.
        assert_eq!(positions(&up_to_horizon(merged.clone(), 2)), [(1, 0), (0, 0), (0, 1), (1, 1)]);
        assert_eq!(up_to_horizon(merged, 4).len(), 5, "no partition has more");
    }
}
