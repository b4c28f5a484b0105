//! Tokens (JWT) of the issuer.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm as Name, Validation, decode, errors::ErrorKind};
use postrider_identity::{Denied, Identity, Principal, Scope, check_name};
use postrider_outbound::OptionsError;
use quick_cache::sync::Cache;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use super::{
    config::TokenConfig,
    issuer_keys::IssuerKeys,
    key::{self, Hash},
    signature,
};

/// Longest token, in bytes.
const MAX_BYTES: usize = 16 << 10;
/// Number of verified tokens that are remembered, each with about a kibibyte.
const REMEMBERED: usize = 10_000;
/// Number of scopes of a token that count.
const MAX_SCOPES: usize = 100;
/// Longest lifetime of a token that counts: about a hundred years.
const MAX_LIFETIME: Duration = Duration::from_secs(1 << 32);

/// Checks tokens of the issuer.
pub struct Tokens {
    config: TokenConfig,
    keys: IssuerKeys,
    verified: Cache<Hash, Arc<Principal>>,
}

/// The part of a token's head that decides about its check.
struct Head {
    algorithm: Name,
    key_id: Option<String>,
}

impl Tokens {
    pub fn new(config: TokenConfig) -> Result<Self, OptionsError> {
        signature::install();
        Ok(Self { keys: IssuerKeys::new(&config)?, verified: Cache::new(REMEMBERED), config })
    }

    /// Keeps the issuer's keys up to date.
    pub async fn follow(&self) {
        self.keys.follow(&self.config).await
    }

    /// Returns the principal of a token; `None` if its key is unknown.
    pub fn known(&self, token: &str) -> Option<Result<Arc<Principal>, Denied>> {
        if token.len() > MAX_BYTES {
            return Some(Err(Denied::Token("it is longer than 16 KiB")));
        }
        let hash = key::hash(token);
        if let Some(principal) = self.verified.get(&hash) {
            let ended = principal.has_ended(SystemTime::now());
            return Some(if ended { Err(Denied::Expired) } else { Ok(principal) });
        }
        let head = match self.head(token) {
            Ok(head) => head,
            Err(denied) => return Some(Err(denied)),
        };
        let found = self.check(token, &head)?;
        if let Ok(principal) = &found {
            self.verified.insert(hash, principal.clone());
        }
        Some(found)
    }

    /// Like [`Self::known`], after another read of the issuer's keys.
    pub async fn verify(&self, token: &str) -> Result<Arc<Principal>, Denied> {
        self.keys.read_for_unknown().await;
        let unread = || Denied::Unavailable("the issuer's keys have not been read yet".to_owned());
        let unknown = || if self.keys.is_unread() { unread() } else { Denied::Token("its key is unknown") };
        self.known(token).unwrap_or_else(|| Err(unknown()))
    }

