//! Writes of clients. Each kind of write is one statement, and therefore one transaction, that also
//! inserts the event into the outbox.
//!
//! Rows of posts and follows are stored or locked before their event is numbered, so that events of
//! one post, or of one pair of users, have the order of the changes.

use std::collections::{HashMap, HashSet};

use metrics::counter;
use postrider_postgres::query::{Error, within};
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    group::{Refusal, Writing},
    model,
};

/// Data that every write has.
#[derive(Debug, Clone)]
pub struct Meta {
    pub event_id: Uuid,
    /// True if the id comes from an idempotency key, so that it may repeat.
    pub keyed: bool,
    pub traceparent: String,
}

/// A post to store.
#[derive(Debug)]
pub struct NewPost {
    pub meta: Meta,
    pub author_id: String,
    pub content: String,
    /// The event's value before the post's id, and after it.
    pub head: String,
    pub tail: String,
}

/// Result of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<T> {
    Done(T),
    /// An account in the write is being erased; nothing was stored.
    Erased,
}

/// Stores rows in the order of their keys, so that groups wait for each other instead of
/// deadlocking. Leaves out rows whose idempotency key was used before.
const POSTS: &str = "
    WITH incoming AS (
        SELECT * FROM unnest($1::int[], $2::text[]::uuid[], $3::bool[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
             AS incoming (place, event_id, keyed, author_id, content, head, tail, traceparent)
    ), allowed AS MATERIALIZED (
        SELECT nextval('post_ids') AS id, incoming.* FROM incoming
        WHERE NOT EXISTS (SELECT FROM feed_erasures WHERE user_id = incoming.author_id COLLATE \"C\")
    ), noted AS (
        INSERT INTO feed_requests (event_id, post_id) SELECT event_id, id FROM allowed WHERE keyed ORDER BY event_id
        ON CONFLICT DO NOTHING RETURNING event_id
    ), fresh AS MATERIALIZED (
        SELECT * FROM allowed WHERE NOT keyed OR event_id IN (SELECT event_id FROM noted)
    ), stored AS (
        INSERT INTO posts (id, author_id, content) SELECT id, author_id, content FROM fresh
    ), queued AS (
        INSERT INTO outbox (topic, key, event_id, kind, source, traceparent, value)
        SELECT 'post-events', author_id, event_id, 'postrider.post.created', '/posts', traceparent, head || id || tail
        FROM fresh ORDER BY id
    )
    SELECT place, id FROM fresh";

const BEFORE: &str = "SELECT event_id::text, post_id FROM feed_requests WHERE event_id = ANY($1::text[]::uuid[])";

macro_rules! follows {
    ($kind:literal, $change:literal) => {
        concat!(
            "WITH incoming AS (
                SELECT * FROM unnest($1::int[], $2::text[]::uuid[], $3::bool[], $4::text[], $5::text[], $6::text[], $7::text[])
                     AS incoming (place, event_id, keyed, follower_id, followee_id, value, traceparent)
            ), refused AS MATERIALIZED (
                SELECT place FROM incoming WHERE EXISTS (
                    SELECT FROM feed_erasures WHERE user_id IN (incoming.follower_id COLLATE \"C\", incoming.followee_id COLLATE \"C\"))
            ), noted AS (
                INSERT INTO feed_requests (event_id)
                SELECT event_id FROM incoming WHERE keyed AND place NOT IN (SELECT place FROM refused) ORDER BY event_id
                ON CONFLICT DO NOTHING RETURNING event_id
            ), fresh AS MATERIALIZED (
                SELECT DISTINCT ON (followee_id COLLATE \"C\", follower_id COLLATE \"C\") * FROM incoming
                WHERE place NOT IN (SELECT place FROM refused)
                  AND (NOT keyed OR event_id IN (SELECT event_id FROM noted))
                ORDER BY followee_id COLLATE \"C\", follower_id COLLATE \"C\", place
            ), ",
            $change,
            ", queued AS (
                INSERT INTO outbox (topic, key, event_id, kind, source, traceparent, value)
                SELECT 'post-events', fresh.followee_id, event_id, '",
            $kind,
            "', '/follows', traceparent, value
                FROM changed JOIN fresh ON fresh.followee_id = changed.followee_id COLLATE \"C\"
                                       AND fresh.follower_id = changed.follower_id COLLATE \"C\"
            )
            SELECT place, false FROM refused UNION ALL
            SELECT fresh.place, true FROM changed JOIN fresh ON fresh.followee_id = changed.followee_id COLLATE \"C\"
                                                           AND fresh.follower_id = changed.follower_id COLLATE \"C\""
        )
    };
}

const FOLLOW: &str = follows!(
    "postrider.user.followed",
    "changed AS (
        INSERT INTO follows (followee_id, follower_id) SELECT followee_id, follower_id FROM fresh
        ORDER BY followee_id COLLATE \"C\", follower_id COLLATE \"C\"
        ON CONFLICT DO NOTHING RETURNING followee_id, follower_id
    )"
);

const UNFOLLOW: &str = follows!(
    "postrider.user.unfollowed",
    "locked AS MATERIALIZED (
        SELECT follows.followee_id, follows.follower_id FROM follows JOIN fresh
          ON follows.followee_id = fresh.followee_id AND follows.follower_id = fresh.follower_id
        ORDER BY 1, 2 FOR UPDATE OF follows
    ), changed AS (
        DELETE FROM follows USING locked
        WHERE follows.followee_id = locked.followee_id AND follows.follower_id = locked.follower_id
        RETURNING follows.followee_id, follows.follower_id
    )"
);

const DELETE_POST: &str = "
    WITH noted AS (
        INSERT INTO feed_requests (event_id, post_id) SELECT $2::text::uuid, $1 WHERE $3 ON CONFLICT DO NOTHING
    ), gone AS (
        UPDATE posts SET deleted_at = now(), content = '' WHERE id = $1 AND deleted_at IS NULL RETURNING author_id
    ), queued AS (
        INSERT INTO outbox (topic, key, event_id, kind, source, traceparent, value)
        SELECT 'post-events', author_id, $2::text::uuid, 'postrider.post.deleted', '/posts', $4,
               $5::text || to_json(author_id)::text || $6::text
        FROM gone
    )
    SELECT author_id FROM gone";

const ERASE: &str = "
    WITH marked AS (
        INSERT INTO feed_erasures (user_id) VALUES ($1) ON CONFLICT DO NOTHING RETURNING user_id
    )
    INSERT INTO outbox (topic, key, event_id, kind, source, traceparent, value)
    SELECT 'post-events', user_id, $2::text::uuid, 'postrider.user.erased', '/users', $3, $4 FROM marked";

/// Stores posts. The outcome is the id of the post.
pub struct Posts(pub PgPool);

impl Writing for Posts {
    type Item = NewPost;
    type Outcome = Outcome<i64>;

    async fn write(&self, posts: &[NewPost]) -> Result<Vec<Outcome<i64>>, Refusal> {
        let mut ids: Vec<Option<i64>> = vec![None; posts.len()];
        let firsts = first_of_each(posts.iter().map(|post| &post.meta));
        let of = |place: &usize| &posts[*place];
        let query = sqlx::query_as(POSTS)
            .bind(firsts.iter().map(|&place| place as i32).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).meta.event_id.to_string()).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).meta.keyed).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).author_id.as_str()).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).content.as_str()).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).head.as_str()).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).tail.as_str()).collect::<Vec<_>>())
            .bind(firsts.iter().map(|place| of(place).meta.traceparent.as_str()).collect::<Vec<_>>());
        let stored: Vec<(i32, i64)> = within(query.fetch_all(&self.0)).await.map_err(|error| Refusal::of(&error))?;
        counter!("postrider_feed_posts_stored_total").increment(stored.len() as u64);
        for (place, id) in stored {
            ids[place as usize] = Some(id);
        }
        let repeated = posts.iter().zip(&ids).filter(|(post, id)| id.is_none() && post.meta.keyed);
        let repeated: Vec<String> = repeated.map(|(post, _)| post.meta.event_id.to_string()).collect();
        let before = if repeated.is_empty() { HashMap::new() } else { self.before(&repeated).await? };
        let outcome = |(post, id): (&NewPost, Option<i64>)| {
            let id = id.or_else(|| before.get(&post.meta.event_id.to_string()).copied());
            id.map_or(Outcome::Erased, Outcome::Done)
        };
        Ok(posts.iter().zip(ids).map(outcome).collect())
    }
}

