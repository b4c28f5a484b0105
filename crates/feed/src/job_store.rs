//! The table of jobs: which process owns a job, and the progress of the job.

use std::time::Duration;

use postrider_postgres::query::{Error, within};
use postrider_telemetry::unknown::Unknown;
use sqlx::PgPool;
use uuid::Uuid;

/// A job that this process owns.
#[derive(Debug)]
pub struct Job {
    pub id: i64,
    pub author_id: String,
    pub task: Task,
    pub mark: Mark,
}

/// The work of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Insert a post into the feeds of its author's followers.
    FanOut { post_id: i64 },
    /// Insert the author's posts into the feed of a new follower.
    Backfill { user_id: String },
    /// Remove the author's posts from a former follower's feed.
    Unfollow { user_id: String },
    /// Remove a deleted post from feeds.
    Purge { post_id: i64 },
    /// Change the author to a celebrity, whose posts are merged at read.
    Rise,
    /// Change the author back to an ordinary one, whose posts are fanned out.
    Fall,
    /// Erase the account.
    Erase,
}

/// Progress of a job; its meaning depends on the kind of job.
#[derive(Debug, Clone, Default)]
pub struct Mark {
    pub post: Option<i64>,
    pub user: Option<String>,
}

/// Matches the rows that [`Task::read`] can read. A newer version may write other rows; this
/// version ignores them.
macro_rules! readable {
    () => {
        "((kind IN ('fan_out', 'purge') AND post_id IS NOT NULL) OR (kind IN ('backfill', 'unfollow') AND user_id IS NOT NULL)
          OR kind IN ('rise', 'fall', 'erase'))"
    };
}

impl Task {
    fn read(kind: &str, user_id: Option<String>, post_id: Option<i64>) -> Result<Self, Unknown> {
        match (kind, user_id, post_id) {
            ("fan_out", _, Some(post_id)) => Ok(Self::FanOut { post_id }),
            ("backfill", Some(user_id), _) => Ok(Self::Backfill { user_id }),
            ("unfollow", Some(user_id), _) => Ok(Self::Unfollow { user_id }),
            ("purge", _, Some(post_id)) => Ok(Self::Purge { post_id }),
            ("rise", ..) => Ok(Self::Rise),
            ("fall", ..) => Ok(Self::Fall),
            ("erase", ..) => Ok(Self::Erase),
            (other, ..) => Err(Unknown::new("kind of a job", other)),
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::FanOut { .. } => "fan_out",
            Self::Backfill { .. } => "backfill",
            Self::Unfollow { .. } => "unfollow",
            Self::Purge { .. } => "purge",
            Self::Rise => "rise",
            Self::Fall => "fall",
            Self::Erase => "erase",
        }
    }
}

impl Job {
    /// Returns the user after whom the next step begins; empty for the first step.
    pub fn after_user(&self) -> &str {
        self.mark.user.as_deref().unwrap_or_default()
    }
}

