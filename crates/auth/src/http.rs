//! HTTP routes: tickets for browsers, and API keys for operators.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};
use postrider_http::{
    Bounded, Code, Params, Problem, ProblemBody, RequestContext,
    body::{self, Limits},
    context::require_json,
    decode, params,
    params::Nothing,
    refusals::{JsonBody, PostgresRead},
};
use postrider_identity::Principal;
use postrider_openapi::tagged;
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    codes,
    grant::{Grant, GrantError, parse_expiry},
    key::NewKey,
    keys::Keys,
    store::KeyRow,
    ticket::{LIFETIME, Tickets},
};

const DEFAULT_LIMIT: u64 = 100;
const MAX_LIMIT: u64 = 1_000;

/// Returns the route for tickets.
pub fn ticket_routes(tickets: Tickets) -> OpenApiRouter {
    let head = tagged("auth", "Credentials.");
    OpenApiRouter::with_openapi(head).routes(routes!(issue)).with_state(tickets)
}

/// A ticket.
#[derive(Serialize, ToSchema)]
struct Ticket {
    /// Value of the parameter `ticket`; accepted once.
    ticket: String,
    /// Seconds for which it is accepted.
    expires_in: u64,
}

/// Get a ticket for a WebSocket or an event stream
///
/// Browsers cannot set headers on WebSockets and event streams. They send `?ticket=` with this
/// value instead. A ticket stands for the credential of this request: it has the same scopes and
/// subject, is accepted once, within 30 s, and the connection ends when the credential does.
#[utoipa::path(
    post,
    path = "/auth/ticket",
    operation_id = "createTicket",
    tag = "auth",
    responses(
        (status = 200, description = "The ticket", body = Ticket),
        (status = 400, description = "The request has parameters or a body", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Redis cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn issue(State(tickets): State<Tickets>, context: RequestContext, _: Nothing) -> Result<Json<Ticket>, Problem> {
    let ticket = tickets.issue(&context.principal).await;
    let ticket = ticket.map_err(|error| Problem::new(Code::REDIS_UNAVAILABLE, error.to_string()))?;
    Ok(Json(Ticket { ticket, expires_in: LIFETIME.as_secs() }))
}

#[derive(Clone)]
struct Desk {
    keys: Option<Arc<Keys>>,
    limits: Limits,
}

/// Returns the routes for API keys. `keys` is `None` without Postgres.
pub fn key_routes(keys: Option<Arc<Keys>>, limits: Limits) -> OpenApiRouter {
    let head = tagged("keys", "API keys: made once, shown once, and revoked everywhere within seconds.");
    OpenApiRouter::with_openapi(head)
        .routes(routes!(list, create))
        .routes(routes!(show, revoke))
        .with_state(Desk { keys, limits })
}

/// An API key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct ApiKey {
    pub id: String,
    /// For whom its requests act.
    pub subject: String,
    #[schema(required = true)]
    pub tenant: Option<String>,
    pub scopes: Vec<String>,
    pub note: String,
    #[schema(format = DateTime)]
    pub created_at: String,
    /// Null: it does not expire.
    #[schema(required = true, format = DateTime)]
    pub expires_at: Option<String>,
    /// Null: it is not revoked.
    #[schema(required = true, format = DateTime)]
    pub revoked_at: Option<String>,
}

impl From<KeyRow> for ApiKey {
    fn from(row: KeyRow) -> Self {
        Self {
            id: row.id,
            subject: row.subject,
            tenant: row.tenant,
            scopes: row.scopes,
            note: row.note,
            created_at: clock::rfc3339(row.created_ms),
            expires_at: row.expires_ms.map(clock::rfc3339),
            revoked_at: row.revoked_ms.map(clock::rfc3339),
        }
    }
}

/// A page of API keys.
#[derive(Serialize, ToSchema)]
struct ApiKeyPage {
    keys: Vec<ApiKey>,
    /// Value of `cursor` for the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListParams {
    /// `next_cursor` of the previous page.
    cursor: Option<String>,
    /// Maximum number of keys; default 100.
    #[param(value_type = Option<u64>, minimum = 1, maximum = 1000)]
    limit: Option<Bounded<1, MAX_LIMIT>>,
}

/// List API keys
///
/// In the order of their ids, also those that are revoked or expired.
#[utoipa::path(
    get,
    path = "/admin/keys",
    operation_id = "listApiKeys",
    tag = "keys",
    params(ListParams),
    responses(
        (status = 200, description = "A page", body = ApiKeyPage),
        (status = 422, description = "The limit is out of range", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
async fn list(State(desk): State<Desk>, Params(params): Params<ListParams>) -> Result<Json<ApiKeyPage>, Problem> {
    let limit = params.limit.map_or(DEFAULT_LIMIT, Bounded::get) as u16;
    let after = params.cursor.unwrap_or_default();
    if after.contains('\0') {
        let detail = "`cursor` must be the `next_cursor` of a page";
        return Err(Problem::new(Code::INVALID_REQUEST, detail).at_parameter("cursor"));
    }
    let found = desk.keys()?.store().list(&after, limit + 1).await;
    let mut rows = found.map_err(Problem::postgres_unavailable)?;
    let more = rows.len() > usize::from(limit);
    rows.truncate(usize::from(limit));
    let next_cursor = rows.last().filter(|_| more).map(|row| row.id.clone());
    Ok(Json(ApiKeyPage { keys: rows.into_iter().map(ApiKey::from).collect(), next_cursor }))
}

/// An API key to make.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(examples(json!({"scopes": ["kv:read", "topic:write:orders.*"], "note": "checkout", "expires": "30d"})))]
struct NewApiKey {
    /// Permissions of the key, such as `kv:read` or `topic:write:orders.*`.
    #[schema(min_items = 1, max_items = 100)]
    scopes: Vec<String>,
    /// For whom its requests act; the key's id by default.
    #[schema(min_length = 1, max_length = 255)]
    subject: Option<String>,
    /// Fills in `{tenant}` in its scopes.
    #[schema(min_length = 1, max_length = 255)]
    tenant: Option<String>,
    /// A text for operators.
    #[serde(default)]
    #[schema(max_length = 1000)]
    note: String,
    /// An RFC 3339 time, or a span such as `12h` or `30d`. Without it the key does not expire.
    expires: Option<String>,
}

/// An API key that was just made.
#[derive(Serialize, ToSchema)]
struct CreatedApiKey {
    /// The key itself. It is shown only here.
    key: String,
    #[serde(flatten)]
    shown: ApiKey,
}

/// Make an API key
///
/// Every process accepts it at once. A caller cannot grant more than all scopes; who may make keys
/// may do everything.
#[utoipa::path(
    post,
    path = "/admin/keys",
    operation_id = "createApiKey",
    tag = "keys",
    request_body = NewApiKey,
    responses(
        (status = 201, description = "The key, which is shown only here", body = CreatedApiKey),
        (status = 400, description = "Malformed, or with an unknown field", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "A field breaks a rule", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
        JsonBody,
    ),
)]
async fn create(
    State(desk): State<Desk>,
    context: RequestContext,
    request: Request,
) -> Result<(StatusCode, Json<CreatedApiKey>), Problem> {
    require_json(request.headers())?;
    let body = body::read(request, desk.limits).await?;
    let NewApiKey { scopes, subject, tenant, note, expires } = decode::strict(&body)?;
    let expires_at = expires.map(|text| parse_expiry(&text, clock::now_ms())).transpose()?;
    let grant = Grant { subject, tenant, scopes, note, expires_at }.check()?;
    let store = desk.keys()?.store();
    let new = NewKey::random().map_err(|error| Problem::new(Code::INTERNAL, error.to_string()))?;
    store.insert(&new, &grant).await.map_err(Problem::postgres_unavailable)?;
    let row = store.find(&new.id).await.map_err(Problem::postgres_unavailable)?;
    let row = row.ok_or_else(|| Problem::new(Code::INTERNAL, "the key that was just made is gone"))?;
    tracing::info!(key.id = row.id, by = by(&context.principal), scopes = row.scopes.join(" "), "API key made");
    Ok((StatusCode::CREATED, Json(CreatedApiKey { key: new.key, shown: row.into() })))
}

/// Show an API key
#[utoipa::path(
    get,
    path = "/admin/keys/{id}",
    operation_id = "getApiKey",
    tag = "keys",
    params(("id" = String, Path, min_length = 1, description = "Id of the key: the part between `pr_live_` and the next `_`")),
    responses(
        (status = 200, description = "The key", body = ApiKey),
        (status = 404, description = "No such key", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
async fn show(State(desk): State<Desk>, id: Result<Path<String>, PathRejection>) -> Result<Json<ApiKey>, Problem> {
    let id = id_of(id)?;
    let found = desk.keys()?.store().find(&id).await.map_err(Problem::postgres_unavailable)?;
    found.map(|row| Json(row.into())).ok_or_else(|| unknown(&id))
}

/// Revoke an API key
///
/// No process accepts it 5 s later, and its open connections are closed. Repeating it changes
/// nothing.
#[utoipa::path(
    delete,
    path = "/admin/keys/{id}",
    operation_id = "revokeApiKey",
    tag = "keys",
    params(("id" = String, Path, min_length = 1, description = "Id of the key")),
    responses(
        (status = 200, description = "The revoked key", body = ApiKey),
        (status = 404, description = "No such key", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
async fn revoke(
    State(desk): State<Desk>,
    context: RequestContext,
    id: Result<Path<String>, PathRejection>,
    _: Nothing,
) -> Result<Json<ApiKey>, Problem> {
    let id = id_of(id)?;
    let keys = desk.keys()?;
    if !keys.store().revoke(&id).await.map_err(Problem::postgres_unavailable)? {
        return Err(unknown(&id));
    }
    tracing::info!(key.id = id, by = by(&context.principal), "API key revoked");
    // This process does not accept it after the answer, unless it cannot read the keys.
    keys.look_again().await;
    let row = keys.store().find(&id).await.map_err(Problem::postgres_unavailable)?;
    row.map(|row| Json(row.into())).ok_or_else(|| unknown(&id))
}

impl Desk {
    fn keys(&self) -> Result<&Arc<Keys>, Problem> {
        let off = || Problem::new(Code::POSTGRES_UNAVAILABLE, "set `postgres.url` to use API keys; it is not set");
        self.keys.as_ref().ok_or_else(off)
    }
}

fn by(principal: &Principal) -> &str {
    principal.identity().map_or("anonymous", |identity| &identity.subject)
}

fn id_of(path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let id = params::from_path("id", path)?;
    if id.contains('\0') { Err(unknown(&id)) } else { Ok(id) }
}

fn unknown(id: &str) -> Problem {
    Problem::new(codes::KEY_UNKNOWN, format!("there is no API key `{id}`"))
}

impl From<GrantError> for Problem {
    fn from(error: GrantError) -> Self {
        Problem::new(Code::INVALID_FIELD, error.to_string()).at_field(error.field())
    }
}
