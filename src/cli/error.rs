//! The error of the command line.

use std::io;

use postrider_config as config;
use postrider_postgres as postgres;

use crate::roles;

use super::{dlq, docs, feed, lag, outbox, relay, roundtrip};

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
    Relay(#[from] relay::MissingFlag),
    #[error(transparent)]
    Dlq(#[from] dlq::Error),
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
}
