//! Applies events to feeds: one transaction for several consecutive events of a partition, which
//! also moves the partition's progress. Small changes are applied in the transaction; changes that
//! may be large become jobs.

use std::collections::{HashMap, HashSet};

use postrider_kafka::PartitionId;
use postrider_postgres::{
    query::{Error, within},
    transaction::Transaction,
};
use postrider_projection::Progress;
use postrider_telemetry::unknown::Unknown;
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    Config,
    event_id::Identity,
    record::{Change, Event},
};

/// Followers and state of an author.
#[derive(Debug, Clone, Copy, Default)]
pub struct Author {
    pub followers: i64,
    pub state: State,
}

/// The way in which an author's posts reach feeds. See `feed_authors` in
/// migrations/0011_feed.sql.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Ordinary,
    Rising,
    Celebrity,
    Falling,
}

impl State {
    pub fn read(state: i16) -> Result<Self, Unknown> {
        match state {
            0 => Ok(Self::Ordinary),
            1 => Ok(Self::Rising),
            2 => Ok(Self::Celebrity),
            3 => Ok(Self::Falling),
            other => Err(Unknown::new("state of an author", other)),
        }
    }
}

impl Author {
    /// Returns whether posts are inserted into followers' feeds.
    pub fn is_fanned_out(self) -> bool {
        self.state != State::Celebrity
    }

    /// Returns whether posts are merged at read.
    pub fn is_merged(self) -> bool {
        self.state != State::Ordinary
    }
}

/// Authors by id; an author who never had a follower is missing.
pub type Authors = HashMap<String, Author>;

/// Users, each with the posts that were inserted into the user's feed.
pub type Fanned = Vec<(String, Vec<i64>)>;

/// Result of applying a run.
#[derive(Debug)]
pub enum Applied {
    /// The run was applied. Lists the users with posts that are now in their feeds.
    Done {
        fanned: Fanned,
        /// True if jobs were added.
        jobs: bool,
    },
    /// The partition's progress differs from the expected offset: nothing was changed.
    Moved,
}

/// Handling of rows that exist already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// Existing rows are an error, see [`overlaps`]; the insert costs little more than half of one
    /// that allows them.
    None,
    /// Existing rows are kept.
    Some,
}

const MOVE: &str = "
    UPDATE projection_progress SET next = $4
    WHERE projection = 'feed' AND topic_epoch = $1 AND partition = $2 AND next = $3";

/// Duplicates of an event have its key and therefore its partition, so no other process inserts
/// them concurrently. A former version may have stored an event by its UUID.
const FRESH: &str = "
    INSERT INTO processed_events (event_id)
    SELECT event_id FROM unnest($1::text[]::uuid[], $2::text[]::uuid[]) AS incoming (event_id, former)
    WHERE NOT EXISTS (SELECT FROM processed_events WHERE processed_events.event_id = incoming.event_id)
      AND NOT EXISTS (SELECT FROM processed_events WHERE processed_events.event_id = incoming.former)
    RETURNING event_id::text";

/// Inserts in the order of users, so that rows of one index page are inserted together; newest
/// posts first, as a backfill inserts them.
macro_rules! fan_out {
    ($overlap:literal) => {
        concat!(
            "WITH post AS MATERIALIZED (
                SELECT id, author_id FROM posts WHERE id = ANY($1) AND deleted_at IS NULL
            ), fanned AS (
                INSERT INTO feed_rows (user_id, post_id)
                SELECT follows.follower_id, post.id FROM post JOIN follows ON follows.followee_id = post.author_id
                ORDER BY follows.follower_id, post.id DESC ",
            $overlap,
            " RETURNING user_id, post_id
            )
            SELECT user_id, array_agg(post_id) FROM fanned GROUP BY user_id"
        )
    };
}

pub(super) const FAN_OUT: &str = fan_out!("");
const FAN_OUT_ANYWAY: &str = fan_out!("ON CONFLICT DO NOTHING");

/// Selects the users whose feeds contain the posts.
const FANNED: &str = "
    SELECT follows.follower_id, array_agg(posts.id)
    FROM posts JOIN follows ON follows.followee_id = posts.author_id
    WHERE posts.id = ANY($1) AND posts.deleted_at IS NULL GROUP BY follows.follower_id";

const COUNT: &str = "
    INSERT INTO feed_authors AS known (author_id, followers)
    SELECT author_id, sum(change) FROM unnest($1::text[], $2::bigint[]) AS changes (author_id, change)
    GROUP BY author_id ORDER BY author_id COLLATE \"C\"
    ON CONFLICT (author_id) DO UPDATE SET followers = known.followers + excluded.followers";

