//! Finds out whose credential a request has, and lets operators make and revoke API keys.
//!
//! - **API keys** are rows in Postgres, hashed. Every process keeps them all in memory and reads
//!   them again when one has changed; it looks every second, so a revocation holds everywhere within
//!   two seconds. While Postgres is away, the keys that are known are accepted for
//!   `auth.keys_stale_seconds`.
//! - **Tokens** are JWTs of an issuer. Its keys come from its JWKS, a file, or a shared secret. The
//!   verified ones are remembered until they expire.
//! - **Tickets** replace the other two where a browser cannot set headers. They live in Redis for
//!   30 s and are accepted once.

mod authenticator;
mod codes;
mod config;
mod grant;
mod http;
mod issuer_keys;
mod key;
mod keys;
mod signature;
mod store;
mod ticket;
mod token;

pub use authenticator::Authenticator;
pub use codes::ALL as CODES;
pub use config::{Algorithm, Config, ConfigError, Mode, TokenConfig};
pub use grant::{Grant, GrantError, parse_expiry};
pub use http::{ApiKey, key_routes, ticket_routes};
pub use key::{NewKey, NoRandomness};
pub use keys::Keys;
pub use store::{KeyRow, Store};
pub use ticket::Tickets;
pub use token::Tokens;
