//! Stores and reads messages in Postgres.
//!
//! The statement that stores batches also advances the progress of their partitions, provided that
//! it equals the writer's expected value, and each receiver's last offset. A replaced writer
//! therefore stores nothing, and readers see no holes in a partition.
//!
//! About once a second the statement also inserts a mark: rows of a partition from this offset on
//! have at least this `stored_at`. `stored_at` is the start of the transaction, and a commit may
//! come any time later; the mark is chosen under the lock of the progress row, so it holds
//! nevertheless.

use std::collections::HashMap;

use postrider_kafka::PartitionId;
use postrider_postgres::query::{Error, within};
use postrider_projection::Progress;
use postrider_telemetry::unknown::Unknown;
use sqlx::PgPool;

use super::cursor::{Cursor, ReceiverPosition};

/// A message to store.
#[derive(Debug, Clone)]
pub struct Row {
    /// A UUID.
    pub event_id: String,
    pub offset: i64,
    pub receiver_id: String,
    /// JSON as it was produced.
    pub value: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: i64,
}

/// Rows of one partition, with its progress before and after them.
#[derive(Debug)]
pub struct Batch {
    pub partition: i32,
    /// Expected progress: rows below are stored already.
    pub expected: i64,
    pub next: i64,
    pub rows: Vec<Row>,
}

/// Result of storing a batch.
#[derive(Debug, Default)]
pub struct Appended {
    /// False if the progress differs from the expected value; then nothing was stored.
    pub moved: bool,
    /// Offsets of the rows that were not duplicates, in order.
    pub offsets: Vec<i64>,
    /// Offset of the previous message of the same receiver, for each of `offsets`.
    pub prevs: Vec<i64>,
}

/// Next message of a partition in which the receiver has messages after the cursor; or a partition
/// of the cursor whose receiver has been deleted.
#[derive(Debug, sqlx::FromRow)]
pub struct Found {
    #[sqlx(try_from = "i64")]
    topic_epoch: u32,
    partition: i32,
    /// Offset of the receiver's last message; -1 if the receiver was deleted.
    pub last: i64,
    /// `None` if all messages after the cursor were deleted.
    pub offset: Option<i64>,
    pub prev: Option<i64>,
    pub value: Option<String>,
    pub created_ms: Option<i64>,
}

impl Found {
    pub fn partition_id(&self) -> PartitionId {
        PartitionId { epoch: self.topic_epoch, partition: self.partition }
    }

    pub fn is_forgotten(&self) -> bool {
        self.last < 0
    }

    /// Returns true if messages between the last one seen and this one were deleted. If the chain
    /// starts anew after the cursor, the receiver was deleted meanwhile, which counts as a gap for
    /// a client that `resumes`.
    pub fn is_after_gap(&self, seen: i64, resumes: bool) -> bool {
        let anew = |prev: i64| resumes && prev < 0 && seen >= 0;
        self.value.is_none() || self.prev.is_some_and(|prev| prev > seen || anew(prev))
    }
}

/// Unread messages of a receiver in one partition.
#[derive(Debug, sqlx::FromRow)]
pub struct Unread {
    pub receiver_id: String,
    #[sqlx(try_from = "i64")]
    topic_epoch: u32,
    partition: i32,
    /// Offset of the last message.
    pub last: i64,
    /// Offset of the last delivered message; `None` if unknown.
    pub delivered: Option<i64>,
    /// Number of unread messages, up to the limit.
    pub unread: i64,
    pub oldest_ms: Option<i64>,
}

impl Unread {
    pub fn partition_id(&self) -> PartitionId {
        PartitionId { epoch: self.topic_epoch, partition: self.partition }
    }
}

/// Limits of a read, per partition.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub rows: u16,
    /// At least one row is returned, whatever its size.
    pub bytes: usize,
}

