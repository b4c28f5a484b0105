//! Roles combine rooms: the only place where rooms meet.

mod api;
mod processor;
mod relay;
mod runtime;
mod settings;

pub use api::openapi;
pub use runtime::run;
pub use settings::{Role, Settings, TopicPlan};