impl Posts {
    /// Returns the ids of the posts that these events created originally.
    async fn before(&self, event_ids: &[String]) -> Result<HashMap<String, i64>, Refusal> {
        let query = sqlx::query_as(BEFORE).bind(event_ids);
        let found: Vec<(String, Option<i64>)> =
            within(query.fetch_all(&self.0)).await.map_err(|error| Refusal::Unknown(error.to_string()))?;
        Ok(found.into_iter().filter_map(|(event_id, id)| Some((event_id, id?))).collect())
    }
}

/// A follow or an unfollow to store.
#[derive(Debug)]
pub struct Pair {
    pub meta: Meta,
    pub follower_id: String,
    pub followee_id: String,
    /// The value of the event.
    pub value: String,
}

/// Stores follows. Following again is not an error. The outcome is whether anything changed.
pub struct Follows(pub PgPool);

/// Ends follows. Ending a follow that does not exist is not an error. The outcome is whether
/// anything changed.
pub struct Unfollows(pub PgPool);

impl Writing for Follows {
    type Item = Pair;
    type Outcome = Outcome<bool>;

    async fn write(&self, pairs: &[Pair]) -> Result<Vec<Outcome<bool>>, Refusal> {
        change(&self.0, FOLLOW, pairs).await
    }
}

