//! Puts rotated certificates and passwords to use: notices that mounted files changed, tries what they say, and has the
//! process drain and start again with it, one process of a role at a time.
//!
//! A secret that does not work is not put to use: the process keeps the one it has, says so, and tries again
//! ([ADR 13](../../../docs/adr/0013-rotated-secrets-are-tried-first.md)).

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

/// Files that are only read at start, and what to do when they change.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Files, and directories with files. When one changes, the process loads its configuration anew and tries it on the
    /// servers. If it works, the process drains and replaces itself, with the same process id; if it does not, the process
    /// goes on with what it has, and tries again.
    pub files: Vec<String>,
    /// Time between looks at them, and between attempts with what does not work, in milliseconds.
    #[schemars(range(min = 10, max = 3_600_000))]
    pub interval_ms: u64,
    /// Time that a process may be away for a rotation while the others of its role wait for it, from the beginning of its
    /// drain until it is ready again, in milliseconds. The order is kept by a lease in Redis, which expires then.
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub lease_ms: u64,
    /// Where Redis cannot be asked for the lease, the process waits for a random part of this before it drains, in
    /// milliseconds, so that processes with the same files do not all restart at once.
    #[schemars(range(max = 3_600_000))]
    pub spread_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { files: Vec::new(), interval_ms: 10_000, lease_ms: 120_000, spread_ms: 60_000 }
    }
}
