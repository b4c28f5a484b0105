//! Tickets: credentials that are accepted once, for the WebSockets and streams of browsers.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use postrider_identity::{Denied, Identity, Principal};
use postrider_redis::Redis;
use redis::RedisError;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    key::{NoRandomness, hash, hex, random_hex},
    keys::Keys,
    store::{milliseconds, time_of},
};

/// Time for which a ticket is accepted.
pub const LIFETIME: Duration = Duration::from_secs(30);
const TICKET_BYTES: usize = 32;

/// The tickets in Redis, under the hash of each.
#[derive(Clone)]
pub struct Tickets {
    redis: watch::Receiver<Option<Redis>>,
    prefix: String,
}

/// Holder of a ticket.
#[derive(Serialize, Deserialize)]
struct Holder {
    /// `None` if authentication was off.
    identity: Option<Stored>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    subject: String,
    tenant: Option<String>,
    scopes: Vec<String>,
    expires_ms: Option<i64>,
    closes_ms: Option<i64>,
    key_id: Option<String>,
}

/// Reasons why there is no ticket.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    #[error("Redis is not connected yet")]
    NoRedis,
    #[error("Redis: {0}")]
    Redis(#[from] RedisError),
    #[error(transparent)]
    Random(#[from] NoRandomness),
    #[error("the ticket cannot be stored: {0}")]
    Json(#[from] serde_json::Error),
}

impl Tickets {
    /// `key_prefix` is that of all of postrider's keys in Redis.
    pub fn new(redis: watch::Receiver<Option<Redis>>, key_prefix: &str) -> Self {
        Self { redis, prefix: format!("{key_prefix}ticket:") }
    }

    fn redis(&self) -> Result<Redis, TicketError> {
        self.redis.borrow().clone().ok_or(TicketError::NoRedis)
    }

    /// The hash is enough to find a ticket, and of no use to whoever reads Redis.
    fn key(&self, ticket: &str) -> String {
        format!("{}{}", self.prefix, hex(&hash(ticket)))
    }

    /// Makes a ticket for this principal.
    pub async fn issue(&self, principal: &Principal) -> Result<String, TicketError> {
        let ticket = random_hex::<TICKET_BYTES>()?;
        let identity = principal.identity().map(|identity| Stored {
            subject: identity.subject.clone(),
            tenant: identity.tenant.clone(),
            scopes: identity.scopes.iter().map(ToString::to_string).collect(),
            expires_ms: identity.expires_at.map(milliseconds),
            closes_ms: identity.closes_at.map(milliseconds),
            key_id: identity.key_id.clone(),
        });
        let holder = serde_json::to_string(&Holder { identity })?;
        let mut set = redis::cmd("SET");
        set.arg(self.key(&ticket)).arg(holder).arg("EX").arg(LIFETIME.as_secs());
        set.query_async::<()>(&mut self.redis()?).await?;
        Ok(ticket)
    }

    /// Takes a ticket, which is thereby used up, and returns its holder.
    pub async fn redeem(&self, ticket: &str, keys: Option<&Keys>) -> Result<Arc<Principal>, Denied> {
        let is_ticket = ticket.len() == 2 * TICKET_BYTES && ticket.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_ticket {
            return Err(Denied::Ticket);
        }
        let unavailable = |error: TicketError| {
            tracing::debug!(%error, "ticket not read");
            Denied::Unavailable("Redis, which has the tickets, cannot be reached".to_owned())
        };
        let mut take = redis::cmd("GETDEL");
        take.arg(self.key(ticket));
        let found = take.query_async::<Option<String>>(&mut self.redis().map_err(unavailable)?).await;
        let holder = found.map_err(|error| unavailable(error.into()))?.ok_or(Denied::Ticket)?;
        let holder: Holder = serde_json::from_str(&holder).map_err(|_| Denied::Ticket)?;
        // One that was made while authentication was off proves nothing.
        let stored = holder.identity.ok_or(Denied::Ticket)?;
        // Its key may have been revoked since, and may be later.
        let revoked = match (&stored.key_id, keys) {
            (None, _) => CancellationToken::new(),
            (Some(id), Some(keys)) => {
                let of_key = keys.of_id(id).await?;
                of_key.identity().map(|identity| identity.revoked.clone()).unwrap_or_default()
            }
            (Some(_), None) => return Err(Denied::UnknownKey),
        };
        let principal = Principal::new(Identity {
            subject: stored.subject,
            tenant: stored.tenant,
            scopes: stored.scopes.iter().filter_map(|scope| scope.parse().ok()).collect(),
            expires_at: stored.expires_ms.map(time_of),
            closes_at: stored.closes_ms.map(time_of),
            key_id: stored.key_id,
            revoked,
        });
        if principal.has_ended(SystemTime::now()) { Err(Denied::Expired) } else { Ok(Arc::new(principal)) }
    }
}
