//! The question of the HTTP shell: whose credential a request has.

use std::{pin::Pin, sync::Arc};

use super::principal::Principal;

/// The credential of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    /// The token of `Authorization: Bearer …`: an API key or a JWT.
    Bearer(&'a str),
    /// The value of `?ticket=`, which is accepted once.
    Ticket(&'a str),
}

/// Reason why a credential is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("there are no credentials; send `Authorization: Bearer` with an API key or a token")]
    NoCredentials,
    #[error("the header `Authorization` must be `Bearer` with an API key or a token, once")]
    Malformed,
    #[error("the API key does not exist, or has been revoked")]
    UnknownKey,
    #[error("the credential has expired")]
    Expired,
    /// The text says which rule the token breaks, and nothing of the token.
    #[error("the token is not accepted: {0}")]
    Token(&'static str),
    #[error("the ticket does not exist, has been used, or is older than 30 s")]
    Ticket,
    /// The credential may be good, but it cannot be checked at the moment.
    #[error("the credential cannot be checked at the moment: {0}")]
    Unavailable(String),
}

impl Denied {
    /// Returns a word for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCredentials => "no_credentials",
            Self::Malformed => "malformed",
            Self::UnknownKey => "unknown_key",
            Self::Expired => "expired",
            Self::Token(_) => "token",
            Self::Ticket => "ticket",
            Self::Unavailable(_) => "unavailable",
        }
    }
}

/// A check that needs time.
pub type Verifying = Pin<Box<dyn Future<Output = Result<Arc<Principal>, Denied>> + Send>>;

/// Finds out whose credential a request has.
pub trait Authenticate: Send + Sync {
    /// Returns the principal, or why there is none, if that is known at once. `None` means that
    /// [`Self::verify`] has to be asked.
    fn known(&self, credential: Credential<'_>) -> Option<Result<Arc<Principal>, Denied>>;

    /// Checks a credential, which may need a server to answer.
    fn verify(&self, credential: Credential<'_>) -> Verifying;
}
