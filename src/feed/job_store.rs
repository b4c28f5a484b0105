//! Who works on which job, and how far it is.

use std::time::Duration;

use sqlx::PgPool;
use uuid::Uuid;

use crate::platform::query::{Error, within};

/// A job in hand.
#[derive(Debug)]
pub struct Job {
    pub id: i64,
    pub kind: String,
    pub author_id: String,
    user_id: Option<String>,
    pub post_id: Option<i64>,
    pub mark: Mark,
}

/// How far it is; what that means depends on the kind.
#[derive(Debug, Clone, Default)]
pub struct Mark {
    pub post: Option<i64>,
    pub user: Option<String>,
}

impl Job {
    pub fn user_id(&self) -> &str {
        self.user_id.as_deref().unwrap_or_default()
    }

    /// The user after whom it goes on; before all of them at first.
    pub fn after_user(&self) -> &str {
        self.mark.user.as_deref().unwrap_or_default()
    }
}

/// A job belongs to its process for half a minute from each note on.
const CLAIM: &str = "
    UPDATE feed_jobs SET owner = $1::text::uuid, until = now() + interval '30 seconds'
    WHERE id IN (SELECT id FROM feed_jobs WHERE until < now() ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING id, kind, author_id, user_id, post_id, after_post, after_user";

const NOTE: &str = "
    UPDATE feed_jobs SET after_post = $3, after_user = $4, until = now() + interval '30 seconds'
    WHERE id = $1 AND owner = $2::text::uuid";

const PUT_OFF: &str = "
    UPDATE feed_jobs SET until = now() + $3 * interval '1 millisecond', owner = NULL
    WHERE id = $1 AND owner = $2::text::uuid";

const LET_GO: &str = "UPDATE feed_jobs SET until = '-infinity', owner = NULL WHERE owner = $1::text::uuid";

type Claimed = (i64, String, String, Option<String>, Option<i64>, Option<i64>, Option<String>);

/// The table of jobs, as one process sees it.
pub struct JobStore {
    pool: PgPool,
    owner: String,
}

impl JobStore {
    pub fn new(pool: PgPool, owner: Uuid) -> Self {
        Self { pool, owner: owner.to_string() }
    }

    /// Takes the oldest that nobody works on.
    pub async fn claim(&self, limit: usize) -> Result<Vec<Job>, Error> {
        let query = sqlx::query_as(CLAIM).bind(&self.owner).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let mut claimed: Vec<Claimed> = within(query.fetch_all(&self.pool)).await?;
        claimed.sort_unstable_by_key(|(id, ..)| *id);
        let job = |(id, kind, author_id, user_id, post_id, post, user): Claimed| Job {
            id,
            kind,
            author_id,
            user_id,
            post_id,
            mark: Mark { post, user },
        };
        Ok(claimed.into_iter().map(job).collect())
    }

    /// Notes how far a job is. Whether it still belongs to this process.
    pub async fn note(&self, job: &Job) -> Result<bool, Error> {
        let query = sqlx::query(NOTE).bind(job.id).bind(&self.owner).bind(job.mark.post).bind(&job.mark.user);
        Ok(within(query.execute(&self.pool)).await?.rows_affected() > 0)
    }

    pub async fn finish(&self, job: &Job) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM feed_jobs WHERE id = $1 AND owner = $2::text::uuid");
        within(query.bind(job.id).bind(&self.owner).execute(&self.pool)).await.map(|_| ())
    }

    /// Leaves a job to anybody from some time on.
    pub async fn put_off(&self, job: &Job, pause: Duration) -> Result<(), Error> {
        let query = sqlx::query(PUT_OFF).bind(job.id).bind(&self.owner);
        within(query.bind(pause.as_millis() as i64).execute(&self.pool)).await.map(|_| ())
    }

    /// Leaves all of them to others.
    pub async fn let_go(&self) -> Result<(), Error> {
        within(sqlx::query(LET_GO).bind(&self.owner).execute(&self.pool)).await.map(|_| ())
    }
}
