//! What is read of posts, follows and feeds in Postgres.

use sqlx::PgPool;

use crate::platform::query::{Error, within};

/// A post as it is read.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Post {
    pub id: i64,
    pub author_id: String,
    pub content: String,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
}

/// What a timeline is made of.
#[derive(Debug, Clone)]
pub struct Head {
    /// Newest first.
    pub ids: Vec<i64>,
    /// Authors whose posts belong to it and are not in it.
    pub merged: Vec<String>,
    /// Below it nothing belongs to the feed any more.
    pub end: i64,
}

impl Head {
    /// From which id on it has everything, when so many were asked for, and whether nothing below that belongs to it.
    pub fn floor(&self, asked: usize) -> (i64, bool) {
        if self.ids.len() < asked { (self.end, true) } else { (self.ids.last().copied().unwrap_or(0), false) }
    }
}

/// The condition is no join on purpose: the newest rows are looked at one by one until there are enough, whatever the
/// planner thinks of how many will pass.
macro_rules! own_rows {
    () => {
        "SELECT post_id AS id FROM feed_rows
         WHERE user_id = $1 AND post_id < $2
           AND post_id >= coalesce((SELECT floor FROM feed_floors WHERE feed_floors.user_id = $1), 0) AND (
             SELECT posts.deleted_at IS NULL
                AND EXISTS (SELECT FROM follows WHERE followee_id = posts.author_id AND follower_id = $1)
                AND NOT EXISTS (SELECT FROM feed_erasures WHERE feed_erasures.user_id IN (posts.author_id, $1))
             FROM posts WHERE posts.id = feed_rows.post_id
         )
         ORDER BY post_id DESC LIMIT $3"
    };
}

macro_rules! merged {
    () => {
        "SELECT feed_authors.author_id FROM feed_authors
         JOIN follows ON follows.followee_id = feed_authors.author_id AND follows.follower_id = $1
         WHERE feed_authors.state <> 0
           AND NOT EXISTS (SELECT FROM feed_erasures WHERE user_id IN (feed_authors.author_id, $1))"
    };
}

/// What stands in a feed.
pub(super) const OWN_ROWS: &str = own_rows!();

/// Whose posts are merged into it.
pub(super) const MERGED: &str = merged!();

/// The feed as it is to be seen, below an id.
pub(super) const PAGE: &str = concat!(
    "WITH merged AS MATERIALIZED (",
    merged!(),
    ") SELECT id FROM ((",
    own_rows!(),
    ") UNION (
        SELECT newest.id FROM merged CROSS JOIN LATERAL (
            SELECT id FROM posts WHERE posts.author_id = merged.author_id AND posts.deleted_at IS NULL AND posts.id < $2
              AND posts.id >= coalesce((SELECT floor FROM feed_floors WHERE feed_floors.user_id = $1), 0)
            ORDER BY posts.id DESC LIMIT $3
        ) AS newest
    )) AS found ORDER BY id DESC LIMIT $3"
);

/// An author's posts, below an id.
pub(super) const OF_AUTHOR: &str = "
    SELECT id FROM posts
    WHERE author_id = $1 AND id < $2 AND deleted_at IS NULL
      AND NOT EXISTS (SELECT FROM feed_erasures WHERE user_id = $1)
    ORDER BY id DESC LIMIT $3";

const POSTS: &str = "
    SELECT id, author_id, content, (extract(epoch FROM created_at) * 1000)::bigint AS created_ms FROM posts
    WHERE id = ANY($1) AND deleted_at IS NULL
      AND NOT EXISTS (SELECT FROM feed_erasures WHERE user_id = posts.author_id)";

const FOLLOWERS: &str = "
    SELECT follower_id FROM follows WHERE followee_id = $1 AND follower_id > $2
      AND NOT EXISTS (SELECT FROM feed_erasures WHERE user_id IN ($1, follower_id))
    ORDER BY follower_id LIMIT $3";

const FOLLOWING: &str = "
    SELECT followee_id FROM follows WHERE follower_id = $1 AND followee_id > $2
      AND NOT EXISTS (SELECT FROM feed_erasures WHERE user_id IN ($1, followee_id))
    ORDER BY followee_id LIMIT $3";

/// Which side of a user's follows.
#[derive(Debug, Clone, Copy)]
pub enum Side {
    Followers,
    Following,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Reads {
    pool: PgPool,
}

impl Reads {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// The newest ids of a feed below `before`.
    pub async fn page(&self, user_id: &str, before: i64, limit: usize) -> Result<Vec<i64>, Error> {
        self.ids(PAGE, user_id, before, limit).await
    }

    /// The newest rows of a feed, and whose posts are merged into it.
    pub async fn head(&self, user_id: &str, limit: usize) -> Result<Head, Error> {
        // Whom to merge first: who is merged from now on is still in the rows.
        let merged = within(sqlx::query_scalar(MERGED).bind(user_id).fetch_all(&self.pool)).await?;
        let end = sqlx::query_scalar("SELECT floor FROM feed_floors WHERE user_id = $1").bind(user_id);
        let end = within(end.fetch_optional(&self.pool)).await?.unwrap_or(0);
        let ids = self.ids(OWN_ROWS, user_id, i64::MAX, limit).await?;
        Ok(Head { ids, merged, end })
    }

    /// An author's newest posts.
    pub async fn of_author(&self, author_id: &str, limit: usize) -> Result<Vec<i64>, Error> {
        self.ids(OF_AUTHOR, author_id, i64::MAX, limit).await
    }

    async fn ids(&self, query: &'static str, whose: &str, before: i64, limit: usize) -> Result<Vec<i64>, Error> {
        let query = sqlx::query_scalar(query).bind(whose).bind(before).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        within(query.fetch_all(&self.pool)).await
    }

    /// Those of these posts that are there, in no order.
    pub async fn posts(&self, ids: &[i64]) -> Result<Vec<Post>, Error> {
        within(sqlx::query_as(POSTS).bind(ids).fetch_all(&self.pool)).await
    }

    /// Users on one side of a user's follows, by their ids, after one of them.
    pub async fn users(&self, side: Side, user_id: &str, after: &str, limit: usize) -> Result<Vec<String>, Error> {
        let query = match side {
            Side::Followers => FOLLOWERS,
            Side::Following => FOLLOWING,
        };
        let query = sqlx::query_scalar(query).bind(user_id).bind(after);
        within(query.bind(i64::try_from(limit).unwrap_or(i64::MAX)).fetch_all(&self.pool)).await
    }

    /// A deleted user's newest posts, also while the account is being erased.
    pub async fn newest_of_erased(&self, author_id: &str, limit: usize) -> Result<Vec<i64>, Error> {
        let query = "SELECT id FROM posts WHERE author_id = $1 ORDER BY id DESC LIMIT $2";
        let query = sqlx::query_scalar(query).bind(author_id).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        within(query.fetch_all(&self.pool)).await
    }
}