/// Changes the state of authors who crossed the threshold in either direction, and adds the job for
/// each change.
const TURN: &str = "
    WITH turned AS (
        UPDATE feed_authors SET state = CASE state WHEN 0 THEN 1 ELSE 3 END
        WHERE author_id = ANY($1) AND ((state = 0 AND followers >= $2) OR (state = 2 AND followers < $3))
        RETURNING author_id, state
    )
    INSERT INTO feed_jobs (kind, author_id) SELECT CASE state WHEN 1 THEN 'rise' ELSE 'fall' END, author_id FROM turned";

const JOBS: &str = "
    INSERT INTO feed_jobs (kind, author_id, user_id, post_id)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[])";

/// Returns whether the insert failed because rows existed already.
pub fn overlaps(error: &Error) -> bool {
    error.breaks("feed_rows_pkey")
}

/// Applies events to feeds. Cheap to clone.
#[derive(Clone)]
pub struct FanOut {
    pool: PgPool,
    config: Config,
}

impl FanOut {
    pub fn new(pool: PgPool, config: Config) -> Self {
        Self { pool, config }
    }

    /// Returns the progress of the projection.
    pub fn progress(&self, epoch: u32) -> Progress {
        Progress::new(self.pool.clone(), "feed", epoch)
    }

    /// Returns followers and state of the authors of new posts.
    pub async fn authors<'a>(&self, events: impl Iterator<Item = &'a Event>) -> Result<Authors, Error> {
        let posted = events.filter(|event| matches!(event.change, Change::Created { .. }));
        let ids: HashSet<&str> = posted.map(|event| event.change.author()).collect();
        if ids.is_empty() {
            return Ok(Authors::new());
        }
        let query = sqlx::query_as("SELECT author_id, followers, state FROM feed_authors WHERE author_id = ANY($1)");
        let query = query.bind(ids.into_iter().collect::<Vec<_>>());
        let found: Vec<(String, i64, i16)> = within(query.fetch_all(&self.pool)).await?;
        let author = |(id, followers, state)| Ok((id, Author { followers, state: State::read(state)? }));
        found.into_iter().map(author).collect()
    }

    /// Estimates the number of rows that applying an event inserts.
    pub fn weight(&self, event: &Event, authors: &Authors) -> usize {
        let author = authors.get(event.change.author()).copied().unwrap_or_default();
        match event.change {
            Change::Created { .. } if self.is_inline(author) => usize::try_from(author.followers).unwrap_or(0) + 1,
            _ => 1,
        }
    }

    fn is_inline(&self, author: Author) -> bool {
        author.is_fanned_out() && author.followers <= self.config.inline_followers
    }

    /// Returns the posts among these events that are fanned out in the transaction.
    fn inline(&self, events: &[&Event], authors: &Authors) -> Vec<i64> {
        let of = |event: &&Event| match &event.change {
            Change::Created { post_id, author } => {
                self.is_inline(authors.get(author).copied().unwrap_or_default()).then_some(*post_id)
            }
            _ => None,
        };
        events.iter().filter_map(of).collect()
    }

    /// Applies a run of events and moves the progress from `expected` to `next`.
    pub async fn apply(
        &self,
        partition_id: PartitionId,
        (expected, next): (i64, i64),
        events: &[Event],
        authors: &Authors,
        overlap: Overlap,
    ) -> Result<Applied, Error> {
        let mut transaction = within(Transaction::begin(&self.pool)).await?;
        let moved = sqlx::query(MOVE)
            .bind(i64::from(partition_id.epoch))
            .bind(partition_id.partition)
            .bind(expected)
            .bind(next);
        if within(moved.execute(&mut *transaction)).await?.rows_affected() == 0 {
            within(transaction.rollback()).await?;
            return Ok(Applied::Moved);
        }
        let events = fresh(&mut transaction, events).await?;
        let posts = self.inline(&events, authors);
        let mut fanned = Vec::new();
        if !posts.is_empty() {
            let statement = if overlap == Overlap::None { FAN_OUT } else { FAN_OUT_ANYWAY };
            fanned = within(sqlx::query_as(statement).bind(&posts).fetch_all(&mut *transaction)).await?;
        }
        self.count(&mut transaction, &events).await?;
        let jobs = self.add_jobs(&mut transaction, &events, authors).await?;
        within(transaction.commit()).await?;
        if overlap == Overlap::Some {
            fanned = self.fanned_of(&posts).await?;
        }
        Ok(Applied::Done { fanned, jobs })
    }

    /// Returns the feeds that contain the posts which these events fanned out in their transaction
    /// when they were applied first.
    pub async fn fanned(&self, events: &[Event], authors: &Authors) -> Result<Fanned, Error> {
        let posts = self.inline(&events.iter().collect::<Vec<_>>(), authors);
        if posts.is_empty() { Ok(Vec::new()) } else { self.fanned_of(&posts).await }
    }

    /// Returns the posts among these that exist and are not deleted.
    pub async fn live(&self, posts: Vec<i64>) -> Result<Vec<i64>, Error> {
        if posts.is_empty() {
            return Ok(posts);
        }
        let query = "SELECT id FROM posts WHERE id = ANY($1) AND deleted_at IS NULL";
        within(sqlx::query_scalar(query).bind(posts).fetch_all(&self.pool)).await
    }

    async fn fanned_of(&self, posts: &[i64]) -> Result<Fanned, Error> {
        within(sqlx::query_as(FANNED).bind(posts).fetch_all(&self.pool)).await
    }

    /// Updates the counts of followers. Each event is a change: a repeated follow or
    /// unfollow has none.
    async fn count(&self, transaction: &mut Transaction, events: &[&Event]) -> Result<(), Error> {
        let change = |event: &&Event| match &event.change {
            Change::Followed { followee, .. } => Some((followee.clone(), 1_i64)),
            Change::Unfollowed { followee, .. } => Some((followee.clone(), -1)),
            _ => None,
        };
        let (authors, changes): (Vec<String>, Vec<i64>) = events.iter().filter_map(change).unzip();
        if authors.is_empty() {
            return Ok(());
        }
        within(sqlx::query(COUNT).bind(&authors).bind(changes).execute(&mut **transaction)).await?;
        turn(transaction, &self.config, &authors).await
    }

    async fn add_jobs(
        &self,
        transaction: &mut Transaction,
        events: &[&Event],
        authors: &Authors,
    ) -> Result<bool, Error> {
        let (mut kinds, mut of, mut users, mut posts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for event in events {
            let (kind, user, post) = match &event.change {
                Change::Created { post_id, author } => {
                    let author = authors.get(author).copied().unwrap_or_default();
                    if self.is_inline(author) || !author.is_fanned_out() {
                        continue;
                    }
                    ("fan_out", None, Some(*post_id))
                }
                Change::Deleted { post_id, .. } => ("purge", None, Some(*post_id)),
                Change::Followed { follower, .. } => ("backfill", Some(follower.as_str()), None),
                Change::Unfollowed { follower, .. } => ("unfollow", Some(follower.as_str()), None),
                Change::Erased { .. } => ("erase", None, None),
            };
            kinds.push(kind);
            of.push(event.change.author());
            users.push(user);
            posts.push(post);
        }
        if kinds.is_empty() {
            return Ok(false);
        }
        let insert = sqlx::query(JOBS).bind(kinds).bind(of).bind(users).bind(posts);
        within(insert.execute(&mut **transaction)).await.map(|_| true)
    }
}

