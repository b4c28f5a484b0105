//! Roles combine rooms: the only place where rooms meet.

mod api;
mod processor;
mod progress;
mod relay;
mod runtime;
mod settings;

pub use api::openapi;
pub use relay::RelayCommand;
pub use runtime::{run, run_relay};
pub use settings::{ConsumerPlan, Role, Settings, TopicPlan};
