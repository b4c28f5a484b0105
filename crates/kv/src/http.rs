//! HTTP routes of the key-value view.

use std::borrow::Cow;

use axum::{
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header},
    response::IntoResponse,
};
use postrider_http::{
    Bounded, Code, Problem, ProblemBody, RequestContext, body,
    context::{require_content_type, single},
    decode::{self, quoted},
    json,
    params::{self, Nothing},
    refusals::JsonWrite,
    shortcut::{self, ShortCuts},
};
use postrider_kafka::Position;
use postrider_openapi::tagged;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::service::{Lookup, Service};
use crate::codes;

static POSITION: HeaderName = HeaderName::from_static("postrider-position");
static AFTER: HeaderName = HeaderName::from_static("postrider-after");

/// Longest TTL, in seconds: ten years.
const MAX_TTL_SECONDS: u64 = 315_360_000;

/// Returns the routes with their OpenAPI descriptions.
pub fn routes(service: Service) -> OpenApiRouter {
    let head = tagged("kv", "Key-value: values that are written to Kafka and read from a view in Redis.");
    OpenApiRouter::with_openapi(head).routes(routes!(push)).routes(routes!(pull, delete)).with_state(service)
}

/// Adds a short cut for pulls, the most frequent request.
pub fn short_cuts(short_cuts: ShortCuts, service: &Service) -> ShortCuts {
    let service = service.clone();
    short_cuts.with(Method::GET, "/pull/{key}", move |mut request: Request, context| {
        let key = shortcut::parameter(request.uri().path()).to_owned();
        let headers = std::mem::take(request.headers_mut());
        let answer = pull(State(service.clone()), context, headers, Ok(Path(key)));
        async move { answer.await.unwrap_or_else(IntoResponse::into_response) }
    })
}

#[derive(Deserialize)]
struct Push<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow)]
    value: &'a RawValue,
    ttl_seconds: Option<Bounded<1, MAX_TTL_SECONDS>>,
}

/// A value to store under a key.
#[derive(ToSchema)]
#[schema(as = PushRequest, examples(json!({"key": "user123", "value": "Hello"})))]
#[expect(dead_code, reason = "describes the JSON; the handler reads a borrowed twin")]
struct PushBody {
    #[schema(min_length = 1)]
    key: String,
    /// Any JSON value; stored minified, otherwise unchanged.
    value: serde_json::Value,
    /// Seconds until the value expires.
    #[schema(minimum = 1, maximum = 315360000)]
    ttl_seconds: Option<u64>,
}

/// Response to a write.
#[derive(Serialize, ToSchema)]
#[schema(as = WriteAccepted)]
struct Accepted {
    /// Always `accepted`: Kafka has stored the write.
    status: &'static str,
}

/// A key with its value.
#[derive(ToSchema)]
#[schema(as = KeyValue)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
struct Pulled {
    key: String,
    /// Any JSON value, as it was stored.
    value: serde_json::Value,
}

/// Store a value under a key
///
/// Responds once Kafka has stored the value on all in-sync replicas. The view follows within
/// milliseconds. To read your own write, send the `Postrider-Position` of the response as
/// `Postrider-After` with the pull.
#[utoipa::path(
    post,
    path = "/push",
    operation_id = "pushValue",
    tag = "kv",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry write the same event")),
    request_body = PushBody,
    responses(
        (status = 202, description = "Stored", body = Accepted, headers(("Postrider-Position" = String, description = "Position of the write, such as `messages/3@1234`"))),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "Invalid field", body = ProblemBody, content_type = "application/problem+json"),
        JsonWrite,
    ),
)]
async fn push(
    State(service): State<Service>,
    context: RequestContext,
    request: Request,
) -> Result<Response<Body>, Problem> {
    require_content_type(request.headers(), &["application/json"])?;
    let body = body::read(request, service.inner.http.limits()).await?;
    let push: Push<'_> = decode::object(&body)?;
    service.check_key(&push.key).map_err(|problem| problem.at_field("key"))?;
    let value = json::minify(push.value.get());
    let ttl_seconds = push.ttl_seconds.map(Bounded::get);
    let position = service.write(&context, "/push", &push.key, Some(value.as_bytes()), ttl_seconds).await?;
    Ok(accepted(&position))
}

