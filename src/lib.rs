//! postrider accepts events over HTTP, stores them in Kafka and delivers them.
//!
//! This package is the program: [`roles`] combines the capabilities into processes, and [`cli`] is
//! the command line. Everything else is in `crates/`: each capability is a crate that uses no other
//! capability, and the rest is what they are built on.

pub mod cli;
pub mod roles;
