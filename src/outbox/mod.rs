//! The outbox: what other rooms stored together with their truth reaches Kafka, in order per key, at least once,
//! whatever dies meanwhile. Rows go only after the broker has acknowledged them. The table is the interface: see
//! `migrations/0010_outbox.sql` for what a room inserts.

mod drain;
mod owner;
mod quarantine;
mod round;
mod store;

pub use drain::Drain;
pub use quarantine::{Filter, Listing, Outcome, Quarantine};
pub use round::Topic;

/// How many shards there are; the table computes a row's.
const SHARDS: i16 = 8;