const APPEND: &str = r#"
    WITH batch AS (
        SELECT * FROM unnest($2::int[], $3::bigint[], $4::bigint[]) AS batch (partition, expected, next)
    ), moved AS (
        UPDATE projection_progress AS progress
        SET next = batch.next,
            marked_at = CASE WHEN now() >= marked_at AND now() < marked_at + interval '1 second' THEN marked_at ELSE now() END
        FROM batch
        WHERE projection = 'messages' AND topic_epoch = $1 AND progress.partition = batch.partition
          AND progress.next = expected
        RETURNING progress.partition, expected, marked_at
    ), marked AS (
        INSERT INTO message_marks (topic_epoch, partition, "offset", stored_at)
        SELECT $1, partition, expected, marked_at FROM moved WHERE marked_at = now()
        ON CONFLICT (topic_epoch, partition, "offset") DO UPDATE SET stored_at = excluded.stored_at
    ), incoming AS (
        SELECT * FROM unnest($5::int[], $6::text[], $7::bigint[], $8::text[], $9::text[], $10::bigint[])
             AS incoming (partition, event_id, "offset", receiver_id, value, created_ms)
        JOIN moved USING (partition)
        WHERE "offset" >= expected
    ), first AS (
        -- Drop duplicates within the batch.
        SELECT DISTINCT ON (event_id, receiver_id) * FROM incoming ORDER BY event_id, receiver_id, partition, "offset"
    ), fresh AS (
        INSERT INTO message_ids (event_id, receiver_id)
        SELECT event_id::uuid, receiver_id FROM first ORDER BY event_id, receiver_id
        ON CONFLICT DO NOTHING
        RETURNING event_id, receiver_id
    ), chained AS (
        SELECT first.*,
               lag("offset") OVER (PARTITION BY first.receiver_id, partition ORDER BY "offset") AS before
        FROM first JOIN fresh ON fresh.event_id = first.event_id::uuid AND fresh.receiver_id = first.receiver_id COLLATE "C"
    ), stored AS (
        INSERT INTO messages (receiver_id, topic_epoch, partition, "offset", prev, event_id, value, created_at)
        SELECT chained.receiver_id, $1, chained.partition, "offset", coalesce(before, former.last, -1), event_id::uuid, value,
               timestamptz 'epoch' + created_ms * interval '1 millisecond'
        FROM chained
        LEFT JOIN message_receivers AS former
             ON former.receiver_id = chained.receiver_id COLLATE "C" AND former.topic_epoch = $1
            AND former.partition = chained.partition
        RETURNING partition, "offset", prev
    ), heads AS (
        INSERT INTO message_receivers (receiver_id, topic_epoch, partition, last)
        SELECT receiver_id, $1, partition, max("offset") FROM chained GROUP BY receiver_id, partition
        ON CONFLICT (receiver_id, topic_epoch, partition)
        DO UPDATE SET last = excluded.last, last_stored_at = excluded.last_stored_at
    )
    SELECT moved.partition,
           array_remove(array_agg("offset" ORDER BY "offset"), NULL) AS offsets,
           array_remove(array_agg(prev ORDER BY "offset"), NULL) AS prevs
    FROM moved LEFT JOIN stored USING (partition) GROUP BY moved.partition"#;

const AFTER: &str = r#"
    SELECT topic_epoch, partition, coalesce(head.last, -1) AS last, found."offset", found.prev, found.value, found.created_ms
    FROM (SELECT topic_epoch, partition, last FROM message_receivers WHERE receiver_id = $1) AS head
    FULL JOIN unnest($2::bigint[], $3::int[], $4::bigint[]) AS cursor (topic_epoch, partition, seen)
         USING (topic_epoch, partition)
    LEFT JOIN LATERAL (
        SELECT * FROM (
            SELECT page.*, sum(octet_length(value)) OVER (ORDER BY "offset") - octet_length(value) AS bytes_before FROM (
                SELECT "offset", prev, value, (extract(epoch FROM created_at) * 1000)::bigint AS created_ms
                FROM messages
                WHERE receiver_id = $1 AND topic_epoch = head.topic_epoch AND partition = head.partition
                  AND "offset" > coalesce(cursor.seen, -1)
                ORDER BY "offset" LIMIT $5
            ) AS page
        ) AS weighed WHERE bytes_before < $6
    ) AS found ON true
    WHERE head.last IS NULL OR head.last > coalesce(cursor.seen, -1)
    ORDER BY topic_epoch, partition, found."offset""#;

