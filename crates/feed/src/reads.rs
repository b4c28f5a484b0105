//! Reads of posts, follows and feeds in Postgres.

use postrider_postgres::query::{Error, within};
use sqlx::PgPool;

/// A stored post.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Post {
    pub id: i64,
    pub author_id: String,
    pub content: String,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
}

/// The content of a timeline.
#[derive(Debug, Clone)]
pub struct Head {
    /// Post ids, newest first.
    pub ids: Vec<i64>,
    /// Authors whose posts belong to the feed but are not in `ids`.
    pub merged: Vec<String>,
    /// No id below this one belongs to the feed.
    pub end: i64,
}

impl Head {
    /// Returns the lowest id from which `ids` is complete, given that `asked` ids were requested,
    /// and whether nothing below it belongs to the feed.
    pub fn floor(&self, asked: usize) -> (i64, bool) {
        if self.ids.len() < asked { (self.end, true) } else { (self.ids.last().copied().unwrap_or(0), false) }
    }
}

/// Selects the rows of a feed. The condition is deliberately not a join: Postgres checks the newest
/// rows one by one until there are enough, whatever selectivity the planner estimates.
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

/// Selects the rows of a feed.
pub(super) const OWN_ROWS: &str = own_rows!();

/// Selects the authors whose posts are merged into a feed.
pub(super) const MERGED: &str = merged!();

/// Selects the visible posts of a feed below an id.
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

/// Selects an author's posts below an id.
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

/// Direction of a user's follows.
#[derive(Debug, Clone, Copy)]
pub enum Side {
    Followers,
    Following,
}

/// Reads posts, follows and feeds. Cheap to clone.
#[derive(Clone)]
pub struct Reads {
    pool: PgPool,
}

impl Reads {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Returns the newest ids of a feed below `before`.
    pub async fn page(&self, user_id: &str, before: i64, limit: usize) -> Result<Vec<i64>, Error> {
        self.ids(PAGE, user_id, before, limit).await
    }

    /// Returns the newest rows of a feed, and the authors whose posts are merged into it.
    pub async fn head(&self, user_id: &str, limit: usize) -> Result<Head, Error> {
        // The merged authors are read first: the rows still have the posts of an author who becomes
        // merged afterwards.
        let merged = within(sqlx::query_scalar(MERGED).bind(user_id).fetch_all(&self.pool)).await?;
        let end = sqlx::query_scalar("SELECT floor FROM feed_floors WHERE user_id = $1").bind(user_id);
        let end = within(end.fetch_optional(&self.pool)).await?.unwrap_or(0);
        let ids = self.ids(OWN_ROWS, user_id, i64::MAX, limit).await?;
        Ok(Head { ids, merged, end })
    }

    /// Returns the ids of an author's newest posts.
    pub async fn of_author(&self, author_id: &str, limit: usize) -> Result<Vec<i64>, Error> {
        self.ids(OF_AUTHOR, author_id, i64::MAX, limit).await
    }

    async fn ids(&self, query: &'static str, id: &str, before: i64, limit: usize) -> Result<Vec<i64>, Error> {
        let query = sqlx::query_scalar(query).bind(id).bind(before).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        within(query.fetch_all(&self.pool)).await
    }

    /// Returns the posts that exist among these, in no order.
    pub async fn posts(&self, ids: &[i64]) -> Result<Vec<Post>, Error> {
        within(sqlx::query_as(POSTS).bind(ids).fetch_all(&self.pool)).await
    }

    /// Returns users on one side of a user's follows, ordered by id, after the user `after`.
    pub async fn users(&self, side: Side, user_id: &str, after: &str, limit: usize) -> Result<Vec<String>, Error> {
        let query = match side {
            Side::Followers => FOLLOWERS,
            Side::Following => FOLLOWING,
        };
        let query = sqlx::query_scalar(query).bind(user_id).bind(after);
        within(query.bind(i64::try_from(limit).unwrap_or(i64::MAX)).fetch_all(&self.pool)).await
    }

    /// Returns the ids of a deleted user's newest posts, even while the account is being erased.
    pub async fn newest_of_erased(&self, author_id: &str, limit: usize) -> Result<Vec<i64>, Error> {
        let query = "SELECT id FROM posts WHERE author_id = $1 ORDER BY id DESC LIMIT $2";
        let query = sqlx::query_scalar(query).bind(author_id).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        within(query.fetch_all(&self.pool)).await
    }
}
