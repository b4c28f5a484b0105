//! Puts rotated certificates and passwords into use: notices that mounted files changed, tests
//! their content, and makes the process drain and restart with it, one process of a role at a time.
//!
//! A secret that does not work is not put into use: the process keeps the one it has, reports the
//! problem, and retries ([ADR 13](../../../docs/adr/0013-rotated-secrets-are-tried-first.md)).

mod candidate;
mod files;
mod lease;
mod trial;
mod watch;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::{
    files::Fingerprint,
    lease::{Lease, Turn},
    trial::{Order, Trial, Verdict},
    watch::{Watch, describe},
};

/// Files that are only read at start, and the reaction to their changes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Files, and directories with files. When one changes, the process loads its configuration
    /// again and tests it against the servers. If it works, the process drains and replaces itself,
    /// keeping its process id. If it does not work, the process keeps its current configuration,
    /// and retries.
    pub files: Vec<String>,
    /// Time between two checks of the files, and between attempts with content that does not work,
    /// in milliseconds.
    #[schemars(range(min = 10, max = 3_600_000))]
    pub interval_ms: u64,
    /// Time that the other processes of a role wait for one that restarts, from the beginning of
    /// its drain until it is ready again, in milliseconds. The order is kept by a lease in Redis,
    /// which expires after this time.
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub lease_ms: u64,
    /// If Redis cannot be asked for the lease, the process waits for a random part of this time
    /// before it drains, in milliseconds, so that processes with the same files do not all restart
    /// at once.
    #[schemars(range(max = 3_600_000))]
    pub spread_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { files: Vec::new(), interval_ms: 10_000, lease_ms: 120_000, spread_ms: 60_000 }
    }
}