impl Writing for Unfollows {
    type Item = Pair;
    type Outcome = Outcome<bool>;

    async fn write(&self, pairs: &[Pair]) -> Result<Vec<Outcome<bool>>, Refusal> {
        change(&self.0, UNFOLLOW, pairs).await
    }
}

async fn change(pool: &PgPool, statement: &'static str, pairs: &[Pair]) -> Result<Vec<Outcome<bool>>, Refusal> {
    let firsts = first_of_each(pairs.iter().map(|pair| &pair.meta));
    let of = |place: &usize| &pairs[*place];
    let query = sqlx::query_as(statement)
        .bind(firsts.iter().map(|&place| place as i32).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).meta.event_id.to_string()).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).meta.keyed).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).follower_id.as_str()).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).followee_id.as_str()).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).value.as_str()).collect::<Vec<_>>())
        .bind(firsts.iter().map(|place| of(place).meta.traceparent.as_str()).collect::<Vec<_>>());
    let changes: Vec<(i32, bool)> = within(query.fetch_all(pool)).await.map_err(|error| Refusal::of(&error))?;
    let mut outcomes: Vec<Outcome<bool>> = vec![Outcome::Done(false); pairs.len()];
    for (place, changed) in changes {
        outcomes[place as usize] = if changed { Outcome::Done(true) } else { Outcome::Erased };
    }
    Ok(outcomes)
}

/// Returns the indexes of the items, without those whose idempotency key occurs earlier in the same
/// group.
fn first_of_each<'a>(metas: impl Iterator<Item = &'a Meta>) -> Vec<usize> {
    let mut seen = HashSet::new();
    metas.enumerate().filter(|(_, meta)| !meta.keyed || seen.insert(meta.event_id)).map(|(place, _)| place).collect()
}

/// Marks a post as deleted and returns its author; `None` if the post does not exist or was deleted
/// before.
pub async fn delete_post(pool: &PgPool, meta: &Meta, post_id: i64) -> Result<Option<String>, Error> {
    let (head, tail) = model::deleted(meta.event_id, post_id);
    let query = sqlx::query_scalar(DELETE_POST).bind(post_id).bind(meta.event_id.to_string());
    within(query.bind(meta.keyed).bind(&meta.traceparent).bind(head).bind(tail).fetch_optional(pool)).await
}

/// Returns whether a deletion with this idempotency key was answered before.
pub async fn was_deleted(pool: &PgPool, meta: &Meta, post_id: i64) -> Result<bool, Error> {
    if !meta.keyed {
        return Ok(false);
    }
    let query = sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM feed_requests WHERE event_id = $1::text::uuid AND post_id = $2)
            AND EXISTS (SELECT FROM posts WHERE id = $2 AND deleted_at IS NULL) IS FALSE",
    );
    within(query.bind(meta.event_id.to_string()).bind(post_id).fetch_one(pool)).await
}

/// Starts the erasure of an account.
pub async fn erase(pool: &PgPool, meta: &Meta, user_id: &str, value: &str) -> Result<(), Error> {
    let query = sqlx::query(ERASE).bind(user_id).bind(meta.event_id.to_string()).bind(&meta.traceparent).bind(value);
    within(query.execute(pool)).await.map(|_| ())
}
