//! Context of a request: its id, its trace, and its idempotency key.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts},
};
use postrider_identity::Principal;
use postrider_kafka::event;
use postrider_telemetry::trace_context::TraceContext;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{code::Code, problem::Problem};

pub static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Longest request id or idempotency key, in bytes.
const MAX_ID_BYTES: usize = 255;

/// Namespace of the event ids derived from idempotency keys.
const EVENT_NAMESPACE: Uuid = Uuid::from_u128(0x6f1c_70f2_5d1b_5c0e_9a40_7e3a_1d2b_9c55);

/// Context of a request. The outer layer creates it, and handlers take it as an extractor.
#[derive(Debug, Clone)]
pub struct RequestContext {
    pub request_id: HeaderValue,
    /// Span of the server in the caller's trace, or in a new one.
    pub trace: TraceContext,
    /// Parent of `trace`, if the caller sent one.
    pub parent: Option<TraceContext>,
    /// Address of the client.
    pub client: Option<IpAddr>,
    /// Sender of the request; the gate sets it.
    pub principal: Arc<Principal>,
    idempotency_key: Option<HeaderValue>,
    /// True if there is more than one idempotency key.
    has_several_keys: bool,
}

impl RequestContext {
    pub fn new(headers: &HeaderMap, principal: Arc<Principal>) -> Self {
        let mut keys = headers.get_all(&IDEMPOTENCY_KEY).iter();
        let parent = headers.get(&TRACEPARENT).and_then(|value| TraceContext::parse(value.as_bytes()));
        let request_id = headers
            .get(&REQUEST_ID)
            .filter(|id| !id.is_empty() && id.len() <= MAX_ID_BYTES && id.to_str().is_ok())
            .cloned()
            .unwrap_or_else(new_request_id);
        Self {
            request_id,
            trace: parent.map_or_else(TraceContext::root, TraceContext::child),
            parent,
            client: None,
            principal,
            idempotency_key: keys.next().cloned(),
            has_several_keys: keys.next().is_some(),
        }
    }

    /// Rejects a key that no event id can be derived from, before any part of the request is
    /// written.
    pub fn check_idempotency_key(&self) -> Result<(), Problem> {
        match &self.idempotency_key {
            Some(_) if self.has_several_keys => Err(repeated("Idempotency-Key")),
            Some(key) if key.is_empty() || key.len() > MAX_ID_BYTES => {
                let detail = format!("`Idempotency-Key` must have 1 to {MAX_ID_BYTES} bytes (got {})", key.len());
                Err(Problem::new(Code::INVALID_REQUEST, detail).at_header("Idempotency-Key"))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether a retry of this request can be recognized.
    pub fn has_idempotency_key(&self) -> bool {
        self.idempotency_key.is_some()
    }

    /// Returns the id of the event that this request writes. With an idempotency key it is derived
    /// from the key, the principal, the route and the content: a retry writes the same event, and
    /// different requests with the same key write different events. Without a key it is new.
    ///
    /// `part` distinguishes the records of one request. `content` is the content of the request:
    /// the body, and the values in the path and the query.
    pub fn event_id(&self, route: &str, part: Option<u64>, content: &[&[u8]]) -> Result<Uuid, Problem> {
        self.check_idempotency_key()?;
        let Some(key) = &self.idempotency_key else { return Ok(event::new_id()) };
        let mut name = Vec::with_capacity(128);
        for piece in [self.principal.id().as_bytes(), route.as_bytes(), key.as_bytes()] {
            name.extend_from_slice(piece);
            name.push(0);
        }
        if let Some(part) = part {
            name.extend_from_slice(&part.to_be_bytes());
        }
        name.extend_from_slice(&digest(content));
        Ok(Uuid::new_v5(&EVENT_NAMESPACE, &name))
    }
}

/// Returns the SHA-256 of several pieces. Each is hashed with its length, so that the same bytes
/// split differently give a different digest.
pub fn digest(pieces: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for piece in pieces {
        hash.update((piece.len() as u64).to_be_bytes());
        hash.update(piece);
    }
    hash.finalize().into()
}

fn new_request_id() -> HeaderValue {
    let mut text = [0_u8; 32];
    Uuid::from_u128(fastrand::u128(..)).simple().encode_lower(&mut text);
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("none"))
}

impl<S: Sync> FromRequestParts<S> for RequestContext {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // Never made up: without the layer it is not known who sends the request.
        let missing = || Problem::new(Code::INTERNAL, "the request has no context");
        parts.extensions.get::<Self>().cloned().ok_or_else(missing)
    }
}

/// Returns the value of a header that may be given once; 400 if it is given more often. `name` is
/// its name as documented.
pub fn single<'h>(
    headers: &'h HeaderMap,
    header: &HeaderName,
    name: &'static str,
) -> Result<Option<&'h HeaderValue>, Problem> {
    let mut values = headers.get_all(header).iter();
    match (values.next(), values.next()) {
        (_, Some(_)) => Err(repeated(name)),
        (value, None) => Ok(value),
    }
}

