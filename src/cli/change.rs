//! Flags shared by the commands that change data.

use clap::Args;

use super::text::Output;

/// The refusal of a change of everything that lacks `--yes`.
#[derive(Debug, thiserror::Error)]
#[error("this would {would}; preview it with --dry-run or confirm with --yes")]
pub struct Unconfirmed {
    would: String,
}

#[derive(Args)]
#[command(next_help_heading = "Change")]
pub struct Change {
    /// Print what would change without changing it
    #[arg(long)]
    pub dry_run: bool,
    /// Confirm a change to everything; required when no filter is given
    #[arg(long, visible_alias = "all")]
    yes: bool,
    #[command(flatten)]
    pub output: Output,
}

impl Change {
    /// Refuses a change of everything (`chosen` is false) unless `--yes` or `--dry-run` is given.
    /// `would` completes the error "this would …".
    pub fn confirm(&self, chosen: bool, would: &str) -> Result<(), Unconfirmed> {
        if chosen || self.yes || self.dry_run {
            return Ok(());
        }
        Err(Unconfirmed { would: would.to_owned() })
    }
}
