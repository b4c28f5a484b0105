//! Queries of the search for undelivered messages.
//!
//! The search position of a partition is an offset, so no message is missed: everything below the
//! partition's progress is committed. Receivers are looked up in the time index of event ids,
//! within the time range of the marks; the lookup may return too many receivers, never too few.

use postrider_kafka::PartitionId;
use postrider_postgres::{
    query::{Error, within},
    upkeep::days::Cutoff,
};
use sqlx::PgPool;
use uuid::Uuid;

use super::round::{Round, Waiting};

/// An undelivered message.
#[derive(Debug, sqlx::FromRow)]
pub struct Row {
    #[sqlx(try_from = "i64")]
    topic_epoch: u32,
    partition: i32,
    pub offset: i64,
    pub receiver_id: String,
    /// A UUID.
    pub event_id: String,
    pub created_ms: i64,
    pub stored_ms: i64,
    /// `None` if the rows before it reach the byte limit.
    pub value: Option<String>,
}

impl Row {
    pub fn partition_id(&self) -> PartitionId {
        PartitionId { epoch: self.topic_epoch, partition: self.partition }
    }
}

/// Limits of a page.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub rows: i64,
    pub bytes: i64,
}

const CLAIM: &str = "
    INSERT INTO message_undelivered_owner AS known (owner, until)
    VALUES ($1::text::uuid, now() + $2::bigint * interval '1 millisecond')
    ON CONFLICT (only_one) DO UPDATE SET owner = excluded.owner, until = excluded.until
    WHERE known.owner = excluded.owner OR known.until < now()";

/// Starts a new partition at its first mark; messages stored before it are not searched.
const BEGIN: &str = r#"
    INSERT INTO message_undelivered (topic_epoch, partition, next)
    SELECT topic_epoch, partition, coalesce(
        (SELECT min("offset") FROM message_marks AS mark
         WHERE mark.topic_epoch = progress.topic_epoch AND mark.partition = progress.partition), progress.next)
    FROM projection_progress AS progress
    WHERE projection = 'messages'
    ON CONFLICT DO NOTHING"#;

/// Returns the marks from the one before the position on. The query uses one snapshot, so messages
/// between the last mark and `until` belong to that mark, unless there are further marks.
const WAITING: &str = r#"
    SELECT progress.topic_epoch, progress.partition, place.next AS place, progress.next AS until, mark."offset",
           (extract(epoch FROM mark.stored_at) * 1000000)::bigint AS stored_us,
           (extract(epoch FROM now()) * 1000000)::bigint AS now_us
    FROM projection_progress AS progress
    JOIN message_undelivered AS place USING (topic_epoch, partition)
    LEFT JOIN LATERAL (
        SELECT "offset", stored_at FROM message_marks AS mark
        WHERE mark.topic_epoch = progress.topic_epoch AND mark.partition = progress.partition
          AND "offset" >= coalesce((SELECT max("offset") FROM message_marks AS before
              WHERE before.topic_epoch = progress.topic_epoch AND before.partition = progress.partition
                AND before."offset" <= place.next), 0)
        ORDER BY "offset" LIMIT $1
    ) AS mark ON true
    WHERE projection = 'messages' AND place.next < progress.next
    ORDER BY progress.topic_epoch, progress.partition, mark."offset""#;

/// Most receivers have received everything and are excluded after reading two rows. `OFFSET 0`
/// keeps the planner from joining whole tables, because it cannot know how few receivers a second
/// has.
const PAGE: &str = r#"
    WITH recent AS MATERIALIZED (
        SELECT DISTINCT receiver_id FROM message_ids
        WHERE stored_at >= timestamptz 'epoch' + $5::bigint * interval '1 microsecond'
          AND stored_at < timestamptz 'epoch' + $6::bigint * interval '1 microsecond'
    ), behind AS (
        SELECT head.receiver_id, head.topic_epoch, head.partition,
               greatest(span.low, coalesce(known.delivered, -1) + 1) AS low, span.high
        FROM recent
        CROSS JOIN LATERAL (
            SELECT * FROM message_receivers WHERE receiver_id = recent.receiver_id OFFSET 0
        ) AS head
        JOIN unnest($1::bigint[], $2::int[], $3::bigint[], $4::bigint[]) AS span (topic_epoch, partition, low, high)
             USING (topic_epoch, partition)
        LEFT JOIN LATERAL (
            SELECT delivered FROM message_cursors
            WHERE receiver_id = head.receiver_id AND topic_epoch = head.topic_epoch AND partition = head.partition OFFSET 0
        ) AS known ON true
        WHERE head.last >= span.low AND coalesce(known.delivered, -1) < least(head.last, span.high - 1)
    ), place AS (
        SELECT found.* FROM behind
        CROSS JOIN LATERAL (
            SELECT receiver_id, topic_epoch, partition, "offset", stored_at FROM messages
            WHERE receiver_id = behind.receiver_id AND topic_epoch = behind.topic_epoch AND partition = behind.partition
              AND "offset" >= behind.low AND "offset" < behind.high
              AND stored_at >= timestamptz 'epoch' + $5::bigint * interval '1 microsecond'
              AND stored_at < timestamptz 'epoch' + $6::bigint * interval '1 microsecond'
            OFFSET 0
        ) AS found
        ORDER BY topic_epoch, partition, "offset" LIMIT $7
    ), weighed AS (
        SELECT place.*, whole.event_id, whole.created_at, whole.value,
               sum(octet_length(whole.value)) OVER (ORDER BY place.topic_epoch, place.partition, place."offset")
                   - octet_length(whole.value) AS bytes_before
        FROM place
        CROSS JOIN LATERAL (
            SELECT event_id, created_at, value FROM messages
            WHERE receiver_id = place.receiver_id AND topic_epoch = place.topic_epoch AND partition = place.partition
              AND "offset" = place."offset" AND stored_at = place.stored_at
            OFFSET 0
        ) AS whole
    )
    SELECT topic_epoch, partition, "offset", receiver_id, event_id::text,
           (extract(epoch FROM created_at) * 1000)::bigint AS created_ms,
           (extract(epoch FROM stored_at) * 1000)::bigint AS stored_ms,
           CASE WHEN bytes_before < $8 THEN value END AS value
    FROM weighed ORDER BY topic_epoch, partition, "offset""#;

