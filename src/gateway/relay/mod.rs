//! Kafka to HTTP: every record of a topic is POSTed to one URL, in order per key. A record is
//! settled when the target has taken it, or when its attempts are spent and it is with the dead
//! letters. At least once: after a crash a target may see a record again.

mod config;
mod envelope;
mod request;
mod route;
mod stats;

pub use config::{Config, Problem};
pub use route::{Access, Route};
pub use stats::{Snapshot, Stats};
