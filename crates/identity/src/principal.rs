//! Principals: the senders of requests.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::scope::{Missing, Permission, Scope};

/// Longest subject or tenant, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// Id of the principal of all requests while authentication is off.
const ANONYMOUS: &str = "anonymous";

/// Sender of a request, with what it may do.
#[derive(Debug)]
pub struct Principal {
    /// `None` while authentication is off.
    identity: Option<Identity>,
    /// Distinguishes the principal in the ids of events.
    id: String,
}

/// Content of a credential.
#[derive(Debug, Clone)]
pub struct Identity {
    pub subject: String,
    pub tenant: Option<String>,
    pub scopes: Vec<Scope>,
    /// Time after which the credential is not accepted.
    pub expires_at: Option<SystemTime>,
    /// Time at which open connections end: `expires_at` without the tolerance for clocks.
    pub closes_at: Option<SystemTime>,
    /// Id of the API key that the credential is, or comes from.
    pub key_id: Option<String>,
    /// Cancelled when the credential is revoked.
    pub revoked: CancellationToken,
}

/// Error of a request for another subject than the caller's own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the credential is for another subject, and lacks the scope `act-for-others`")]
pub struct NotOwn;

/// Error of a text that cannot be a subject or tenant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("must have 1 to {MAX_NAME_BYTES} bytes (got {0})")]
    Length(usize),
    #[error("must not have control characters")]
    Control,
}

/// Checks the name of a subject or tenant.
pub fn check_name(name: &str) -> Result<(), BadName> {
    match name.len() {
        1..=MAX_NAME_BYTES if name.chars().any(char::is_control) => Err(BadName::Control),
        1..=MAX_NAME_BYTES => Ok(()),
        length => Err(BadName::Length(length)),
    }
}

impl Principal {
    /// Returns the principal of all requests while authentication is off. It may do everything.
    pub fn anonymous() -> Arc<Self> {
        static ANYBODY: LazyLock<Arc<Principal>> =
            LazyLock::new(|| Arc::new(Principal { identity: None, id: ANONYMOUS.to_owned() }));
        ANYBODY.clone()
    }

    /// Returns the principal of requests without credentials while authentication is on. It may do
    /// nothing.
    pub fn nobody() -> Arc<Self> {
        static NOBODY: LazyLock<Arc<Principal>> = LazyLock::new(|| {
            Arc::new(Principal::new(Identity {
                subject: String::new(),
                tenant: None,
                scopes: Vec::new(),
                expires_at: None,
                closes_at: None,
                key_id: None,
                revoked: CancellationToken::new(),
            }))
        });
        NOBODY.clone()
    }

    pub fn new(identity: Identity) -> Self {
        // Names have no control characters, so no two principals have the same id.
        let id = format!("{}\u{1}{}", identity.tenant.as_deref().unwrap_or_default(), identity.subject);
        Self { identity: Some(identity), id }
    }

    /// Returns the text that distinguishes this principal in the ids of events.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns what the credential says; `None` while authentication is off.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Checks that a scope allows this, for any topic if it has a pattern.
    pub fn may(&self, permission: Permission) -> Result<(), Missing> {
        let Some(identity) = &self.identity else { return Ok(()) };
        if identity.scopes.iter().any(|scope| scope.permission == permission) {
            return Ok(());
        }
        let pattern = if permission.takes_pattern() { ":PATTERN" } else { "" };
        Err(Missing { scope: format!("{permission}{pattern}") })
    }

    /// Checks that a scope allows this for a topic.
    pub fn may_on(&self, permission: Permission, topic: &str) -> Result<(), Missing> {
        let Some(Identity { subject, tenant, scopes, .. }) = &self.identity else { return Ok(()) };
        let allows = |scope: &Scope| {
            let pattern = scope.pattern.as_ref().filter(|_| scope.permission == permission);
            pattern.is_some_and(|pattern| pattern.matches(topic, subject, tenant.as_deref()))
        };
        if scopes.iter().any(allows) { Ok(()) } else { Err(Missing { scope: format!("{permission}:{topic}") }) }
    }

    /// Checks that the request may act for this subject: its own, or any with `act-for-others`.
    pub fn may_act_for(&self, subject: &str) -> Result<(), NotOwn> {
        let Some(identity) = &self.identity else { return Ok(()) };
        if (identity.subject == subject && !subject.is_empty()) || self.may(Permission::ActForOthers).is_ok() {
            Ok(())
        } else {
            Err(NotOwn)
        }
    }

