//! What every room stands on. No word of the product's capabilities appears here.

pub mod clock;
pub mod config;
pub mod drain;
pub mod http;
pub mod kafka;
pub mod ops;
pub mod postgres;
pub mod redis;
pub mod telemetry;
pub mod trace_context;
