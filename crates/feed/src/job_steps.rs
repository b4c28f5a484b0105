//! Steps of jobs. Each step is a transaction that acts on the current state of the tables.
//!
//! Steps that insert rows of an author's posts hold a shared lock, and steps that delete such rows
//! hold it exclusively. Otherwise a step that began to insert before an unfollow or a deletion
//! could end after the purge.

use postrider_postgres::{
    query::{Error, within},
    transaction::Transaction,
};
use sqlx::PgPool;

use super::{
    Config,
    fan_out::{State, overlaps, turn},
};

/// The users of a step.
#[derive(Debug)]
pub struct Found {
    /// User ids in ascending order.
    pub users: Vec<String>,
    /// True if there are no more users.
    last: bool,
}

impl Found {
    /// Returns the last user of the step; `None` if there are no more users.
    pub fn more(&self) -> Option<String> {
        self.users.last().filter(|_| !self.last).cloned()
    }
}

const SHARED: &str = "SELECT pg_advisory_xact_lock_shared(hashtext(current_schema() || '.feed_rows'), hashtext($1))";
const EXCLUSIVE: &str = "SELECT pg_advisory_xact_lock(hashtext(current_schema() || '.feed_rows'), hashtext($1))";

macro_rules! fan_out {
    ($overlap:literal) => {
        concat!(
            "WITH page AS MATERIALIZED (
                SELECT follower_id FROM follows WHERE followee_id = $1 AND follower_id > $2
                  AND EXISTS (SELECT FROM posts WHERE id = $3 AND deleted_at IS NULL)
                ORDER BY follower_id LIMIT $4
            ), fanned AS (
                INSERT INTO feed_rows (user_id, post_id) SELECT follower_id, $3 FROM page ",
            $overlap,
            ")
            SELECT follower_id FROM page ORDER BY follower_id"
        )
    };
}

pub(super) const FAN_OUT: &str = fan_out!("");
const FAN_OUT_ANYWAY: &str = fan_out!("ON CONFLICT DO NOTHING");

/// Selects nothing for an author who is merged at read. When that ends, the job that ends it fills
/// all rows.
const BACKFILL: &str = "
    WITH page AS MATERIALIZED (
        SELECT id FROM posts WHERE author_id = $1 AND id < $2 AND deleted_at IS NULL
          AND EXISTS (SELECT FROM follows WHERE followee_id = $1 AND follower_id = $3)
          AND NOT EXISTS (SELECT FROM feed_authors WHERE author_id = $1 AND state IN (1, 2))
        ORDER BY id DESC LIMIT $4
    ), filled AS (
        INSERT INTO feed_rows (user_id, post_id) SELECT $3, id FROM page ON CONFLICT DO NOTHING
    )
    SELECT count(*), min(id) FROM page";

/// Also deletes rows of deleted posts when the author is followed again: while the user did not
/// follow the author, the purge of a post did not reach this feed.
const UNFOLLOW: &str = "
    WITH page AS MATERIALIZED (
        SELECT id FROM posts WHERE author_id = $1 AND id < $2
          AND (deleted_at IS NOT NULL OR NOT EXISTS (SELECT FROM follows WHERE followee_id = $1 AND follower_id = $3))
        ORDER BY id DESC LIMIT $4
    ), purged AS (
        DELETE FROM feed_rows USING page WHERE feed_rows.user_id = $3 AND feed_rows.post_id = page.id
    )
    SELECT count(*), min(id) FROM page";

const PURGE: &str = "
    WITH page AS MATERIALIZED (
        SELECT follower_id FROM follows WHERE followee_id = $1 AND follower_id > $2
          AND EXISTS (SELECT FROM posts WHERE id = $3 AND deleted_at IS NOT NULL)
        ORDER BY follower_id LIMIT $4
    ), purged AS (
        DELETE FROM feed_rows USING page WHERE feed_rows.user_id = page.follower_id AND feed_rows.post_id = $3
    )
    SELECT follower_id FROM page ORDER BY follower_id";

const FOLLOWERS: &str = "
    SELECT follower_id FROM follows WHERE followee_id = $1 AND follower_id > $2 ORDER BY follower_id LIMIT $3";

const UNFOLLOW_ALL: &str = "
    DELETE FROM follows USING (
        SELECT followee_id FROM follows WHERE follower_id = $1 ORDER BY followee_id LIMIT $2 FOR UPDATE
    ) AS page
    WHERE follows.follower_id = $1 AND follows.followee_id = page.followee_id RETURNING follows.followee_id";