const PLACES: &str = "
    SELECT receiver_id, topic_epoch, partition, head.last, cursor.delivered
    FROM (SELECT * FROM message_receivers WHERE receiver_id = ANY($1)) AS head
    FULL JOIN (SELECT * FROM message_cursors WHERE receiver_id = ANY($1)) AS cursor
         USING (receiver_id, topic_epoch, partition)";

/// Rows are ordered by key, so that two processes that write the same rows wait for each other
/// instead of deadlocking. The position is limited to what is stored, whatever a client
/// acknowledges.
const ACKNOWLEDGE: &str = "
    INSERT INTO message_cursors AS known (receiver_id, topic_epoch, partition, delivered)
    SELECT receiver_id, topic_epoch, partition, least(new.at, head.last)
    FROM unnest($1::text[], $2::bigint[], $3::int[], $4::bigint[]) AS new (receiver_id, topic_epoch, partition, at)
    JOIN message_receivers AS head USING (receiver_id, topic_epoch, partition)
    ORDER BY receiver_id COLLATE \"C\", topic_epoch, partition
    ON CONFLICT (receiver_id, topic_epoch, partition) DO UPDATE SET delivered = excluded.delivered
    WHERE known.delivered < excluded.delivered";

/// Reads the messages table only for partitions with unread messages, and only up to the limit.
const UNREAD: &str = r#"
    SELECT head.receiver_id, head.topic_epoch, head.partition, head.last, known.delivered,
           coalesce(counted.unread, 0) AS unread, oldest.created_ms AS oldest_ms
    FROM message_receivers AS head
    LEFT JOIN message_cursors AS known USING (receiver_id, topic_epoch, partition)
    LEFT JOIN LATERAL (
        SELECT count(*) AS unread FROM (
            SELECT FROM messages
            WHERE receiver_id = head.receiver_id AND topic_epoch = head.topic_epoch AND partition = head.partition
              AND "offset" > coalesce(known.delivered, -1) AND head.last > coalesce(known.delivered, -1)
            LIMIT $2
        ) AS page
    ) AS counted ON true
    LEFT JOIN LATERAL (
        SELECT (extract(epoch FROM created_at) * 1000)::bigint AS created_ms FROM messages
        WHERE receiver_id = head.receiver_id AND topic_epoch = head.topic_epoch AND partition = head.partition
          AND "offset" > coalesce(known.delivered, -1) AND head.last > coalesce(known.delivered, -1)
        ORDER BY "offset" LIMIT 1
    ) AS oldest ON true
    WHERE head.receiver_id = ANY($1)"#;

/// Access to the tables of messages. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
}

impl Store {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Returns the progress of the projection.
    pub fn progress(&self, epoch: u32) -> Progress {
        Progress::new(self.pool.clone(), "messages", epoch)
    }

    /// Stores the rows that are not duplicates and advances the progress of all batches, which must
    /// be of different partitions. Results are in the order of the batches.
    pub async fn append(&self, epoch: u32, batches: &[Batch]) -> Result<Vec<Appended>, Error> {
        let rows: Vec<(i32, &Row)> =
            batches.iter().flat_map(|batch| batch.rows.iter().map(|row| (batch.partition, row))).collect();
        let query = sqlx::query_as(APPEND)
            .bind(i64::from(epoch))
            .bind(column(batches, |batch| batch.partition))
            .bind(column(batches, |batch| batch.expected))
            .bind(column(batches, |batch| batch.next))
            .bind(column(&rows, |(partition, _)| *partition))
            .bind(column(&rows, |(_, row)| row.event_id.as_str()))
            .bind(column(&rows, |(_, row)| row.offset))
            .bind(column(&rows, |(_, row)| row.receiver_id.as_str()))
            .bind(column(&rows, |(_, row)| row.value.as_str()))
            .bind(column(&rows, |(_, row)| row.created_ms));
        let moved: Vec<(i32, Vec<i64>, Vec<i64>)> = within(query.fetch_all(&self.pool)).await?;
        let mut moved: HashMap<i32, Appended> = moved
            .into_iter()
            .map(|(partition, offsets, prevs)| (partition, Appended { moved: true, offsets, prevs }))
            .collect();
        Ok(batches.iter().map(|batch| moved.remove(&batch.partition).unwrap_or_default()).collect())
    }

