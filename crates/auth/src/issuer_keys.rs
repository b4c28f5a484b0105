//! The keys of the issuer of tokens: from its JWKS, from a file, or a shared secret.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::http::HeaderMap;
use jsonwebtoken::{
    Algorithm as Name, DecodingKey,
    jwk::{AlgorithmParameters, Jwk, JwkSet, PublicKeyUse},
};
use metrics::{counter, gauge};
use parking_lot::Mutex;
use postrider_outbound::{Client, Endpoint, EndpointError, Guard, Options, OptionsError};
use serde::Deserialize;
use tokio::sync::{Mutex as AsyncMutex, Notify};

use super::config::{Algorithm, TokenConfig};

/// Shortest time between two reads that tokens with unknown keys cause.
const LEAST_INTERVAL: Duration = Duration::from_secs(30);
/// Interval of retries until the first read succeeds.
const RETRY: Duration = Duration::from_secs(1);
/// Interval at which a file is looked at.
const FILE_LOOK: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest JWKS, in bytes.
const MAX_BYTES: usize = 256 << 10;

/// A key with the algorithm that its signatures must have.
pub struct IssuerKey {
    pub id: Option<String>,
    pub algorithm: Name,
    pub key: DecodingKey,
}

/// The keys of the issuer that this process knows.
pub struct IssuerKeys {
    source: Source,
    refresh: Duration,
    accepted: Vec<Name>,
    keys: ArcSwap<Vec<IssuerKey>>,
    /// Time of the last read that a token caused.
    asked: Mutex<Option<Instant>>,
    reading: AsyncMutex<()>,
    read: Notify,
}

enum Source {
    /// Only the shared secret.
    Secret,
    File(String),
    Url(Client, String),
    /// The issuer's discovery document names the URL.
    Discovery(Client, String),
}

