//! HTTP to other people's endpoints: one POST, within a time, and what became of it.
//!
//! Nothing that an endpoint does costs more than its timeout: answers are read up to a bound,
//! redirects are not followed, and addresses are checked after DNS, so that nobody can make us
//! talk to our own network.

mod client;
mod connect;
mod endpoint;
mod guard;
mod retry_after;

pub use client::{Client, Failure, Options, OptionsError};
pub use endpoint::{Endpoint, EndpointError, parse_header};
pub use guard::{Guard, is_public};
