//! The error of the command line.

use std::{io, process::ExitCode};

use postrider_config as config;
use postrider_postgres as postgres;

use crate::roles;

use super::{dlq, docs, feed, keys, lag, listen, outbox, produce, relay, roundtrip, running, text};

/// The reason why a command failed, as a sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--set {0}: expected KEY=VALUE")]
    NotAPair(String),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("`{}` in {origin} is {invalid}", .invalid.key)]
    Invalid {
        origin: String,
        #[source]
        invalid: roles::Invalid,
    },
    #[error("cannot start the async runtime: {0}")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Role(#[from] roles::Error),
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error(transparent)]
    MissingFlag(#[from] relay::MissingFlag),
    #[error(transparent)]
    Relay(#[from] relay::RelayError),
    #[error(transparent)]
    Dlq(#[from] dlq::Error),
    #[error(transparent)]
    Keys(#[from] keys::Error),
    #[error(transparent)]
    Outbox(#[from] outbox::Error),
    #[error(transparent)]
    Feed(#[from] feed::Error),
    #[error(transparent)]
    Lag(#[from] lag::Error),
    #[error(transparent)]
    Roundtrip(#[from] roundtrip::Error),
    #[error(transparent)]
    Docs(#[from] docs::Error),
    #[error(transparent)]
    Produce(#[from] produce::Error),
    #[error(transparent)]
    Listen(#[from] listen::Error),
    #[error(transparent)]
    Running(#[from] running::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
    #[error("cannot write the pages: {0}")]
    Pages(#[source] io::Error),
}

/// Exit codes of a command that a signal ended, as shells report it: 128 and the signal's number.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

impl Error {
    /// Prints the error, and returns the exit code of the process.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Listen(listen::Error::Interrupted) => ExitCode::from(INTERRUPTED),
            error => {
                text::note(&format!("postrider: {error}"));
                match error {
                    Self::Relay(relay::RelayError::Stopped("SIGINT")) => ExitCode::from(INTERRUPTED),
                    Self::Relay(relay::RelayError::Stopped(_)) => ExitCode::from(TERMINATED),
                    _ => ExitCode::FAILURE,
                }
            }
        }
    }
}