#[cold]
fn repeated(name: &'static str) -> Problem {
    Problem::new(Code::INVALID_REQUEST, format!("`{name}` must be given only once")).at_header(name)
}

/// Content type that HTTP clients, such as curl with `-d`, send if the caller gives none. The
/// services before postrider ignored it, so such a body counts as the first type that the route
/// accepts.
const CLIENT_DEFAULT: &str = "application/x-www-form-urlencoded";

/// Returns the content type if it is one of `accepted`, and 415 otherwise; a missing one counts as
/// the first.
pub fn require_content_type(headers: &HeaderMap, accepted: &[&'static str]) -> Result<&'static str, Problem> {
    let fallback = accepted.first().copied().unwrap_or("application/json");
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(fallback) };
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case(CLIENT_DEFAULT) {
        return Ok(fallback);
    }
    accepted.iter().copied().find(|known| essence.eq_ignore_ascii_case(known)).ok_or_else(|| {
        Problem::new(
            Code::UNSUPPORTED_MEDIA_TYPE,
            format!("content type `{essence}` is not supported; send {}", accepted.join(" or ")),
        )
        .at_header("Content-Type")
    })
}

/// Refuses every content type but JSON, also a missing one. Stricter than [`require_content_type`],
/// for routes of operators: a form on another site's page cannot send such a request.
pub fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let detail = "`Content-Type` must be `application/json`";
    Err(Problem::new(Code::UNSUPPORTED_MEDIA_TYPE, detail).at_header("Content-Type"))
}

#[cfg(test)]
mod tests {
    use postrider_identity::Identity;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn with(name: &'static str, value: &'static str) -> RequestContext {
        with_principal(name, value, Principal::anonymous())
    }

    fn with_principal(name: &'static str, value: &'static str, principal: Arc<Principal>) -> RequestContext {
        let headers = HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
        RequestContext::new(&headers, principal)
    }

    fn subject(subject: &str, tenant: Option<&str>) -> Arc<Principal> {
        Arc::new(Principal::new(Identity {
            subject: subject.to_owned(),
            tenant: tenant.map(str::to_owned),
            scopes: Vec::new(),
            expires_at: None,
            closes_at: None,
            key_id: None,
            revoked: CancellationToken::new(),
        }))
    }

    #[test]
    fn the_event_id_is_a_function_of_principal_route_key_and_content() {
        let context = with("idempotency-key", "k1");
        let id = context.event_id("/push", None, &[b"ab", b"c"]).unwrap();
        assert_eq!(id, context.event_id("/push", None, &[b"ab", b"c"]).unwrap());
        assert_eq!(id.get_version_num(), 5);
        for (route, part, content) in
            [("/produce", None, [&b"ab"[..], b"c"]), ("/push", Some(0), [b"ab", b"c"]), ("/push", None, [b"a", b"bc"])]
        {
            assert_ne!(id, context.event_id(route, part, &content).unwrap());
        }
        let mut ids = vec![id];
        for principal in [subject("anonymous", None), subject("b", None), subject("b", Some("t")), subject("tb", None)]
        {
            ids.push(
                with_principal("idempotency-key", "k1", principal).event_id("/push", None, &[b"ab", b"c"]).unwrap(),
            );
        }
        ids.dedup();
        assert_eq!(ids.len(), 5, "{ids:?}");
        assert_ne!(id, with("idempotency-key", "k2").event_id("/push", None, &[b"ab", b"c"]).unwrap());
        let keyless = with("host", "k1");
        assert_ne!(keyless.event_id("b", None, &[]).unwrap(), keyless.event_id("b", None, &[]).unwrap());
        assert!(with("idempotency-key", "").event_id("b", None, &[]).is_err());
    }

    #[test]
    fn a_header_that_is_given_twice_is_refused() {
        let mut headers = HeaderMap::new();
        assert_eq!(single(&headers, &IDEMPOTENCY_KEY, "Idempotency-Key").unwrap(), None);
        for value in ["a", "a"] {
            headers.append(&IDEMPOTENCY_KEY, HeaderValue::from_static(value));
        }
        let problem = single(&headers, &IDEMPOTENCY_KEY, "Idempotency-Key").unwrap_err();
        assert_eq!(problem.extensions["errors"][0]["header"], "Idempotency-Key");
        let same = RequestContext::new(&headers, Principal::anonymous()).check_idempotency_key().unwrap_err();
        assert_eq!(
            (same.detail, problem.detail.as_str()),
            (problem.detail.clone(), "`Idempotency-Key` must be given only once")
        );
    }

    #[test]
    fn a_request_id_is_honoured_or_made() {
        assert_eq!(with("x-request-id", "abc").request_id, "abc");
        assert_eq!(with("host", "abc").request_id.len(), 32);
    }
}
