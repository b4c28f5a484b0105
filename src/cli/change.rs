//! What commands that change things have in common.

use clap::Args;

use super::text::Output;

#[derive(Args)]
pub struct Change {
    /// Change nothing, and say what would be
    #[arg(long)]
    pub dry_run: bool,
    /// Yes, all of them; needed where nothing chooses
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pub output: Output,
}

impl Change {
    /// Refuses to change everything, as it `would` where nothing is `chosen`, unless that is meant.
    pub fn confirm(&self, chosen: bool, would: &str) -> Result<(), String> {
        if chosen || self.yes || self.dry_run {
            return Ok(());
        }
        Err(format!("this would {would}, look first with --dry-run, or say --yes"))
    }
}