    /// Reads the head. The algorithm must be accepted, and nothing may be critical, since no
    /// extension is known.
    fn head(&self, token: &str) -> Result<Head, Denied> {
        const SHAPE: Denied = Denied::Token("it is neither an API key nor a JWT");
        let (head, rest) = token.split_once('.').ok_or(SHAPE)?;
        if rest.split('.').count() != 2 {
            return Err(SHAPE);
        }
        let head = BASE64_URL_SAFE_NO_PAD.decode(head).map_err(|_| SHAPE)?;
        let head: Map<String, Value> = serde_json::from_slice(&head).map_err(|_| SHAPE)?;
        if head.contains_key("crit") {
            return Err(Denied::Token("its head has `crit`"));
        }
        let named = head.get("alg").and_then(Value::as_str).and_then(|named| named.parse().ok());
        let algorithm = named.filter(|named| self.keys.accepts(*named));
        let algorithm = algorithm.ok_or(Denied::Token("its algorithm is not accepted"))?;
        let key_id = match head.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(Denied::Token("its `kid` is not a text")),
        };
        Ok(Head { algorithm, key_id })
    }

    /// Checks the signature and the claims. `None` means that there is no key for the token.
    fn check(&self, token: &str, head: &Head) -> Option<Result<Arc<Principal>, Denied>> {
        let keys = self.keys.all();
        // A key is used only with the algorithm of its kind, whatever the token says.
        let mut fitting = keys.iter().filter(|key| key.algorithm == head.algorithm).filter(|key| {
            // The shared secret has no id, and so may a single key of the issuer.
            head.key_id.is_none() || key.id.is_none() || key.id == head.key_id
        });
        let mut outcome = None;
        let validation = self.validation(head.algorithm);
        for key in &mut fitting {
            match decode::<Map<String, Value>>(token, &key.key, &validation) {
                Ok(decoded) => {
                    let principal = self.principal(&decoded.claims, key.revoked.clone());
                    return Some(principal.map(Arc::new));
                }
                Err(error) => outcome = Some(Err(denied(error.kind()))),
            }
        }
        outcome
    }

    fn validation(&self, algorithm: Name) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = self.config.leeway_seconds;
        validation.validate_nbf = true;
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&self.config.audiences);
        validation
    }

    fn principal(&self, claims: &Map<String, Value>, revoked: CancellationToken) -> Result<Principal, Denied> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let subject = text("sub").filter(|subject| check_name(subject).is_ok());
        let subject = subject.ok_or(Denied::Token("its `sub` is not 1 to 255 bytes of text"))?;
        let tenant = match claims.get(&self.config.tenant_claim) {
            None | Some(Value::Null) => None,
            Some(Value::String(tenant)) if check_name(tenant).is_ok() => Some(tenant.clone()),
            Some(_) => return Err(Denied::Token("its tenant is not 1 to 255 bytes of text")),
        };
        let expires = claims.get("exp").and_then(Value::as_f64).ok_or(Denied::Token("its `exp` is not a number"))?;
        let (closes_at, expires_at) = ends(expires, self.config.leeway_seconds);
        Ok(Principal::new(Identity {
            subject: subject.to_owned(),
            tenant,
            scopes: self.scopes(claims),
            expires_at: Some(expires_at),
            closes_at: Some(closes_at),
            key_id: None,
            revoked,
        }))
    }

    /// Returns the scopes that are postrider's. An issuer may grant others, such as `openid`.
    fn scopes(&self, claims: &Map<String, Value>) -> Vec<Scope> {
        let words: Vec<&str> = match claims.get(&self.config.scope_claim) {
            Some(Value::String(text)) => text.split_ascii_whitespace().collect(),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let mut scopes: Vec<Scope> = Vec::new();
        for scope in words.into_iter().filter_map(|word| word.parse().ok()) {
            if scopes.len() < MAX_SCOPES && !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
        scopes
    }
}

/// Returns when connections of a token end, and when it is no longer accepted. Connections end at
/// `exp`; those of a token that was past it when it came end with it.
fn ends(expires: f64, leeway_seconds: u64) -> (SystemTime, SystemTime) {
    let now = SystemTime::now();
    let latest = now + MAX_LIFETIME;
    let since = Duration::try_from_secs_f64(expires.max(0.0)).unwrap_or(Duration::MAX);
    let at = UNIX_EPOCH.checked_add(since).unwrap_or(latest).min(latest);
    let expires_at = at + Duration::from_secs(leeway_seconds);
    (if at > now { at } else { expires_at }, expires_at)
}

fn denied(kind: &ErrorKind) -> Denied {
    match kind {
        ErrorKind::ExpiredSignature => Denied::Expired,
        ErrorKind::InvalidSignature => Denied::Token("its signature does not match"),
        ErrorKind::InvalidIssuer => Denied::Token("it is from another issuer"),
        ErrorKind::InvalidAudience => Denied::Token("it is for another audience"),
        ErrorKind::ImmatureSignature => Denied::Token("it is not valid yet"),
        ErrorKind::MissingRequiredClaim(_) => Denied::Token("it lacks one of `exp`, `iss`, `aud` and `sub`"),
        ErrorKind::InvalidAlgorithm => Denied::Token("its algorithm is not accepted"),
        _ => Denied::Token("it cannot be read"),
    }
}
