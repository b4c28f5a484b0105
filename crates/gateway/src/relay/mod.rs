//! Kafka to HTTP: POSTs every record of a topic to one URL, in order per key. A record is finished
//! when the target accepts it, or when its retries are exhausted and it is dead-lettered. Delivery
//! is at least once: after a crash the target may receive duplicates.

mod config;
mod envelope;
mod preview;
mod request;
mod route;
mod stats;

pub use config::{Config, Problem};
pub use preview::Preview;
pub use route::{Access, Route};
pub use stats::{DeadLetters, Failed, Snapshot, Stats};
