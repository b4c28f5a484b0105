//! The keys of the issuer of tokens: from its JWKS, from a file, or a shared secret.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::http::HeaderMap;
use jsonwebtoken::{
    Algorithm as Name, DecodingKey,
    jwk::{AlgorithmParameters, Jwk, PublicKeyUse},
};
use metrics::{counter, gauge};
use parking_lot::Mutex;
use postrider_outbound::{Client, Endpoint, EndpointError, Guard, Options, OptionsError};
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    config::{Algorithm, TokenConfig},
    key::{Hash, hash},
};

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
#[derive(Clone)]
pub struct IssuerKey {
    pub id: Option<String>,
    pub algorithm: Name,
    pub key: DecodingKey,
    /// Distinguishes the key from others.
    fingerprint: Hash,
    /// Cancelled when the issuer no longer has the key.
    pub revoked: CancellationToken,
}

/// A read that a token caused.
#[derive(Clone, Copy)]
struct Asked {
    at: Instant,
    /// Number of reads that have ended when it has.
    until: u64,
}

/// The keys of the issuer that this process knows.
pub struct IssuerKeys {
    /// `None` if there is only the shared secret.
    source: Option<Source>,
    refresh: Duration,
    accepted: Vec<Name>,
    keys: ArcSwap<Vec<IssuerKey>>,
    /// The last read that a token caused.
    asked: Mutex<Option<Asked>>,
    reading: AtomicBool,
    wanted: Notify,
    /// Number of reads that have ended.
    reads: watch::Sender<u64>,
}