/// Read the value of a key
#[utoipa::path(
    get,
    path = "/pull/{key}",
    operation_id = "pullValue",
    tag = "kv",
    params(
        ("key" = String, Path, min_length = 1, description = "Percent-encoded if needed"),
        ("Postrider-After" = Option<String>, Header, nullable = false, pattern = r"^[^/@]+/[0-9]+@[0-9]+(\.[0-9]+)?$", description = "A `Postrider-Position`: waits up to 5 s until that write is visible"),
    ),
    responses(
        (status = 200, description = "The value", body = Pulled),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "Invalid key", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "The view is incomplete or cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
        (status = 504, description = "The awaited write is not visible yet", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn pull(
    State(service): State<Service>,
    context: RequestContext,
    headers: HeaderMap,
    key: Result<Path<String>, PathRejection>,
) -> Result<Response<Body>, Problem> {
    let key = service.path_key(key)?;
    if let Some(after) = single(&headers, &AFTER, "Postrider-After")? {
        service.await_visible(&parse_position(after)?).await?;
    }
    let found = match service.look_up(&key).await? {
        Lookup::Incomplete(detail) => return Err(Problem::new(Code::REBUILDING, detail)),
        Lookup::Absent => None,
        Lookup::Found(value) => Some(value),
    };
    service.inner.audit.read(&context, &key, found.is_some()).await?;
    let Some(value) = found else {
        return Err(Problem::new(codes::KEY_NOT_FOUND, format!("key `{key}` has no value")));
    };
    let mut body = Vec::with_capacity(value.len() + key.len() + 24);
    body.extend_from_slice(br#"{"key":"#);
    json::write_string(&mut body, &key);
    body.extend_from_slice(br#","value":"#);
    body.extend_from_slice(&value);
    body.push(b'}');
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Delete a key
///
/// Takes neither parameters nor a body.
#[utoipa::path(
    delete,
    path = "/pull/{key}",
    operation_id = "deleteValue",
    tag = "kv",
    params(
        ("key" = String, Path, min_length = 1, description = "Percent-encoded if needed"),
        ("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry write the same event"),
    ),
    responses(
        (status = 202, description = "The tombstone is stored", body = Accepted, headers(("Postrider-Position" = String, description = "Position of the write, such as `messages/3@1234`"))),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "Invalid key", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Refused, or outcome unknown", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn delete(
    State(service): State<Service>,
    context: RequestContext,
    key: Result<Path<String>, PathRejection>,
    _: Nothing,
) -> Result<Response<Body>, Problem> {
    let key = service.path_key(key)?;
    let position = service.write(&context, "/pull", &key, None, None).await?;
    Ok(accepted(&position))
}

fn accepted(position: &Position) -> Response<Body> {
    let mut response = Response::new(Body::from(r#"{"status":"accepted"}"#));
    *response.status_mut() = StatusCode::ACCEPTED;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(position) = HeaderValue::try_from(position.to_string()) {
        headers.insert(POSITION.clone(), position);
    }
    response
}

fn parse_position(header: &HeaderValue) -> Result<Position, Problem> {
    let parsed = header.to_str().ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| {
        let found = quoted(&String::from_utf8_lossy(header.as_bytes()));
        let detail = format!("`Postrider-After` must be a position such as `messages/3@1234` (got {found})");
        Problem::new(Code::INVALID_REQUEST, detail).at_header("Postrider-After")
    })
}

impl Service {
    fn path_key(&self, key: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
        let key = params::from_path("key", key)?;
        self.check_key(&key).map_err(|problem| problem.at_parameter("key"))?;
        Ok(key)
    }

    fn check_key(&self, key: &str) -> Result<(), Problem> {
        let limit = self.inner.config.max_key_bytes;
        match key.len() {
            0 => Err(Problem::new(Code::INVALID_REQUEST, "`key` must not be empty")),
            length if length > limit => {
                Err(Problem::new(Code::INVALID_FIELD, format!("`key` must have at most {limit} bytes (got {length})")))
            }
            _ => Ok(()),
        }
    }
}
