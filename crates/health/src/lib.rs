//! Endpoints for operators of a process: liveness, readiness, start-up and metrics.
//!
//! Components set the state of their own [`Check`]; nothing in this crate queries a dependency.

mod health;
mod server;

pub use health::{Beat, Check, Health, Published};
pub use server::{Config, metrics_routes, routes};