/// Reasons why keys cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{0}")]
    File(#[from] std::io::Error),
    #[error("{0}")]
    Url(#[from] EndpointError),
    #[error("{0}")]
    Request(String),
    #[error("not a JWKS: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the JWKS has no key for an accepted algorithm")]
    NoKeys,
    #[error("the issuer calls itself `{0}`")]
    OtherIssuer(String),
}

#[derive(Deserialize)]
struct Discovered {
    issuer: String,
    jwks_uri: String,
}

/// A set of keys of which some may be of kinds that this version does not know.
#[derive(Deserialize)]
struct Loose {
    keys: Vec<serde_json::Value>,
}

impl IssuerKeys {
    pub fn new(config: &TokenConfig) -> Result<Self, OptionsError> {
        let source = if !config.jwks_file.is_empty() {
            Source::File(config.jwks_file.clone())
        } else if !config.needs_public_keys() {
            Source::Secret
        } else if config.jwks_url.is_empty() {
            let issuer = config.issuer.trim_end_matches('/');
            Source::Discovery(client()?, format!("{issuer}/.well-known/openid-configuration"))
        } else {
            Source::Url(client()?, config.jwks_url.expose().to_owned())
        };
        let mut keys = Vec::new();
        if !config.secret.is_empty() {
            keys.push(shared(config));
        }
        Ok(Self {
            source,
            refresh: Duration::from_secs(config.refresh_seconds),
            accepted: config.algorithms.iter().map(|algorithm| algorithm.name()).collect(),
            keys: ArcSwap::from_pointee(keys),
            asked: Mutex::new(None),
            reading: AsyncMutex::new(()),
            read: Notify::new(),
        })
    }

    /// Returns the keys that are known.
    pub fn all(&self) -> Arc<Vec<IssuerKey>> {
        self.keys.load_full()
    }

    /// Returns whether no keys have been read yet.
    pub fn is_unread(&self) -> bool {
        !matches!(self.source, Source::Secret) && self.keys.load().iter().all(|key| key.algorithm == Name::HS256)
    }

    /// Reads the keys again and again. While that fails, the known ones stay.
    pub async fn follow(&self, config: &TokenConfig) {
        if matches!(self.source, Source::Secret) {
            return std::future::pending().await;
        }
        loop {
            let outcome = {
                let _reading = self.reading.lock().await;
                self.read(config).await
            };
            let wait = match (&outcome, &self.source) {
                (_, Source::File(_)) => FILE_LOOK,
                (Ok(()), _) => self.refresh,
                (Err(_), _) if self.is_unread() => RETRY,
                (Err(_), _) => self.refresh.min(LEAST_INTERVAL),
            };
            let _ = tokio::time::timeout(wait, self.read.notified()).await;
        }
    }

    /// Reads the keys because a token has an unknown one, unless that happened within the last 30 s.
    pub async fn read_for_unknown(&self, config: &TokenConfig) {
        if matches!(self.source, Source::Secret) {
            return;
        }
        let before = self.keys.load_full();
        let _reading = self.reading.lock().await;
        // Another request has read them meanwhile.
        if !Arc::ptr_eq(&before, &self.keys.load_full()) {
            return;
        }
        // Until there are keys, reads are repeated sooner, and do not count.
        let (was_unread, interval) = if self.is_unread() { (true, RETRY) } else { (false, LEAST_INTERVAL) };
        let is_due = {
            let mut asked = self.asked.lock();
            let is_due = asked.is_none_or(|asked| asked.elapsed() >= interval);
            if is_due {
                *asked = Some(Instant::now());
            }
            is_due
        };
        if is_due && self.read(config).await.is_ok() && was_unread {
            *self.asked.lock() = None;
        }
    }

    async fn read(&self, config: &TokenConfig) -> Result<(), ReadError> {
        let outcome = self.fetch(config).await.and_then(|text| self.parse(&text));
        counter!("postrider_auth_issuer_reads_total", "outcome" => if outcome.is_ok() { "ok" } else { "failed" })
            .increment(1);
        match outcome {
            Ok(mut keys) => {
                if !config.secret.is_empty() {
                    keys.push(shared(config));
                }
                gauge!("postrider_auth_issuer_keys").set(keys.len() as f64);
                self.keys.store(Arc::new(keys));
                Ok(())
            }
            Err(error) => {
                let known = self.keys.load().len();
                let detail = config.jwks_url.mask_in(&error.to_string());
                tracing::warn!(error = detail, known, "keys of the issuer not read, the known ones stay");
                Err(error)
            }
        }
    }

    async fn fetch(&self, config: &TokenConfig) -> Result<Vec<u8>, ReadError> {
        match &self.source {
            Source::Secret => Ok(br#"{"keys":[]}"#.to_vec()),
            Source::File(path) => Ok(tokio::fs::read(path).await?),
            Source::Url(client, url) => get(client, url).await,
            Source::Discovery(client, url) => {
                let found: Discovered = serde_json::from_slice(&get(client, url).await?)?;
                if found.issuer != config.issuer {
                    return Err(ReadError::OtherIssuer(found.issuer));
                }
                get(client, &found.jwks_uri).await
            }
        }
    }

    /// Returns the keys that verify accepted algorithms; others are left out.
    fn parse(&self, text: &[u8]) -> Result<Vec<IssuerKey>, ReadError> {
        let loose: Loose = serde_json::from_slice(text)?;
        let known = loose.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
        let set = JwkSet { keys: known.collect() };
        let keys: Vec<IssuerKey> = set.keys.iter().filter_map(|key| self.usable(key)).collect();
        if keys.is_empty() { Err(ReadError::NoKeys) } else { Ok(keys) }
    }

    fn usable(&self, jwk: &Jwk) -> Option<IssuerKey> {
        if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
            return None;
        }
        // The kind of the key decides, never the token. A shared secret is no public key: whoever
        // reads it could sign.
        let algorithm = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Name::RS256,
            AlgorithmParameters::EllipticCurve(_) => Name::ES256,
            AlgorithmParameters::OctetKeyPair(_) => Name::EdDSA,
            AlgorithmParameters::OctetKey(_) => return None,
        };
        let declared = jwk.common.key_algorithm.map(|declared| declared.to_string());
        let fits = declared.is_none_or(|declared| declared == format!("{algorithm:?}"));
        if !fits || !self.accepted.contains(&algorithm) {
            return None;
        }
        Some(IssuerKey { id: jwk.common.key_id.clone(), algorithm, key: DecodingKey::from_jwk(jwk).ok()? })
    }
}

fn shared(config: &TokenConfig) -> IssuerKey {
    let key = DecodingKey::from_secret(config.secret.expose().as_bytes());
    IssuerKey { id: None, algorithm: Name::HS256, key }
}

fn client() -> Result<Client, OptionsError> {
    Client::new(&Options {
        // The issuer is configured by the operator, and often inside the network.
        guard: Guard::open(),
        timeout: TIMEOUT,
        max_idle: 1,
        max_retry_after: LEAST_INTERVAL,
        ca_file: None,
    })
}

async fn get(client: &Client, url: &str) -> Result<Vec<u8>, ReadError> {
    let endpoint = Endpoint::new(url, HeaderMap::new())?;
    client.get(&endpoint, MAX_BYTES).await.map_err(|failure| ReadError::Request(failure.message))
}

impl Algorithm {
    pub(super) fn name(self) -> Name {
        match self {
            Self::RS256 => Name::RS256,
            Self::ES256 => Name::ES256,
            Self::EdDSA => Name::EdDSA,
            Self::HS256 => Name::HS256,
        }
    }
}