/// Records events as processed and returns the first record of each event that was not recorded
/// before.
async fn fresh<'a>(transaction: &mut Transaction, events: &'a [Event]) -> Result<Vec<&'a Event>, Error> {
    let mut incoming: HashMap<Uuid, Option<Uuid>> = HashMap::with_capacity(events.len());
    for Identity { id, former } in events.iter().map(|event| event.identity) {
        let known = incoming.entry(id).or_default();
        *known = known.or(former);
    }
    let (ids, former): (Vec<_>, Vec<_>) =
        incoming.into_iter().map(|(id, former)| (id.to_string(), former.map(|id| id.to_string()))).unzip();
    let query = sqlx::query_scalar(FRESH).bind(ids).bind(former);
    let mut fresh: HashSet<String> = within(query.fetch_all(&mut **transaction)).await?.into_iter().collect();
    Ok(events.iter().filter(|event| fresh.remove(&event.identity.id.to_string())).collect())
}

/// Changes the state of the authors among these who have crossed the threshold.
pub async fn turn(transaction: &mut Transaction, config: &Config, authors: &[String]) -> Result<(), Error> {
    let query = sqlx::query(TURN).bind(authors).bind(config.celebrity_followers).bind(config.ordinary_below());
    within(query.execute(&mut **transaction)).await.map(|_| ())
}