enum Source {
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
    #[error("the discovery document came over https and names a JWKS without it")]
    Downgrade,
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
            Some(Source::File(config.jwks_file.clone()))
        } else if !config.needs_public_keys() {
            None
        } else if config.jwks_url.is_empty() {
            let issuer = config.issuer.trim_end_matches('/');
            Some(Source::Discovery(client()?, format!("{issuer}/.well-known/openid-configuration")))
        } else {
            Some(Source::Url(client()?, config.jwks_url.expose().to_owned()))
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
            reading: AtomicBool::new(false),
            wanted: Notify::new(),
            reads: watch::Sender::new(0),
        })
    }

    /// Returns the keys that are known.
    pub fn all(&self) -> Arc<Vec<IssuerKey>> {
        self.keys.load_full()
    }

    /// Returns whether tokens with this algorithm are accepted.
    pub fn accepts(&self, algorithm: Name) -> bool {
        self.accepted.contains(&algorithm)
    }

    /// Returns whether no keys have been read yet.
    pub fn is_unread(&self) -> bool {
        self.source.is_some() && self.keys.load().iter().all(|key| key.algorithm == Name::HS256)
    }

    /// Reads the keys again and again, and for tokens with unknown keys. While that fails, the known
    /// ones stay.
    pub async fn follow(&self, config: &TokenConfig) {
        let Some(source) = &self.source else { return std::future::pending().await };
        loop {
            self.reading.store(true, Ordering::SeqCst);
            let outcome = self.read(source, config).await;
            self.reading.store(false, Ordering::SeqCst);
            self.reads.send_modify(|reads| *reads += 1);
            let wait = match (&outcome, source) {
                (_, Source::File(_)) => FILE_LOOK,
                (Ok(()), _) => self.refresh,
                (Err(_), _) if self.is_unread() => RETRY,
                (Err(_), _) => self.refresh.min(LEAST_INTERVAL),
            };
            let _ = tokio::time::timeout(wait, self.wanted.notified()).await;
        }
    }

    /// Waits until the keys have been read because a token has an unknown one, unless that happened
    /// within the last 30 s. The read goes on if the caller does not wait for it.
    pub async fn read_for_unknown(&self) {
        if self.source.is_none() {
            return;
        }
        let mut reads = self.reads.subscribe();
        let until = {
            let mut asked = self.asked.lock();
            let ended = *reads.borrow_and_update();
            // Until there are keys, reads are repeated sooner.
            let interval = if self.is_unread() { RETRY } else { LEAST_INTERVAL };
            match *asked {
                Some(Asked { at, until }) if at.elapsed() < interval => {
                    // Others wait for that read too, while it lasts.
                    if ended >= until {
                        return;
                    }
                    until
                }
                _ => {
                    // A read that has begun may have missed the key.
                    let until = ended + 1 + u64::from(self.reading.load(Ordering::SeqCst));
                    *asked = Some(Asked { at: Instant::now(), until });
                    self.wanted.notify_one();
                    until
                }
            }
        };
        let _ = tokio::time::timeout(TIMEOUT, reads.wait_for(|reads| *reads >= until)).await;
    }

    async fn read(&self, source: &Source, config: &TokenConfig) -> Result<(), ReadError> {
        let outcome = fetch(source, config).await.and_then(|text| self.parse(&text));
        counter!("postrider_auth_issuer_reads_total", "outcome" => if outcome.is_ok() { "ok" } else { "failed" })
            .increment(1);
        match outcome {
            Ok(keys) => {
                self.replace(keys);
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

    /// Uses these keys. Tokens of those that are gone are no longer accepted.
    fn replace(&self, mut keys: Vec<IssuerKey>) {
        let before = self.keys.load_full();
        for key in &mut keys {
            if let Some(same) = before.iter().find(|known| known.fingerprint == key.fingerprint) {
                key.revoked = same.revoked.clone();
            }
        }
        keys.extend(before.iter().filter(|key| key.algorithm == Name::HS256).cloned());
        gauge!("postrider_auth_issuer_keys").set(keys.len() as f64);
        let gone = before.iter().filter(|key| keys.iter().all(|kept| kept.fingerprint != key.fingerprint));
        let gone: Vec<CancellationToken> = gone.map(|key| key.revoked.clone()).collect();
        let is_first = self.is_unread();
        self.keys.store(Arc::new(keys));
        if is_first {
            // Reads before the first that succeeds do not count.
            *self.asked.lock() = None;
        }
        gone.iter().for_each(CancellationToken::cancel);
    }

    /// Returns the keys that verify accepted algorithms; others are left out.
    fn parse(&self, text: &[u8]) -> Result<Vec<IssuerKey>, ReadError> {
        let loose: Loose = serde_json::from_slice(text)?;
        let known = loose.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
        let keys: Vec<IssuerKey> = known.filter_map(|key| self.usable(&key)).collect();
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
        let declared = jwk.common.key_algorithm.map(|declared| declared.to_string().parse().ok());
        let fits = declared.is_none_or(|declared| declared == Some(algorithm));
        if !fits || !self.accepts(algorithm) {
            return None;
        }
        let fingerprint = hash(&serde_json::to_string(jwk).ok()?);
        let (id, key) = (jwk.common.key_id.clone(), DecodingKey::from_jwk(jwk).ok()?);
        Some(IssuerKey { id, algorithm, key, fingerprint, revoked: CancellationToken::new() })
    }
}

/// Reads the document with the keys.
async fn fetch(source: &Source, config: &TokenConfig) -> Result<Vec<u8>, ReadError> {
    match source {
        Source::File(path) => Ok(tokio::fs::read(path).await?),
        Source::Url(client, url) => get(client, url).await,
        Source::Discovery(client, url) => {
            let found: Discovered = serde_json::from_slice(&get(client, url).await?)?;
            if found.issuer != config.issuer {
                return Err(ReadError::OtherIssuer(found.issuer));
            }
            if url.starts_with("https:") && !found.jwks_uri.starts_with("https:") {
                return Err(ReadError::Downgrade);
            }
            get(client, &found.jwks_uri).await
        }
    }
}

fn shared(config: &TokenConfig) -> IssuerKey {
    let key = DecodingKey::from_secret(config.secret.expose().as_bytes());
    let (fingerprint, revoked) = (hash("shared secret"), CancellationToken::new());
    IssuerKey { id: None, algorithm: Name::HS256, key, fingerprint, revoked }
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
