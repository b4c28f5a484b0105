//! `postrider feed`: a graph to try things with, and whether feeds are what they must be. Needs Postgres; `verify`
//! looks at Redis, too, where it answers.

use std::io::IsTerminal;

use clap::{Args, Subcommand};

use super::{block_on, text::Output};
use crate::{
    feed::{self, Plan, Report, Shape, Verifier, Whose},
    platform::{postgres, redis::Redis, telemetry::StatusLine},
    roles::Settings,
};

const VERIFY_EXAMPLES: &str = "\
What posts and follows say is compared with the rows of feeds, and those with the timelines in Redis. What is wrong is looked
at again two seconds later, since some of it may have been on its way. The exit code is 1 when something is wrong and was not repaired.

Examples:
  postrider feed verify --sample 1000
  postrider feed verify --user bob --repair
  postrider feed verify --all --output json";

#[derive(Subcommand)]
pub enum Command {
    /// Compare feeds with what they must be, and repair them
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify(Verify),
    /// Make users, follows and posts for trials and measurements
    Seed(Seed),
    /// Show how Postgres does the busiest statements; the exit code is 1 when one reads a large table from end to end
    Plans {
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
pub struct Verify {
    #[command(flatten)]
    whose: Chosen,
    /// Mend what is wrong
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Chosen {
    /// Only this user's feed
    #[arg(long)]
    user: Option<String>,
    /// So many feeds, chosen by chance
    #[arg(long)]
    sample: Option<u32>,
    /// Every feed
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
pub struct Seed {
    /// How many users
    #[arg(long, default_value_t = 10_000)]
    users: u32,
    /// Whom each of them follows, about
    #[arg(long, default_value_t = 20)]
    follows: u32,
    /// Posts, all together
    #[arg(long, default_value_t = 10_000)]
    posts: u32,
    /// How follows and posts are spread
    #[arg(long, value_enum, default_value_t = Shape::Zipf)]
    shape: Shape,
    /// What names of users begin with, before their number
    #[arg(long, default_value = "u")]
    prefix: String,
}

pub fn run(command: Command, settings: &Settings) -> Result<(), String> {
    block_on(async {
        match command {
            Command::Verify(verify) => self::verify(&verify, settings).await,
            Command::Seed(seed) => self::seed(seed, settings).await,
            Command::Plans { output } => plans(&output, settings).await,
        }
    })
}

async fn verify(command: &Verify, settings: &Settings) -> Result<(), String> {
    let pool = postgres::pool(&settings.postgres).map_err(|error| error.to_string())?;
    let redis = Redis::connect(&settings.redis).await;
    if let Err(error) = &redis {
        eprintln!("Redis does not answer, so only rows are compared: {error}");
    }
    let prefix = &settings.redis.key_prefix;
    let mut verifier = Verifier::new(pool, redis.ok(), prefix, command.repair);
    let whose = match &command.whose {
        Chosen { user: Some(user), .. } => Whose::User(user.clone()),
        Chosen { sample: Some(count), .. } => Whose::Sample(i64::from(*count)),
        Chosen { all: _, .. } => Whose::All,
    };
    let line = StatusLine::on_terminal();
    let report = verifier.run(&whose, |users| show(line.as_ref(), &format!("{users} feeds looked at"))).await?;
    drop(line);
    command.output.print(&report, |report| text(report, command.repair))?;
    if report.is_clean() || command.repair { Ok(()) } else { Err("feeds are not what they must be".to_owned()) }
}

fn text(report: &Report, repaired: bool) -> String {
    let Report { users, missing_rows, surplus_rows, wrong_timelines, examples } = report;
    let mut text = format!(
        "{users} feeds: {missing_rows} rows missing, {surplus_rows} rows too many, {wrong_timelines} timelines wrong{}\n",
        if repaired && !report.is_clean() { "; repaired" } else { "" }
    );
    if !examples.is_empty() {
        let examples: Vec<&str> = examples.iter().map(String::as_str).collect();
        text.push_str(&format!("of {}\n", super::text::tame(&examples.join(", "))));
    }
    text
}

async fn plans(output: &Output, settings: &Settings) -> Result<(), String> {
    let pool = postgres::pool(&settings.postgres).map_err(|error| error.to_string())?;
    let all = feed::explain_hot(&pool).await.map_err(|error| format!("Postgres: {error}"))?;
    output.print(&all, |all| all.iter().map(|one| format!("{}\n{}\n\n", one.statement, one.plan)).collect())?;
    let scans = |one: &feed::Explained| format!("{} ({})", one.statement, one.scanned.join(", "));
    let bad: Vec<String> = all.iter().filter(|one| !one.scanned.is_empty()).map(scans).collect();
    if bad.is_empty() { Ok(()) } else { Err(format!("these read a large table from end to end: {}", bad.join("; "))) }
}

async fn seed(command: Seed, settings: &Settings) -> Result<(), String> {
    let pool = postgres::pool(&settings.postgres).map_err(|error| error.to_string())?;
    let Seed { users, follows, posts, shape, prefix } = command;
    let plan = Plan { users: users.into(), follows: follows.into(), posts: posts.into(), shape, prefix };
    let line = StatusLine::on_terminal();
    let rows = feed::seed(&pool, &settings.feed, &plan, |what, done, total| {
        show(line.as_ref(), &bar(what, done, total));
    });
    let rows = rows.await.map_err(|error| format!("Postgres: {error}"))?;
    drop(line);
    println!("{users} users, {posts} posts, {rows} rows of feeds");
    Ok(())
}

fn show(line: Option<&StatusLine>, text: &str) {
    if let Some(line) = line
        && std::io::stderr().is_terminal()
    {
        line.set(text);
    }
}

/// How far something is, as a bar of forty places.
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