const DELETE_POSTS: &str = "
    WITH gone AS (
        UPDATE posts SET deleted_at = now(), content = ''
        WHERE id IN (SELECT id FROM posts WHERE author_id = $1 AND deleted_at IS NULL ORDER BY id LIMIT $2)
          AND deleted_at IS NULL RETURNING id
    ), jobs AS (
        INSERT INTO feed_jobs (kind, author_id, post_id) SELECT 'purge', $1, id FROM gone
    )
    SELECT count(*) FROM gone";

const HAS_JOBS: &str = "SELECT EXISTS (SELECT FROM feed_jobs WHERE author_id = $1 AND kind <> 'erase')";

const EMPTY_FEED: &str = "
    DELETE FROM feed_rows WHERE user_id = $1
      AND post_id IN (SELECT post_id FROM feed_rows WHERE user_id = $1 ORDER BY post_id LIMIT $2)";

const DROP_FOLLOWERS: &str = "
    DELETE FROM follows WHERE followee_id = $1
      AND follower_id IN (SELECT follower_id FROM follows WHERE followee_id = $1 ORDER BY follower_id LIMIT $2)";

/// Deletes what remains of an account and ends its erasure, unless a write that began before the
/// erasure has stored something.
const FORGET_ACCOUNT: &str = "
    WITH tombstones AS (
        DELETE FROM posts WHERE author_id = $1 AND deleted_at IS NOT NULL
    ), known AS (
        DELETE FROM feed_authors WHERE author_id = $1
    ), floors AS (
        DELETE FROM feed_floors WHERE user_id = $1
    )
    DELETE FROM feed_erasures WHERE user_id = $1
      AND NOT EXISTS (SELECT FROM posts WHERE author_id = $1 AND deleted_at IS NULL)
      AND NOT EXISTS (SELECT FROM follows WHERE follower_id = $1 OR followee_id = $1)
    RETURNING user_id";

/// Runs steps of jobs.
pub struct JobSteps {
    pool: PgPool,
    config: Config,
}

impl JobSteps {
    pub fn new(pool: PgPool, config: Config) -> Self {
        Self { pool, config }
    }

    fn limit(&self) -> i64 {
        self.config.chunk_rows.max(1)
    }

    /// Begins a transaction that holds the author's lock.
    async fn begin(&self, lock: &'static str, author_id: &str) -> Result<Transaction, Error> {
        let mut transaction = within(Transaction::begin(&self.pool)).await?;
        within(sqlx::query(lock).bind(author_id).execute(&mut *transaction)).await?;
        Ok(transaction)
    }

    fn found(&self, users: Vec<String>) -> Found {
        Found { last: (users.len() as i64) < self.limit(), users }
    }

    async fn users(
        &self,
        (lock, statement): (&'static str, &'static str),
        author_id: &str,
        post_id: i64,
        after: &str,
    ) -> Result<Found, Error> {
        let mut transaction = self.begin(lock, author_id).await?;
        let query = sqlx::query_scalar(statement).bind(author_id).bind(after).bind(post_id).bind(self.limit());
        let users = within(query.fetch_all(&mut *transaction)).await?;
        within(transaction.commit()).await?;
        Ok(self.found(users))
    }

    async fn posts(
        &self,
        (lock, statement): (&'static str, &'static str),
        author_id: &str,
        user_id: &str,
        below: Option<i64>,
    ) -> Result<Option<i64>, Error> {
        let mut transaction = self.begin(lock, author_id).await?;
        let query = sqlx::query_as(statement).bind(author_id).bind(below.unwrap_or(i64::MAX)).bind(user_id);
        let (count, lowest): (i64, Option<i64>) = within(query.bind(self.limit()).fetch_one(&mut *transaction)).await?;
        within(transaction.commit()).await?;
        Ok(lowest.filter(|_| count >= self.limit()))
    }

    /// Inserts a post into the feeds of the next followers.
    pub async fn fan_out(&self, author_id: &str, post_id: i64, after: &str) -> Result<Found, Error> {
        match self.users((SHARED, FAN_OUT), author_id, post_id, after).await {
            Err(error) if overlaps(&error) => self.users((SHARED, FAN_OUT_ANYWAY), author_id, post_id, after).await,
            found => found,
        }
    }

    /// Removes a deleted post from the feeds of the next followers.
    pub async fn purge(&self, author_id: &str, post_id: i64, after: &str) -> Result<Found, Error> {
        self.users((EXCLUSIVE, PURGE), author_id, post_id, after).await
    }