    /// Returns the receiver's messages after the cursor, by partition and offset.
    pub async fn after(&self, receiver: &str, cursor: &Cursor, limits: Limits) -> Result<Vec<Found>, Error> {
        let seen: Vec<(PartitionId, i64)> = cursor.partitions().collect();
        let query = sqlx::query_as(AFTER)
            .bind(receiver)
            .bind(column(&seen, |(partition_id, _)| i64::from(partition_id.epoch)))
            .bind(column(&seen, |(partition_id, _)| partition_id.partition))
            .bind(column(&seen, |(_, offset)| *offset))
            .bind(i64::from(limits.rows))
            .bind(i64::try_from(limits.bytes.max(1)).unwrap_or(i64::MAX));
        within(query.fetch_all(&self.pool)).await
    }

    /// Returns the last message of these receivers in each partition.
    pub async fn heads(&self, receivers: &[&str]) -> Result<Vec<(String, PartitionId, i64)>, Error> {
        let query = sqlx::query_as(
            "SELECT receiver_id, topic_epoch, partition, last FROM message_receivers WHERE receiver_id = ANY($1)",
        );
        let heads: Vec<(String, i64, i32, i64)> = within(query.bind(receivers).fetch_all(&self.pool)).await?;
        let head = |(receiver, epoch, partition, last)| Ok((receiver, partition_id(epoch, partition)?, last));
        heads.into_iter().map(head).collect()
    }

    /// Returns true if a receiver has had a message.
    pub async fn knows(&self, receiver: &str) -> Result<bool, Error> {
        let query = sqlx::query_scalar("SELECT EXISTS (SELECT FROM message_receivers WHERE receiver_id = $1)");
        within(query.bind(receiver).fetch_one(&self.pool)).await
    }

    /// Returns the positions of receivers, without those that never had a message.
    pub async fn positions(&self, receivers: &[&str]) -> Result<HashMap<String, ReceiverPosition>, Error> {
        type Row = (String, i64, i32, Option<i64>, Option<i64>);
        let rows: Vec<Row> = within(sqlx::query_as(PLACES).bind(receivers).fetch_all(&self.pool)).await?;
        let mut positions = HashMap::<String, ReceiverPosition>::new();
        for (receiver, epoch, partition, last, delivered) in rows {
            let (position, partition_id) = (positions.entry(receiver).or_default(), partition_id(epoch, partition)?);
            last.into_iter().for_each(|offset| position.last.advance(partition_id, offset));
            delivered.into_iter().for_each(|offset| position.delivered.advance(partition_id, offset));
        }
        Ok(positions)
    }

    /// Counts the unread messages of these receivers by partition, up to a limit in each.
    pub async fn unread(&self, receivers: &[String], limit: i64) -> Result<Vec<Unread>, Error> {
        let query = sqlx::query_as(UNREAD).bind(receivers).bind(limit);
        within(query.fetch_all(&self.pool)).await
    }

    /// Stores acknowledged positions. Never moves a position back.
    pub async fn acknowledge(&self, positions: &[(&str, PartitionId, i64)]) -> Result<(), Error> {
        let query = sqlx::query(ACKNOWLEDGE)
            .bind(column(positions, |(receiver, ..)| *receiver))
            .bind(column(positions, |(_, partition_id, _)| i64::from(partition_id.epoch)))
            .bind(column(positions, |(_, partition_id, _)| partition_id.partition))
            .bind(column(positions, |(.., offset)| *offset));
        within(query.execute(&self.pool)).await.map(|_| ())
    }
}

fn partition_id(epoch: i64, partition: i32) -> Result<PartitionId, Unknown> {
    let epoch = u32::try_from(epoch).map_err(|_| Unknown::new("epoch of a topic", epoch))?;
    Ok(PartitionId { epoch, partition })
}

fn column<'a, R, T>(rows: &'a [R], field: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(field).collect()
}
