//! Projections: what Kafka holds, stored once in Postgres, and the readiness of the process for it.

mod progress;
mod project;
mod status;

pub use self::{
    progress::Progress,
    project::{Partition, Project, Projection},
    status::ProjectionStatus,
};
