//! What every room stands on. No word of the product's capabilities appears here.

pub mod backoff;
pub mod clock;
pub mod config;
pub mod drain;
pub mod gather;
pub mod http;
pub mod kafka;
pub mod memory;
pub mod ops;
pub mod outbound;
pub mod outbox;
pub mod pace;
pub mod panic;
pub mod postgres;
pub mod pubsub;
pub mod query;
pub mod redis;
pub mod replace;
pub mod rotation;
pub mod telemetry;
pub mod trace_context;
pub mod tracking;
pub mod trial;
pub mod unknown;
pub mod upkeep;
