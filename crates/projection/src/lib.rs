//! Stores the records of a topic once in Postgres, and reports the readiness of projections.

mod progress;
mod project;
mod status;

pub use self::{
    progress::Progress,
    project::{Partition, Project, Projection},
    status::ProjectionStatus,
};