/// Advances only from the expected position, and deletes the marks that are no longer needed.
const MOVE: &str = r#"
    WITH moved AS (
        UPDATE message_undelivered AS place SET next = new.next
        FROM unnest($1::bigint[], $2::int[], $3::bigint[], $4::bigint[]) AS new (topic_epoch, partition, place, next)
        WHERE place.topic_epoch = new.topic_epoch AND place.partition = new.partition AND place.next = new.place
        RETURNING place.topic_epoch, place.partition, place.next
    )
    DELETE FROM message_marks AS old USING moved
    WHERE old.topic_epoch = moved.topic_epoch AND old.partition = moved.partition
      AND old."offset" < (SELECT max("offset") FROM message_marks AS mark
          WHERE mark.topic_epoch = moved.topic_epoch AND mark.partition = moved.partition AND mark."offset" <= moved.next)"#;

const FORGET: &str = "DELETE FROM message_marks WHERE stored_at < $1::text::timestamptz";

pub struct Store {
    pool: PgPool,
}

impl Store {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Claims the search for the next `lease_ms`. Returns true on success.
    pub async fn claim(&self, owner: Uuid, lease_ms: i64) -> Result<bool, Error> {
        let query = sqlx::query(CLAIM).bind(owner.to_string()).bind(lease_ms);
        within(query.execute(&self.pool)).await.map(|done| done.rows_affected() > 0)
    }

    /// Releases the search to other processes.
    pub async fn release(&self, owner: Uuid) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM message_undelivered_owner WHERE owner = $1::text::uuid");
        within(query.bind(owner.to_string()).execute(&self.pool)).await.map(|_| ())
    }

    /// Creates a position for every partition without one.
    pub async fn begin(&self) -> Result<(), Error> {
        within(sqlx::query(BEGIN).execute(&self.pool)).await.map(|_| ())
    }

    /// Returns the partitions with unsearched messages, with up to `marks` marks each.
    pub async fn waiting(&self, marks: i64) -> Result<Vec<Waiting>, Error> {
        within(sqlx::query_as(WAITING).bind(marks).fetch_all(&self.pool)).await
    }

    /// Returns the first undelivered messages of a round, by partition and offset.
    pub async fn page(&self, round: &Round, limits: Limits) -> Result<Vec<Row>, Error> {
        let spans = &round.spans;
        let query = sqlx::query_as(PAGE)
            .bind(spans.iter().map(|span| i64::from(span.partition_id.epoch)).collect::<Vec<_>>())
            .bind(spans.iter().map(|span| span.partition_id.partition).collect::<Vec<_>>())
            .bind(spans.iter().map(|span| span.low).collect::<Vec<_>>())
            .bind(spans.iter().map(|span| span.high).collect::<Vec<_>>())
            .bind(round.from_us)
            .bind(round.to_us)
            .bind(limits.rows)
            .bind(limits.bytes);
        within(query.fetch_all(&self.pool)).await
    }

    /// Advances partitions from an expected position to a new one.
    pub async fn advance(&self, moves: &[(PartitionId, i64, i64)]) -> Result<(), Error> {
        let query = sqlx::query(MOVE)
            .bind(moves.iter().map(|(partition_id, ..)| i64::from(partition_id.epoch)).collect::<Vec<_>>())
            .bind(moves.iter().map(|(partition_id, ..)| partition_id.partition).collect::<Vec<_>>())
            .bind(moves.iter().map(|(_, place, _)| *place).collect::<Vec<_>>())
            .bind(moves.iter().map(|(.., next)| *next).collect::<Vec<_>>());
        within(query.execute(&self.pool)).await.map(|_| ())
    }

    /// Deletes marks that are past the retention of messages, because no messages remain for them.
    pub async fn forget_marks(&self, retention_days: u32) -> Result<(), Error> {
        let cutoff = Cutoff::of(&self.pool, retention_days).await?;
        within(sqlx::query(FORGET).bind(cutoff.time).execute(&self.pool)).await.map(|_| ())
    }

    /// Deletes all marks made until now.
    pub async fn forget_all_marks(&self) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM message_marks WHERE stored_at < now()");
        within(query.execute(&self.pool)).await.map(|_| ())
    }

    /// Deletes all positions. A later search starts with messages stored from then on.
    pub async fn forget_places(&self) -> Result<(), Error> {
        within(sqlx::query("DELETE FROM message_undelivered").execute(&self.pool)).await.map(|_| ())
    }
}
