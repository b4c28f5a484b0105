//! Finds out whose credential a request has.

use std::sync::Arc;

use postrider_config::Secret;
use postrider_identity::{Authenticate, Credential, Denied, Identity, Principal, Scope, Verifying};
use tokio_util::sync::CancellationToken;

use super::{
    key::{self, Hash},
    keys::Keys,
    ticket::Tickets,
    token::Tokens,
};

/// Subject of the bootstrap key.
const BOOTSTRAP: &str = "bootstrap";

/// The credentials that a process accepts. Cheap to clone.
#[derive(Clone)]
pub struct Authenticator(Arc<Inner>);

struct Inner {
    bootstrap: Option<(Hash, Arc<Principal>)>,
    /// `None` without Postgres.
    keys: Option<Arc<Keys>>,
    /// `None` without an issuer.
    tokens: Option<Arc<Tokens>>,
    tickets: Tickets,
}

impl Authenticator {
    pub fn new(bootstrap_key: &Secret, keys: Option<Arc<Keys>>, tokens: Option<Arc<Tokens>>, tickets: Tickets) -> Self {
        let bootstrap = (!bootstrap_key.is_empty()).then(|| {
            let identity = Identity {
                subject: BOOTSTRAP.to_owned(),
                tenant: None,
                scopes: Scope::all(),
                expires_at: None,
                closes_at: None,
                key_id: None,
                revoked: CancellationToken::new(),
            };
            (key::hash(bootstrap_key.expose()), Arc::new(Principal::new(identity)))
        });
        Self(Arc::new(Inner { bootstrap, keys, tokens, tickets }))
    }
}

impl Authenticate for Authenticator {
    fn known(&self, credential: Credential<'_>) -> Option<Result<Arc<Principal>, Denied>> {
        let inner = &*self.0;
        let Credential::Bearer(token) = credential else { return None };
        if let Some((id, secret)) = key::split(token)
            && let Some(keys) = &inner.keys
            && let Some(found) = keys.known(id, secret)
        {
            return Some(found);
        }
        if let Some((hash, principal)) = &inner.bootstrap
            && key::equal(hash, &key::hash(token))
        {
            return Some(Ok(principal.clone()));
        }
        match (&inner.keys, &inner.tokens) {
            // Only a look at Postgres tells.
            (Some(_), _) if key::split(token).is_some() => None,
            (None, _) if key::split(token).is_some() => Some(Err(Denied::UnknownKey)),
            (_, Some(tokens)) => tokens.known(token),
            (_, None) => Some(Err(Denied::Token("it is not an API key, and no issuer is configured"))),
        }
    }

    fn verify(&self, credential: Credential<'_>) -> Verifying {
        let inner = self.0.clone();
        match credential {
            Credential::Ticket(ticket) => {
                let ticket = ticket.to_owned();
                Box::pin(async move { inner.tickets.redeem(&ticket, inner.keys.as_deref()).await })
            }
            Credential::Bearer(token) => {
                let token = token.to_owned();
                Box::pin(async move {
                    match (key::split(&token), &inner.keys, &inner.tokens) {
                        (Some((id, secret)), Some(keys), _) => keys.verify(id, secret).await,
                        (None, _, Some(tokens)) => tokens.verify(&token).await,
                        _ => Err(Denied::UnknownKey),
                    }
                })
            }
        }
    }
}
