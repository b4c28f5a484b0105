//! HTTP for every capability: error answers (RFC 9457), limits on bodies, request ids, metrics, and
//! the server itself.

mod activity;
mod answer;
pub mod body;
mod bounded;
pub mod client_address;
pub mod code;
pub mod config;
mod connection_watch;
pub mod context;
mod counted;
pub mod decode;
mod encoding;
pub mod escapes;
pub mod gate;
pub mod json;
pub mod layer;
mod linger;
pub mod origin;
pub mod params;
pub mod problem;
pub mod refusals;
pub mod render;
mod route_metrics;
pub mod serve;
pub mod shortcut;
pub mod sse;
pub mod tls;
pub mod unmatched;
pub mod warning;

pub use activity::Audience;
pub use bounded::Bounded;
pub use code::Code;
pub use config::Config;
pub use context::RequestContext;
pub use params::Params;
pub use problem::{Problem, ProblemBody, ProblemItem};
