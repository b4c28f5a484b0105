//! Settings of authentication.

use std::time::Duration;

use postrider_config::{Secret, SecretUrl};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shortest shared secret, in bytes, as RFC 7518 asks for HS256.
pub const MIN_SECRET_BYTES: usize = 32;

/// Need of credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Anybody who reaches a listener may do everything.
    Off,
    /// Every request needs a credential, except for health and the API description.
    Required,
}

/// Authentication: API keys, and tokens of an issuer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `required` asks for credentials, `off` lets anybody do everything. Without it, authentication
    /// is off, and the listeners must have loopback addresses.
    pub mode: Option<Mode>,
    /// An API key with every scope, for the first use and for automation; at least 32 characters.
    pub bootstrap_key: Secret,
    /// Time for which API keys are accepted after Postgres was last reached, in seconds. A
    /// revocation reaches a process within 2 s, or when it reaches Postgres again.
    #[schemars(range(min = 5, max = 86_400))]
    pub keys_stale_seconds: u64,
    pub token: TokenConfig,
}

/// Tokens (JWT) of an issuer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TokenConfig {
    /// Issuer of the tokens, as in their claim `iss`. Empty: tokens are not accepted.
    pub issuer: String,
    /// Audiences, of which the claim `aud` must have one.
    pub audiences: Vec<String>,
    /// Signature algorithms that are accepted.
    pub algorithms: Vec<Algorithm>,
    /// URL of the issuer's keys (JWKS). Empty: the one that `ISSUER/.well-known/openid-configuration`
    /// names, unless there is a file or a secret.
    pub jwks_url: SecretUrl,
    /// File with the issuer's keys (JWKS). It is read again when it changes.
    pub jwks_file: String,
    /// Secret that is shared with the issuer, for `HS256`; at least 32 bytes.
    pub secret: Secret,
    /// Time between two reads of the issuer's keys, in seconds. A token with an unknown key makes a
    /// process read them at once, at most every 30 s.
    #[schemars(range(min = 1, max = 86_400))]
    pub refresh_seconds: u64,
    /// Difference between the issuer's clock and this one that is tolerated, in seconds.
    #[schemars(range(max = 600))]
    pub leeway_seconds: u64,
    /// Claim with the scopes: a text with spaces, or a list.
    pub scope_claim: String,
    /// Claim with the tenant.
    pub tenant_claim: String,
}

/// Signature algorithm of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Algorithm {
    /// RSA with SHA-256.
    RS256,
    /// ECDSA with P-256.
    ES256,
    /// Ed25519.
    EdDSA,
    /// HMAC with SHA-256, by a shared secret.
    HS256,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: None, bootstrap_key: Secret::default(), keys_stale_seconds: 300, token: TokenConfig::default() }
    }
}

impl Default for TokenConfig {
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audiences: Vec::new(),
            algorithms: vec![Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA],
            jwks_url: SecretUrl::default(),
            jwks_file: String::new(),
            secret: Secret::default(),
            refresh_seconds: 300,
            leeway_seconds: 60,
            scope_claim: "scope".to_owned(),
            tenant_claim: "tenant".to_owned(),
        }
    }
}

/// A rule that the settings break. The text continues a sentence that names the key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("shorter than {MIN_SECRET_BYTES} characters")]
    ShortBootstrapKey,
    #[error("a secret without printable ASCII characters only, which no client can send as a token")]
    UnsendableBootstrapKey,
    #[error("without an audience, or with an empty one, but `auth.token.issuer` needs at least one")]
    NoAudience,
    #[error("empty, but `auth.token.issuer` needs at least one algorithm")]
    NoAlgorithm,
    #[error("shorter than {MIN_SECRET_BYTES} bytes, which `HS256` needs")]
    ShortSecret,
    #[error("set, but `auth.token.algorithms` does not have `HS256`")]
    UnusedSecret,
    #[error("not a URL with http or https")]
    NotAUrl,
    #[error(
        "without a way to authenticate: set `postgres.url` for API keys, `auth.token.issuer`, or `auth.bootstrap_key`"
    )]
    NoWay,
}

impl Config {
    pub fn is_required(&self) -> bool {
        self.mode == Some(Mode::Required)
    }

