//! Compares feeds with the posts and follows that determine them, and repairs them.

use std::{collections::BTreeSet, time::Duration};

use postrider_postgres::query::{self, within};
use postrider_redis::Redis;
use redis::RedisError;
use sqlx::PgPool;

use super::{
    reads::Reads,
    timeline::{Keys, Mark, Owner, ids, mark, members, number},
};

/// Number of users compared together.
const CHUNK: usize = 200;
/// Time after which a difference is checked again: changes in transit arrive within it, so only a
/// difference that remains counts.
const PATIENCE: Duration = Duration::from_secs(2);

/// The users whose feeds are compared.
#[derive(Debug, Clone)]
pub enum Whose {
    User(String),
    /// This number of users, chosen at random.
    Sample(i64),
    All,
}

/// The differences that were found.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct Report {
    pub users: u64,
    /// Rows that a feed lacks.
    pub missing_rows: u64,
    /// Rows that a feed has but should not have.
    pub surplus_rows: u64,
    /// Timelines in Redis that differ from Postgres.
    pub wrong_timelines: u64,
    /// Some of the users with differences.
    pub examples: BTreeSet<String>,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.missing_rows + self.surplus_rows + self.wrong_timelines == 0
    }
}

/// Reason why feeds could not be compared or repaired.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
    #[error(transparent)]
    Query(#[from] query::Error),
    #[error(transparent)]
    Redis(#[from] RedisError),
}

const USERS: &str = "
    SELECT user_id FROM (SELECT follower_id AS user_id FROM follows WHERE follower_id > $1
                         UNION SELECT user_id FROM feed_rows WHERE user_id > $1) AS known
    ORDER BY user_id LIMIT $2";

/// Counts the users whom `USERS` lists.
const COUNT: &str = "
    SELECT count(*) FROM (SELECT follower_id AS user_id FROM follows
                          UNION SELECT user_id FROM feed_rows) AS known";

const SAMPLE: &str = "
    SELECT follower_id FROM (SELECT DISTINCT follower_id FROM follows) AS known ORDER BY random() LIMIT $1";

/// Selects missing rows. Authors who are merged at read need no rows, and existing ones are
/// harmless. Rows below a feed's floor are not required.
const MISSING: &str = "
    SELECT follows.follower_id, posts.id FROM follows
    JOIN posts ON posts.author_id = follows.followee_id AND posts.deleted_at IS NULL
    LEFT JOIN feed_authors ON feed_authors.author_id = follows.followee_id
    LEFT JOIN feed_floors ON feed_floors.user_id = follows.follower_id
    WHERE posts.id >= coalesce(feed_floors.floor, 0) AND follows.follower_id = ANY($1) AND coalesce(feed_authors.state, 0) = 0
      AND NOT EXISTS (SELECT FROM feed_rows WHERE user_id = follows.follower_id AND post_id = posts.id)";

/// Selects surplus rows. Rows below a feed's floor are ignored, because they are about to be
/// trimmed.
const SURPLUS: &str = "
    SELECT feed_rows.user_id, feed_rows.post_id FROM feed_rows
    LEFT JOIN feed_floors ON feed_floors.user_id = feed_rows.user_id
    LEFT JOIN posts ON posts.id = feed_rows.post_id AND posts.deleted_at IS NULL
    WHERE feed_rows.user_id = ANY($1) AND feed_rows.post_id >= coalesce(feed_floors.floor, 0)
      AND NOT EXISTS (SELECT FROM follows WHERE followee_id = posts.author_id AND follower_id = feed_rows.user_id)";

const FILL: &str = "
    INSERT INTO feed_rows (user_id, post_id) SELECT * FROM unnest($1::text[], $2::bigint[]) ON CONFLICT DO NOTHING";

const DROP: &str = "
    DELETE FROM feed_rows USING unnest($1::text[], $2::bigint[]) AS surplus (user_id, post_id)
    WHERE feed_rows.user_id = surplus.user_id AND feed_rows.post_id = surplus.post_id";

/// Compares feeds, and repairs them if asked to.
pub struct Verifier {
    pool: PgPool,
    reads: Reads,
    redis: Option<Redis>,
    keys: Keys,
    repair: bool,
}

impl Verifier {
    /// Creates a verifier. Without Redis it compares only rows.
    pub fn new(pool: PgPool, redis: Option<Redis>, key_prefix: &str, repair: bool) -> Self {
        Self { reads: Reads::new(pool.clone()), pool, redis, keys: Keys::new(key_prefix), repair }
    }

    /// Compares feeds in chunks. After each chunk, passes the number of users compared so far and
    /// the total to `progress`.
    pub async fn run(&mut self, whose: &Whose, progress: impl Fn(i64, i64)) -> Result<Report, VerifyError> {
        let mut report = Report::default();
        let total = match whose {
            Whose::User(_) => 1,
            Whose::Sample(count) => *count,
            Whose::All => sqlx::query_scalar(COUNT).fetch_one(&self.pool).await?,
        };
        let mut after = String::new();
        loop {
            let users = match whose {
                Whose::User(user) => vec![user.clone()],
                Whose::Sample(count) => self.list(sqlx::query_scalar(SAMPLE).bind(*count)).await?,
                Whose::All => self.list(sqlx::query_scalar(USERS).bind(after.clone()).bind(CHUNK as i64)).await?,
            };
            for chunk in users.chunks(CHUNK) {
                self.compare(chunk, &mut report).await?;
                progress(report.users as i64, total);
            }
            match users.last() {
                Some(last) if matches!(whose, Whose::All) => after.clone_from(last),
                _ => return Ok(report),
            }
        }
    }

    async fn list(
        &self,
        query: sqlx::query::QueryScalar<'_, sqlx::Postgres, String, sqlx::postgres::PgArguments>,
    ) -> Result<Vec<String>, sqlx::Error> {
        query.fetch_all(&self.pool).await
    }

    async fn compare(&mut self, users: &[String], report: &mut Report) -> Result<(), VerifyError> {
        report.users += users.len() as u64;
        let (mut missing, mut surplus) = self.rows(users).await?;
        let mut wrong = self.timelines(users).await?;
        if !(missing.is_empty() && surplus.is_empty() && wrong.is_empty()) {
            tokio::time::sleep(PATIENCE).await;
            let (missing_still, surplus_still) = self.rows(users).await?;
            let wrong_still = self.timelines(users).await?;
            missing.retain(|row| missing_still.contains(row));
            surplus.retain(|row| surplus_still.contains(row));
            wrong.retain(|user| wrong_still.contains(user));
        }
        report.missing_rows += missing.len() as u64;
        report.surplus_rows += surplus.len() as u64;
        report.wrong_timelines += wrong.len() as u64;
        let concerned = missing.iter().chain(&surplus).map(|(user, _)| user).chain(&wrong);
        let limit = 20_usize.saturating_sub(report.examples.len());
        report.examples.extend(concerned.take(limit).cloned());
        if self.repair {
            self.repair_feeds(missing, surplus, wrong).await?;
        }
        Ok(())
    }

    async fn rows(&self, users: &[String]) -> Result<(BTreeSet<(String, i64)>, BTreeSet<(String, i64)>), sqlx::Error> {
        let query_rows = async |statement: &'static str| -> Result<BTreeSet<(String, i64)>, sqlx::Error> {
            let rows: Vec<(String, i64)> = sqlx::query_as(statement).bind(users).fetch_all(&self.pool).await?;
            Ok(rows.into_iter().collect())
        };
        Ok((query_rows(MISSING).await?, query_rows(SURPLUS).await?))
    }

    /// Returns the users whose timeline differs from Postgres.
    async fn timelines(&mut self, users: &[String]) -> Result<BTreeSet<String>, VerifyError> {
        let Some(redis) = &mut self.redis else { return Ok(BTreeSet::new()) };
        let epoch = redis.ask(vec![redis::cmd("GET").arg(self.keys.epoch()).to_owned()]).await;
        let epoch = epoch.into_iter().next().and_then(Result::ok).as_ref().and_then(number);
        let Some(epoch) = epoch else { return Ok(BTreeSet::new()) };
        let key = |user: &String| self.keys.timeline(epoch, &Owner::User(user.clone()));
        let range = |user| redis::cmd("ZREVRANGE").arg(key(user)).arg(0).arg(-1).to_owned();
        let answers = redis.ask(users.iter().map(range).collect()).await;
        let mut wrong = BTreeSet::new();
        for (user, answer) in users.iter().zip(answers) {
            let found = members(answer?);
            let Ok(Some(Mark::Ready { floor, .. })) = mark(&found) else { continue };
            let above = |ids: Vec<i64>| ids.into_iter().filter(|&id| id >= floor).collect::<Vec<_>>();
            let cached = above(ids(&found[1..]));
            // Reads one row more, to detect whether the timeline lacks something at its end.
            let head = self.reads.head(user, cached.len() + 1).await?;
            if above(head.ids) != cached {
                wrong.insert(user.clone());
            }
        }
        Ok(wrong)
    }

    async fn repair_feeds(
        &mut self,
        missing: BTreeSet<(String, i64)>,
        surplus: BTreeSet<(String, i64)>,
        mut wrong: BTreeSet<String>,
    ) -> Result<(), VerifyError> {
        wrong.extend(missing.iter().chain(&surplus).map(|(user, _)| user.clone()));
        for (statement, rows) in [(FILL, missing), (DROP, surplus)] {
            let (users, posts): (Vec<String>, Vec<i64>) = rows.into_iter().unzip();
            if !users.is_empty() {
                within(sqlx::query(statement).bind(users).bind(posts).execute(&self.pool)).await?;
            }
        }
        let Some(redis) = &mut self.redis else { return Ok(()) };
        let epoch = redis.ask(vec![redis::cmd("GET").arg(self.keys.epoch()).to_owned()]).await;
        let epoch = epoch.into_iter().next().and_then(Result::ok).as_ref().and_then(number).unwrap_or(0);
        let key = |user: String| self.keys.timeline(epoch, &Owner::User(user));
        let drops = wrong.into_iter().map(|user| redis::cmd("DEL").arg(key(user)).to_owned()).collect();
        redis.ask(drops).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }
}
