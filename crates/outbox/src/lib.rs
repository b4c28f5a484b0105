//! The outbox: events that capabilities store in Postgres together with their data reach Kafka at
//! least once and in order per key, despite crashes. A row is deleted only after the broker has
//! acknowledged its record. The table is the interface: see `migrations/0010_outbox.sql` for the
//! columns that a capability inserts.

mod drain;
mod owner;
mod quarantine;
mod round;
mod store;

pub use drain::Drain;
pub use quarantine::{Filter, Listing, Outcome, Quarantine};
pub use round::Topic;

/// Number of shards; the table computes the shard of a row.
const SHARDS: i16 = 8;
