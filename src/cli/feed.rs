//! Implements `postrider feed`: verifies and repairs feeds, generates test data and shows query
//! plans. Needs Postgres; `verify` also compares timelines in Redis if Redis answers.

use clap::{Args, Subcommand};
use postrider_feed::{self as feed, Plan, Report, Shape, Verifier, Whose};
use postrider_postgres as postgres;
use postrider_redis::Redis;

use super::{
    block_on, number,
    progress::Progress,
    text::{self, Output, note, tame},
};
use crate::roles::Settings;

const VERIFY_EXAMPLES: &str = "\
Compares the stored rows of feeds with posts and follows, and the timelines in Redis with the rows. Checks every difference again two seconds later, because a change may have been in progress. The exit code is 1 if differences remain that were not repaired.

Examples:
  postrider feed verify --sample 1000        1000 random feeds
  postrider feed verify --user bob --repair  verify and repair one feed
  postrider feed verify --all --output json  every feed, as JSON";

const SEED_EXAMPLES: &str = "\
Examples:
  postrider feed seed                              10,000 users and posts
  postrider feed seed --users 100 --posts 1000     a small graph
  postrider feed seed --shape even --prefix test-  users test-0, test-1, …";

#[derive(Subcommand)]
pub enum Command {
    /// Compare feeds with posts and follows, and repair them
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify(Verify),
    /// Generate users, follows and posts for tests and benchmarks
    #[command(after_help = SEED_EXAMPLES)]
    Seed(Seed),
    /// Show the query plans of the busiest statements; exit code 1 if one scans a large table
    Plans {
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
pub struct Verify {
    #[command(flatten)]
    whose: Chosen,
    /// Repair the differences
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Chosen {
    /// Verify only this user's feed
    #[arg(long)]
    user: Option<String>,
    /// Verify this many random feeds
    #[arg(long, value_parser = number::natural::<u32>)]
    sample: Option<u32>,
    /// Verify every feed
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
pub struct Seed {
    /// Number of users
    #[arg(long, default_value_t = 10_000, value_parser = number::natural::<u32>)]
    users: u32,
    /// Average number of users that each user follows
    #[arg(long, default_value_t = 20, value_parser = number::natural::<u32>)]
    follows: u32,
    /// Number of posts in total
    #[arg(long, default_value_t = 10_000, value_parser = number::natural::<u32>)]
    posts: u32,
    /// Distribution of follows and posts over users
    #[arg(long, value_enum, default_value_t = Shape::Zipf)]
    shape: Shape,
    /// Prefix of user names; a number follows it
    #[arg(long, default_value = "u")]
    prefix: String,
}

/// The reason why a command about feeds failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error("{0}")]
    Verify(#[source] feed::VerifyError),
    #[error("feeds have differences; run again with --repair")]
    Differences,
    #[error("these statements scan a large table: {}", .0.join("; "))]
    Scans(Vec<String>),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Runs the command.
pub fn run(command: Command, settings: &Settings) -> Result<(), super::Error> {
    block_on(async {
        match command {
            Command::Verify(verify) => self::verify(&verify, settings).await,
            Command::Seed(seed) => self::seed(seed, settings).await,
            Command::Plans { output } => plans(&output, settings).await,
        }
    })
}

async fn verify(command: &Verify, settings: &Settings) -> Result<(), Error> {
    let pool = postgres::pool(&settings.postgres)?;
    let redis = Redis::connect(&settings.redis).await;
    if let Err(error) = &redis {
        note(&format!("redis does not answer, comparing rows only: {error}"));
    }
    let prefix = &settings.redis.key_prefix;
    let mut verifier = Verifier::new(pool, redis.ok(), prefix, command.repair);
    let whose = match &command.whose {
        Chosen { user: Some(user), .. } => Whose::User(user.clone()),
        Chosen { sample: Some(count), .. } => Whose::Sample(i64::from(*count)),
        Chosen { all: _, .. } => Whose::All,
    };
    let progress = Progress::new();
    progress.show("counting feeds");
    let verified = |users, total| progress.show(&bar("feeds", users, total));
    let report = verifier.run(&whose, verified).await.map_err(Error::Verify)?;
    drop(progress);
    command.output.print(&report, |report| text(report, command.repair))?;
    if report.is_clean() || command.repair { Ok(()) } else { Err(Error::Differences) }
}

fn text(report: &Report, repaired: bool) -> String {
    let Report { users, missing_rows, surplus_rows, wrong_timelines, examples } = report;
    let mut text = format!(
        "{users} feeds: {missing_rows} missing and {surplus_rows} surplus rows, {wrong_timelines} wrong timelines{}\n",
        if repaired && !report.is_clean() { "; repaired" } else { "" }
    );
    if !examples.is_empty() {
        let examples: Vec<&str> = examples.iter().map(String::as_str).collect();
        text.push_str(&format!("affected users include {}\n", tame(&examples.join(", "))));
    }
    text
}

async fn plans(output: &Output, settings: &Settings) -> Result<(), Error> {
    let pool = postgres::pool(&settings.postgres)?;
    let all = feed::explain_hot(&pool).await.map_err(postgres::Error::Database)?;
    output.print(&all, |all| all.iter().map(|one| format!("{}\n{}\n\n", one.statement, one.plan)).collect())?;
    let scans = |one: &feed::Explained| format!("{} ({})", one.statement, one.scanned.join(", "));
    let bad: Vec<String> = all.iter().filter(|one| !one.scanned.is_empty()).map(scans).collect();
    if bad.is_empty() { Ok(()) } else { Err(Error::Scans(bad)) }
}

async fn seed(command: Seed, settings: &Settings) -> Result<(), Error> {
    let pool = postgres::pool(&settings.postgres)?;
    let Seed { users, follows, posts, shape, prefix } = command;
    let plan = Plan { users: users.into(), follows: follows.into(), posts: posts.into(), shape, prefix };
    let progress = Progress::new();
    let shown = |what: &str, done, total| progress.show(&bar(what, done, total));
    let rows = feed::seed(&pool, &settings.feed, &plan, shown).await.map_err(postgres::Error::Database)?;
    drop(progress);
    text::print(&format!("created {users} users, {posts} posts, {rows} feed rows\n"))?;
    Ok(())
}

/// Renders progress as a bar of 40 characters.
fn bar(what: &str, done: i64, total: i64) -> String {
    let filled = usize::try_from(40 * done / total.max(1)).unwrap_or(0).min(40);
    format!("{what:6} [{}{}] {done} of {total}", "#".repeat(filled), " ".repeat(40 - filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fills_up() {
        assert_eq!(bar("posts", 0, 10), format!("posts  [{}] 0 of 10", " ".repeat(40)));
        assert_eq!(bar("posts", 5, 10), format!("posts  [{}{}] 5 of 10", "#".repeat(20), " ".repeat(20)));
        assert!(bar("posts", 10, 10).contains(&"#".repeat(40)));
    }
}
