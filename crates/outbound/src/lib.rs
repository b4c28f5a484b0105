//! HTTP to external endpoints: one POST with a time limit, and its outcome.
//!
//! An endpoint cannot cost more than its timeout: answers are read up to a limit, redirects are not
//! followed, and addresses are checked after DNS, so that nobody can make postrider call its own
//! network.

mod client;
mod connect;
mod endpoint;
mod guard;
mod retry_after;

pub use client::{Client, Failure, Options, OptionsError};
pub use connect::{ConnectError, Connector, Stream};
pub use endpoint::{Endpoint, EndpointError, HeaderError, parse_header};
pub use guard::{Guard, is_public};
