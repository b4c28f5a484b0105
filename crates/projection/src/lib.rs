//! Projections: what Kafka holds, stored once in Postgres, and the readiness of the process for it.

mod project;
mod status;

pub use self::{project::*, status::ProjectionStatus};