    /// Inserts the author's next posts into a feed. Returns the lowest id if there may be more.
    pub async fn backfill(&self, author_id: &str, user_id: &str, below: Option<i64>) -> Result<Option<i64>, Error> {
        let state = sqlx::query_scalar("SELECT state FROM feed_authors WHERE author_id = $1").bind(author_id);
        within(state.fetch_optional(&self.pool)).await?.map(State::read).transpose()?;
        self.posts((SHARED, BACKFILL), author_id, user_id, below).await
    }

    /// Removes the author's next posts from a feed. Returns the lowest id if there may be more.
    pub async fn unfollow(&self, author_id: &str, user_id: &str, below: Option<i64>) -> Result<Option<i64>, Error> {
        self.posts((EXCLUSIVE, UNFOLLOW), author_id, user_id, below).await
    }

    /// Returns the next followers.
    pub async fn followers(&self, author_id: &str, after: &str) -> Result<Found, Error> {
        let query = sqlx::query_scalar(FOLLOWERS).bind(author_id).bind(after).bind(self.limit());
        within(query.fetch_all(&self.pool)).await.map(|users| self.found(users))
    }

    /// Returns the author's oldest post after `after`.
    pub async fn next_post(&self, author_id: &str, after: i64) -> Result<Option<i64>, Error> {
        let query = "SELECT id FROM posts WHERE author_id = $1 AND id > $2 AND deleted_at IS NULL ORDER BY id LIMIT 1";
        within(sqlx::query_scalar(query).bind(author_id).bind(after).fetch_optional(&self.pool)).await
    }

    /// Completes a change of an author's state. Starts the next one if the number of followers
    /// requires it.
    pub async fn turned(&self, author_id: &str, from: i16, to: i16) -> Result<(), Error> {
        let mut transaction = within(Transaction::begin(&self.pool)).await?;
        let query = sqlx::query("UPDATE feed_authors SET state = $3 WHERE author_id = $1 AND state = $2");
        within(query.bind(author_id).bind(from).bind(to).execute(&mut *transaction)).await?;
        turn(&mut transaction, &self.config, &[author_id.to_owned()]).await?;
        within(transaction.commit()).await
    }

    /// Ends the next follows of a user. Returns whether there were any.
    pub async fn unfollow_all(&self, user_id: &str) -> Result<bool, Error> {
        let mut transaction = within(Transaction::begin(&self.pool)).await?;
        let query = sqlx::query_scalar(UNFOLLOW_ALL).bind(user_id).bind(self.limit());
        let mut authors: Vec<String> = within(query.fetch_all(&mut *transaction)).await?;
        authors.sort_unstable();
        let count = "INSERT INTO feed_authors AS known (author_id, followers) SELECT author_id, -1 FROM unnest($1::text[]) AS gone (author_id)
             ON CONFLICT (author_id) DO UPDATE SET followers = known.followers - 1";
        within(sqlx::query(count).bind(&authors).execute(&mut *transaction)).await?;
        turn(&mut transaction, &self.config, &authors).await?;
        within(transaction.commit()).await?;
        Ok(!authors.is_empty())
    }

    /// Deletes the next posts of a user and adds a purge job for each. Returns whether there were
    /// any.
    pub async fn delete_posts(&self, user_id: &str) -> Result<bool, Error> {
        let query = sqlx::query_scalar(DELETE_POSTS).bind(user_id).bind(self.limit());
        let count: i64 = within(query.fetch_one(&self.pool)).await?;
        Ok(count > 0)
    }

    /// Returns whether other jobs on the user's posts exist.
    pub async fn has_jobs(&self, user_id: &str) -> Result<bool, Error> {
        within(sqlx::query_scalar(HAS_JOBS).bind(user_id).fetch_one(&self.pool)).await
    }

    /// Deletes the next rows of a user's feed. Returns whether there were any.
    pub async fn empty_feed(&self, user_id: &str) -> Result<bool, Error> {
        let query = sqlx::query(EMPTY_FEED).bind(user_id).bind(self.limit());
        Ok(within(query.execute(&self.pool)).await?.rows_affected() > 0)
    }

    /// Ends the next follows by a user's followers. Returns whether there were any.
    pub async fn drop_followers(&self, user_id: &str) -> Result<bool, Error> {
        let query = sqlx::query(DROP_FOLLOWERS).bind(user_id).bind(self.limit());
        Ok(within(query.execute(&self.pool)).await?.rows_affected() > 0)
    }

    /// Ends an erasure if nothing of the account is left. Returns whether it ended.
    pub async fn forget_account(&self, user_id: &str) -> Result<bool, Error> {
        let query = sqlx::query_scalar::<_, String>(FORGET_ACCOUNT).bind(user_id);
        Ok(within(query.fetch_optional(&self.pool)).await?.is_some())
    }
}
