//! Builds authentication from the settings, and starts the tasks that keep it up to date.

use std::sync::Arc;

use postrider_auth::{Authenticator, Keys, Tickets, Tokens};
use postrider_http::{
    gate::{Gate, Rule},
    origin::Origins,
};
use postrider_process::drain::Tasks;
use utoipa::openapi::OpenApi;

use super::{
    access,
    error::Error,
    platform::{Platform, SharedRedis},
};

/// Parts of authentication that the listeners of a process need.
pub(super) struct Auth {
    /// `None` while authentication is off.
    authenticator: Option<Authenticator>,
    /// True if authentication is off because nobody has decided about it; then the process listens
    /// on loopback addresses only.
    is_undecided: bool,
    /// `None` without Postgres.
    pub keys: Option<Arc<Keys>>,
    pub tickets: Tickets,
}

impl Auth {
    pub fn start(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) -> Result<Self, Error> {
        let config = &platform.settings.auth;
        let keys = platform.postgres.clone().map(|pool| Arc::new(Keys::new(pool, config)));
        if let Some(keys) = keys.clone() {
            tasks.spawn_forever("API keys", async move { keys.follow().await });
        }
        let tickets = Tickets::new(redis, &platform.settings.redis.key_prefix);
        if !config.is_required() {
            tracing::warn!(
                "authentication is off: whoever reaches this process may do everything (`auth.mode=required`)"
            );
            return Ok(Self { authenticator: None, is_undecided: config.mode.is_none(), keys, tickets });
        }
        let has_issuer = !config.token.issuer.is_empty();
        let tokens = has_issuer.then(|| Tokens::new(config.token.clone())).transpose()?.map(Arc::new);
        if let Some(tokens) = tokens.clone() {
            tasks.spawn_forever("keys of the issuer", async move { tokens.follow().await });
        }
        let authenticator = Authenticator::new(&config.bootstrap_key, keys.clone(), tokens, tickets.clone());
        Ok(Self { authenticator: Some(authenticator), is_undecided: false, keys, tickets })
    }

    /// Returns the gate of a listener with these routes.
    pub fn gate(&self, rules: &[Rule], origins: Origins) -> Gate {
        let gate = Gate::default().with_origins(origins.with_local_names_only(self.is_undecided));
        match self.authenticator.clone() {
            Some(authenticator) => gate.with_credentials(Arc::new(authenticator), rules.iter().cloned()),
            None => gate,
        }
    }

    /// Adds to a description what the routes ask of their callers.
    pub fn describe(&self, description: &mut OpenApi, rules: &[Rule]) {
        if self.authenticator.is_some() {
            access::describe(description, rules);
        }
    }
}