    /// Returns whether there are subjects for which the request may not act.
    pub fn is_restricted(&self) -> bool {
        self.may(Permission::ActForOthers).is_err()
    }

    /// Returns whether the credential is no longer accepted.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        let Some(identity) = &self.identity else { return false };
        identity.revoked.is_cancelled() || identity.expires_at.is_some_and(|at| at <= now)
    }

    /// Returns whether open connections have to end.
    pub fn must_close(&self, now: SystemTime) -> bool {
        let Some(identity) = &self.identity else { return false };
        identity.revoked.is_cancelled() || identity.closes_at.is_some_and(|at| at <= now)
    }

    /// Waits until open connections have to end, because the credential expires or is revoked;
    /// forever while authentication is off.
    pub async fn ended(&self) {
        let Some(Identity { closes_at, revoked, .. }) = &self.identity else { return std::future::pending().await };
        tokio::select! {
            () = revoked.cancelled() => {}
            () = until(*closes_at) => {}
        }
    }
}

/// Waits for a time of the system's clock, also if that clock is set meanwhile.
async fn until(at: Option<SystemTime>) {
    const STEP: Duration = Duration::from_secs(30);
    let Some(at) = at else { return std::future::pending().await };
    while let Ok(left) = at.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(STEP)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(scopes: &[&str]) -> Principal {
        Principal::new(Identity {
            subject: "ann".to_owned(),
            tenant: Some("acme".to_owned()),
            scopes: scopes.iter().map(|scope| scope.parse().unwrap()).collect(),
            expires_at: None,
            closes_at: None,
            key_id: None,
            revoked: CancellationToken::new(),
        })
    }

    #[test]
    fn only_granted_scopes_allow() {
        let principal = with(&["kv:read", "topic:write:{tenant}.*"]);
        assert_eq!(principal.may(Permission::KvRead), Ok(()));
        assert_eq!(principal.may(Permission::TopicWrite), Ok(()));
        assert_eq!(principal.may(Permission::KvWrite), Err(Missing { scope: "kv:write".to_owned() }));
        assert_eq!(principal.may(Permission::TopicRead), Err(Missing { scope: "topic:read:PATTERN".to_owned() }));
        assert_eq!(principal.may_on(Permission::TopicWrite, "acme.x"), Ok(()));
        for (permission, topic) in [(Permission::TopicWrite, "other.x"), (Permission::TopicRead, "acme.x")] {
            let scope = format!("{permission}:{topic}");
            assert_eq!(principal.may_on(permission, topic), Err(Missing { scope }));
        }
    }

    #[test]
    fn only_act_for_others_reaches_other_subjects() {
        assert_eq!(with(&["messages:read"]).may_act_for("ann"), Ok(()));
        for other in ["bob", "Ann", "", "ann ", "acme"] {
            assert_eq!(with(&["messages:read", "admin"]).may_act_for(other), Err(NotOwn), "{other}");
            assert_eq!(with(&["act-for-others"]).may_act_for(other), Ok(()));
        }
    }

    #[test]
    fn while_authentication_is_off_everything_is_allowed() {
        let anybody = Principal::anonymous();
        assert!(anybody.may(Permission::Admin).is_ok() && anybody.may_on(Permission::TopicWrite, "x").is_ok());
        assert!(anybody.may_act_for("bob").is_ok() && !anybody.has_ended(SystemTime::now()));
        assert_eq!(anybody.id(), "anonymous");
        let nobody = Principal::nobody();
        assert!(Permission::ALL.iter().all(|&permission| nobody.may(permission).is_err()));
        assert!(nobody.may_act_for("ann").is_err() && nobody.may_act_for("").is_err());
    }

    #[tokio::test]
    async fn it_ends_when_it_expires_or_is_revoked() {
        let Some(mut identity) = with(&[]).identity else { panic!("it has an identity") };
        identity.closes_at = Some(SystemTime::now());
        Principal::new(identity.clone()).ended().await;
        assert!(!Principal::new(identity.clone()).has_ended(SystemTime::now()));
        identity.expires_at = Some(SystemTime::now());
        assert!(Principal::new(identity.clone()).has_ended(SystemTime::now()));
        (identity.expires_at, identity.closes_at) = (None, None);
        let principal = Principal::new(identity.clone());
        assert!(!principal.has_ended(SystemTime::now()));
        identity.revoked.cancel();
        principal.ended().await;
        assert!(principal.has_ended(SystemTime::now()));
    }
}
