//! Principals, who send requests, and their scopes, which say what they may do.
//!
//! This crate decides and does no I/O. `postrider-auth` finds out whose credential a request has;
//! the HTTP shell asks it through [`Authenticate`].

mod authenticate;
mod pattern;
mod principal;
mod scope;

pub use authenticate::{Authenticate, Credential, Denied, Verifying};
pub use pattern::{BadPattern, Pattern};
pub use principal::{BadName, Identity, NotOwn, Principal, check_name};
pub use scope::{BadScope, Missing, Permission, Scope};
