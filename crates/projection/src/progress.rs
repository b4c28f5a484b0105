//! The progress of projections, in the table `projection_progress`.

use postrider_postgres::query::{Error, within};
use sqlx::PgPool;

const BEGIN: &str = "
    WITH made AS (
        INSERT INTO projection_progress (projection, topic_epoch, partition, next) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING RETURNING next
    )
    SELECT next FROM made
    UNION ALL
    SELECT next FROM projection_progress WHERE projection = $1 AND topic_epoch = $2 AND partition = $3";

const NEXT: &str = "SELECT next FROM projection_progress WHERE projection = $1 AND topic_epoch = $2 AND partition = $3";

const ALL: &str = "SELECT partition, next FROM projection_progress WHERE projection = $1 AND topic_epoch = $2";

/// Progress of a projection: for each partition of its topic, the offset below which everything is
/// stored. The capability's own statement moves it, together with what it stores. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    pool: PgPool,
    projection: &'static str,
    topic_epoch: u32,
}

impl Progress {
    /// Returns the progress of a projection of the topic's given epoch.
    pub fn new(pool: PgPool, projection: &'static str, topic_epoch: u32) -> Self {
        Self { pool, projection, topic_epoch }
    }

    /// Returns the progress of a partition. If it has none yet, records `low` and returns it.
    pub async fn begin(&self, partition: i32, low: i64) -> Result<i64, Error> {
        let query = sqlx::query_scalar(BEGIN).bind(self.projection).bind(i64::from(self.topic_epoch));
        within(query.bind(partition).bind(low).fetch_one(&self.pool)).await
    }

    /// Returns the progress of a partition; `None` if it has none yet.
    pub async fn next(&self, partition: i32) -> Result<Option<i64>, Error> {
        let query = sqlx::query_scalar(NEXT).bind(self.projection).bind(i64::from(self.topic_epoch));
        within(query.bind(partition).fetch_optional(&self.pool)).await
    }

    /// Returns the progress of all partitions, each with its number.
    pub async fn all(&self) -> Result<Vec<(i32, i64)>, Error> {
        let query = sqlx::query_as(ALL).bind(self.projection).bind(i64::from(self.topic_epoch));
        within(query.fetch_all(&self.pool)).await
    }
}
