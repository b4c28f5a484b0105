//! Generates users, follows and posts for trials and measurements, and writes them directly to the
//! tables.

use sqlx::PgPool;

use super::Config;

/// Distribution of follows and posts over users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// A few users have very many, most have few: the n-th user is followed about 1/n as often as
    /// the first.
    Zipf,
    /// All users have about the same number.
    Even,
}

/// Sizes and shape of the generated data.
#[derive(Debug, Clone)]
pub struct Plan {
    pub users: i64,
    /// Approximate number of users whom each user follows.
    pub follows: i64,
    /// Total number of posts.
    pub posts: i64,
    pub shape: Shape,
    /// Prefix of the user ids; a number follows.
    pub prefix: String,
}

/// Number of users, or posts, per statement.
const CHUNK: i64 = 2_000;

/// Picks the number of a random user; `$1` is the number of users.
macro_rules! random_user {
    () => {
        "CASE WHEN $2 THEN ceil(exp(random() * ln($1::bigint::float8)))::bigint ELSE ceil(random() * $1::bigint)::bigint END"
    };
}

const FOLLOWS: &str = concat!(
    "INSERT INTO follows (followee_id, follower_id)
     SELECT DISTINCT $3 || followee, $3 || follower FROM (
         SELECT follower, ",
    random_user!(),
    " AS followee FROM generate_series($4::bigint, $5::bigint) AS follower, generate_series(1, $6::bigint)
     ) AS pair WHERE followee <> follower AND followee BETWEEN 1 AND $1
     ORDER BY 1, 2 ON CONFLICT DO NOTHING"
);

const COUNT: &str = "
    INSERT INTO feed_authors (author_id, followers, state)
    SELECT followee_id, count(*), CASE WHEN count(*) >= $1 THEN 2 ELSE 0 END FROM follows GROUP BY followee_id
    ON CONFLICT (author_id) DO UPDATE SET followers = excluded.followers, state = excluded.state";

const POSTS: &str = concat!(
    "WITH stored AS (
         INSERT INTO posts (id, author_id, content)
         SELECT nextval('post_ids'), $3 || author, 'Post ' || number || ' of the seed, as long as posts usually are, which is not very long.'
         FROM (SELECT number, greatest(1, least($1, ",
    random_user!(),
    ")) AS author FROM generate_series($4::bigint, $5::bigint) AS number) AS spread
         RETURNING id, author_id
     ), fanned AS (
         INSERT INTO feed_rows (user_id, post_id)
         SELECT follows.follower_id, stored.id FROM stored
         JOIN feed_authors ON feed_authors.author_id = stored.author_id AND feed_authors.state <> 2
         JOIN follows ON follows.followee_id = stored.author_id
         RETURNING 1
     )
     SELECT count(*) FROM fanned"
);

/// Generates the data. After each chunk it calls `progress` with what is being generated, the
/// amount done, and the total. Returns the number of feed rows. Do not run it beside writers,
/// because it recomputes the counts of followers.
pub async fn seed(
    pool: &PgPool,
    config: &Config,
    plan: &Plan,
    progress: impl Fn(&'static str, i64, i64),
) -> Result<i64, sqlx::Error> {
    let zipf = plan.shape == Shape::Zipf;
    let chunks =
        |total: i64| (1..=total).step_by(CHUNK as usize).map(move |from| (from, (from + CHUNK - 1).min(total)));
    for (from, to) in chunks(plan.users) {
        let query = sqlx::query(FOLLOWS).bind(plan.users).bind(zipf).bind(&plan.prefix).bind(from).bind(to);
        query.bind(plan.follows).execute(pool).await?;
        progress("users", to, plan.users);
    }
    sqlx::query(COUNT).bind(config.celebrity_followers).execute(pool).await?;
    sqlx::raw_sql("ANALYZE follows; ANALYZE feed_authors").execute(pool).await?;
    let mut rows = 0;
    for (from, to) in chunks(plan.posts) {
        let query = sqlx::query_scalar(POSTS).bind(plan.users).bind(zipf).bind(&plan.prefix).bind(from).bind(to);
        rows += query.fetch_one(pool).await.map(|count: i64| count)?;
        progress("posts", to, plan.posts);
    }
    sqlx::raw_sql("ANALYZE posts; ANALYZE feed_rows; UPDATE feed_timelines SET epoch = epoch + 1")
        .execute(pool)
        .await?;
    Ok(rows)
}
