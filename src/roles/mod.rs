//! Roles: combine capabilities into processes. Only this module knows more than one capability.

mod access;
mod api;
mod auth;
mod error;
mod management;
mod platform;
mod processor;
mod progress;
mod relay;
mod rotation;
mod runtime;
mod settings;
mod settings_check;
mod topics;

pub use error::Error;
pub use platform::RelayCommand;
pub use rotation::{Load, LoadError};
pub use runtime::{run, run_relay};
pub use settings::{ConsumerPlan, Role, Settings, TopicPlan};
pub use settings_check::Invalid;