    pub(crate) fn keys_stale(&self) -> Duration {
        Duration::from_secs(self.keys_stale_seconds)
    }

    /// Returns the first key that breaks a rule.
    pub fn check(&self, has_postgres: bool) -> Result<(), (&'static str, ConfigError)> {
        let bootstrap = self.bootstrap_key.expose();
        if !bootstrap.is_empty() {
            if bootstrap.len() < MIN_SECRET_BYTES {
                return Err(("auth.bootstrap_key", ConfigError::ShortBootstrapKey));
            }
            if !bootstrap.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',') {
                return Err(("auth.bootstrap_key", ConfigError::UnsendableBootstrapKey));
            }
        }
        self.token.check()?;
        let has_way = has_postgres || !self.token.issuer.is_empty() || !bootstrap.is_empty();
        if self.is_required() && !has_way { Err(("auth.mode", ConfigError::NoWay)) } else { Ok(()) }
    }
}

impl TokenConfig {
    fn check(&self) -> Result<(), (&'static str, ConfigError)> {
        let (secret, has_hmac) = (self.secret.expose(), self.algorithms.contains(&Algorithm::HS256));
        if !secret.is_empty() && !has_hmac {
            return Err(("auth.token.secret", ConfigError::UnusedSecret));
        }
        if !self.jwks_url.is_empty() && !is_http(self.jwks_url.expose()) {
            return Err(("auth.token.jwks_url", ConfigError::NotAUrl));
        }
        if self.issuer.is_empty() {
            return Ok(());
        }
        if self.audiences.is_empty() || self.audiences.iter().any(String::is_empty) {
            return Err(("auth.token.audiences", ConfigError::NoAudience));
        }
        if self.algorithms.is_empty() {
            return Err(("auth.token.algorithms", ConfigError::NoAlgorithm));
        }
        if has_hmac && secret.len() < MIN_SECRET_BYTES {
            return Err(("auth.token.secret", ConfigError::ShortSecret));
        }
        let is_discovered = self.jwks_url.is_empty() && self.jwks_file.is_empty() && self.needs_public_keys();
        if is_discovered && !is_http(&self.issuer) {
            return Err(("auth.token.issuer", ConfigError::NotAUrl));
        }
        Ok(())
    }

    /// Returns whether there are algorithms other than HS256.
    pub(crate) fn needs_public_keys(&self) -> bool {
        self.algorithms.iter().any(|algorithm| *algorithm != Algorithm::HS256)
    }
}

fn is_http(url: &str) -> bool {
    url.parse::<axum::http::Uri>().is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(change: impl FnOnce(&mut Config)) -> Result<(), (&'static str, ConfigError)> {
        let mut config = Config { mode: Some(Mode::Required), ..Config::default() };
        config.token.issuer = "https://issuer".to_owned();
        config.token.audiences = vec!["api".to_owned()];
        change(&mut config);
        config.check(false)
    }

    #[test]
    fn settings_that_accept_nobody_or_anybody_are_refused() {
        assert_eq!(checked(|_| {}), Ok(()));
        assert_eq!(checked(|config| config.token.issuer.clear()), Err(("auth.mode", ConfigError::NoWay)));
        assert_eq!(
            checked(|config| config.token.audiences.clear()),
            Err(("auth.token.audiences", ConfigError::NoAudience))
        );
        assert_eq!(
            checked(|config| config.token.issuer = "acme".to_owned()),
            Err(("auth.token.issuer", ConfigError::NotAUrl))
        );
        assert_eq!(
            checked(|config| config.token.algorithms = vec![Algorithm::HS256]),
            Err(("auth.token.secret", ConfigError::ShortSecret))
        );
        assert_eq!(
            checked(|config| config.token.secret = Secret::new("x".repeat(32))),
            Err(("auth.token.secret", ConfigError::UnusedSecret))
        );
        assert_eq!(
            checked(|config| config.bootstrap_key = Secret::new("short")),
            Err(("auth.bootstrap_key", ConfigError::ShortBootstrapKey))
        );
        assert_eq!(
            checked(|config| config.bootstrap_key = Secret::new("ä".repeat(32))),
            Err(("auth.bootstrap_key", ConfigError::UnsendableBootstrapKey))
        );
    }
}
