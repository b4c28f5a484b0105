//! Grants: the purpose of a key, as operators give it.

use std::time::SystemTime;

use postrider_identity::{BadName, BadScope, Scope, check_name};
use postrider_time::clock;

use super::store::time_of;

/// Longest note, in bytes.
const MAX_NOTE_BYTES: usize = 1_000;
const MAX_SCOPES: usize = 100;
/// Last expiry: the end of the year 9999, the last that RFC 3339 can write.
const MAX_EXPIRY_MS: i64 = 253_402_300_799_999;

/// Purpose of a key.
#[derive(Debug, Clone, Default)]
pub struct Grant {
    /// For whom its requests act; its id by default.
    pub subject: Option<String>,
    pub tenant: Option<String>,
    pub scopes: Vec<String>,
    /// A text for operators.
    pub note: String,
    pub expires_at: Option<SystemTime>,
}

/// A field of a grant that breaks a rule.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("`subject` {0}")]
    Subject(BadName),
    #[error("`tenant` {0}")]
    Tenant(BadName),
    #[error("`scopes` must have 1 to {MAX_SCOPES} scopes (got {0})")]
    ScopeCount(usize),
    #[error(transparent)]
    Scope(BadScope),
    #[error("`note` must have at most {MAX_NOTE_BYTES} bytes, and no null character")]
    Note,
    #[error("`expires` must be a time such as 2027-01-31T12:00:00Z or a span such as 90m, 12h or 30d (got `{0}`)")]
    Expires(String),
    #[error("`expires` must be in the future (got `{0}`)")]
    Past(String),
}

impl GrantError {
    /// Returns the name of the field.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Subject(_) => "subject",
            Self::Tenant(_) => "tenant",
            Self::ScopeCount(_) | Self::Scope(_) => "scopes",
            Self::Note => "note",
            Self::Expires(_) | Self::Past(_) => "expires",
        }
    }
}

impl Grant {
    /// Returns the grant, or the first field that breaks a rule.
    pub fn check(self) -> Result<Self, GrantError> {
        self.subject.as_deref().map_or(Ok(()), check_name).map_err(GrantError::Subject)?;
        self.tenant.as_deref().map_or(Ok(()), check_name).map_err(GrantError::Tenant)?;
        if self.scopes.is_empty() || self.scopes.len() > MAX_SCOPES {
            return Err(GrantError::ScopeCount(self.scopes.len()));
        }
        self.scopes.iter().try_for_each(|scope| scope.parse::<Scope>().map(drop)).map_err(GrantError::Scope)?;
        if self.note.len() > MAX_NOTE_BYTES || self.note.contains('\0') {
            return Err(GrantError::Note);
        }
        Ok(self)
    }
}

/// Parses an RFC 3339 time, or a span after `now_ms` such as `90m`, `12h` or `30d`.
pub fn parse_expiry(text: &str, now_ms: i64) -> Result<SystemTime, GrantError> {
    let at = clock::parse_rfc3339(text).or_else(|| now_ms.checked_add(clock::parse_span_ms(text)?));
    match at {
        Some(at) if at > MAX_EXPIRY_MS => Err(GrantError::Expires(text.to_owned())),
        Some(at) if at > now_ms => Ok(time_of(at)),
        Some(_) => Err(GrantError::Past(text.to_owned())),
        None => Err(GrantError::Expires(text.chars().take(100).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_is_a_time_or_a_span_in_the_future() {
        let now = 1_000_000_000_000;
        for (text, ms) in [("90m", 5_400_000), ("30d", 30 * 86_400_000), ("2001-09-09T01:46:41Z", 1_000)] {
            assert_eq!(parse_expiry(text, now).unwrap(), time_of(now + ms), "{text}");
        }
        for text in ["", "d", "30", "-1d", "1.5h", "soon", "30 d", "99999999999d", "4000000d", "ä"] {
            assert!(matches!(parse_expiry(text, now), Err(GrantError::Expires(_))), "{text}");
        }
        for text in ["0d", "2001-09-09T01:46:40Z", "1999-01-01T00:00:00Z"] {
            assert!(matches!(parse_expiry(text, now), Err(GrantError::Past(_))), "{text}");
        }
    }

    #[test]
    fn a_grant_needs_scopes_that_exist() {
        let grant =
            |scopes: &[&str]| Grant { scopes: scopes.iter().map(ToString::to_string).collect(), ..Grant::default() };
        assert!(grant(&["kv:read", "topic:write:a.*"]).check().is_ok());
        assert!(matches!(grant(&[]).check(), Err(GrantError::ScopeCount(0))));
        assert!(matches!(grant(&["kv:read", "kv"]).check(), Err(GrantError::Scope(BadScope::Unknown(_)))));
        let named = Grant { subject: Some("a\u{1}b".to_owned()), ..grant(&["kv:read"]) };
        assert_eq!(named.check().unwrap_err().field(), "subject");
    }
}