/// Claims jobs. A process owns a job for 30 seconds from each update of its progress.
const CLAIM: &str = concat!(
    "UPDATE feed_jobs SET owner = $1::text::uuid, until = now() + interval '30 seconds'
    WHERE id IN (SELECT id FROM feed_jobs WHERE until < now() AND ",
    readable!(),
    " ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING id, kind, author_id, user_id, post_id, after_post, after_user"
);

const COUNT: &str = concat!(
    "SELECT count(*) FILTER (WHERE readable), coalesce(extract(epoch FROM now() - min(made_at) FILTER (WHERE readable)), 0)::float8,
            count(*) FILTER (WHERE NOT readable), min(kind) FILTER (WHERE NOT readable)
     FROM (SELECT made_at, kind, ",
    readable!(),
    " AS readable FROM feed_jobs) AS jobs"
);

const NOTE: &str = "
    UPDATE feed_jobs SET after_post = $3, after_user = $4, until = now() + interval '30 seconds'
    WHERE id = $1 AND owner = $2::text::uuid";

const PUT_OFF: &str = "
    UPDATE feed_jobs SET until = now() + $3 * interval '1 millisecond', owner = NULL
    WHERE id = $1 AND owner = $2::text::uuid";

const LET_GO: &str = "UPDATE feed_jobs SET until = '-infinity', owner = NULL WHERE owner = $1::text::uuid";

type Claimed = (i64, String, String, Option<String>, Option<i64>, Option<i64>, Option<String>);

/// Access of one process to the table of jobs.
pub struct JobStore {
    pool: PgPool,
    owner: String,
}

impl JobStore {
    pub fn new(pool: PgPool, owner: Uuid) -> Self {
        Self { pool, owner: owner.to_string() }
    }

    /// Claims the oldest jobs that no process owns, of the kinds that this version knows.
    pub async fn claim(&self, limit: usize) -> Result<Vec<Job>, Error> {
        let query = sqlx::query_as(CLAIM).bind(&self.owner).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let mut claimed: Vec<Claimed> = within(query.fetch_all(&self.pool)).await?;
        claimed.sort_unstable_by_key(|(id, ..)| *id);
        // A job that cannot be read after all stays claimed until its claim expires.
        let job = |(id, kind, author_id, user_id, post_id, post, user): Claimed| {
            let task = Task::read(&kind, user_id, post_id).ok()?;
            Some(Job { id, author_id, task, mark: Mark { post, user } })
        };
        Ok(claimed.into_iter().filter_map(job).collect())
    }

    /// Stores the progress of a job. Returns whether this process still owns the job.
    pub async fn note(&self, job: &Job) -> Result<bool, Error> {
        let query = sqlx::query(NOTE).bind(job.id).bind(&self.owner).bind(job.mark.post).bind(&job.mark.user);
        Ok(within(query.execute(&self.pool)).await?.rows_affected() > 0)
    }

    pub async fn finish(&self, job: &Job) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM feed_jobs WHERE id = $1 AND owner = $2::text::uuid");
        within(query.bind(job.id).bind(&self.owner).execute(&self.pool)).await.map(|_| ())
    }

    /// Releases a job to any process after a pause.
    pub async fn put_off(&self, job: &Job, pause: Duration) -> Result<(), Error> {
        let query = sqlx::query(PUT_OFF).bind(job.id).bind(&self.owner);
        within(query.bind(pause.as_millis() as i64).execute(&self.pool)).await.map(|_| ())
    }

    /// Releases all jobs of this process.
    pub async fn let_go(&self) -> Result<(), Error> {
        within(sqlx::query(LET_GO).bind(&self.owner).execute(&self.pool)).await.map(|_| ())
    }
}

/// Numbers of jobs of all processes.
#[derive(Debug)]
pub struct Counted {
    /// Jobs that this version can run.
    pub known: i64,
    /// Age of the oldest job that this version can run, in seconds.
    pub oldest_s: f64,
    /// Jobs that only a newer version can run.
    pub unknown: i64,
    /// Kind of one of the unknown jobs.
    pub kind: Option<String>,
}

/// Counts the jobs of all processes.
pub async fn count(pool: &PgPool) -> Result<Counted, Error> {
    let (known, oldest_s, unknown, kind) = within(sqlx::query_as(COUNT).fetch_one(pool)).await?;
    Ok(Counted { known, oldest_s, unknown, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_as_its_job_or_as_an_error() {
        let read = |kind: &str, user: Option<&str>, post| Task::read(kind, user.map(str::to_owned), post);
        let user_id = "u".to_owned();
        for (kind, task) in [
            ("fan_out", Task::FanOut { post_id: 7 }),
            ("purge", Task::Purge { post_id: 7 }),
            ("backfill", Task::Backfill { user_id: user_id.clone() }),
            ("unfollow", Task::Unfollow { user_id }),
            ("rise", Task::Rise),
            ("fall", Task::Fall),
            ("erase", Task::Erase),
        ] {
            assert_eq!(task.kind(), kind);
            assert_eq!(read(kind, Some("u"), Some(7)), Ok(task));
            assert!(readable!().contains(&format!("'{kind}'")), "{kind}");
        }
        for (kind, user, post) in [
            ("merge", Some("u"), Some(7)),
            ("", None, None),
            ("Erase", None, None),
            ("fan_out", Some("u"), None),
            ("purge", None, None),
            ("backfill", None, Some(7)),
            ("unfollow", None, None),
        ] {
            assert!(read(kind, user, post).is_err(), "{kind}");
        }
    }
}
