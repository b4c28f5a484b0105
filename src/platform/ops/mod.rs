//! What operators see of a process: liveness, readiness, start-up and metrics.
//!
//! Components hold a [`Check`] and say how they are; nothing here ever asks a dependency.

mod health;
mod server;

pub use health::{Beat, Check, Health, Published};
pub use server::{Config, render_metrics, router};
