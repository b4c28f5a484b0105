//! The dead letters over HTTP, for operators.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::{
        Path, Query as QueryString, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::header,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Bounds, Config, Detail, Error, Filter, Letters, Listing, Query, Queue, Report, filter::parse_since};
use crate::platform::{
    clock,
    http::{
        Code, Config as HttpConfig, Problem, ProblemBody, body,
        body::Limits,
        json,
        refusals::{JsonBody, refusals},
    },
};

/// Letters kept track of by one request at most, about 200 bytes each.
const MAX_LETTERS: usize = 100_000;
/// Letters in memory while they are replayed.
const CHUNK_BYTES: usize = 16 << 20;
/// Letters listed, and changed, by one request at most.
const MAX_LISTED: usize = 1_000;
const MAX_CHANGED: usize = 10_000;

#[derive(Clone)]
struct Desk {
    queue: Queue,
    limits: Limits,
    timeout: Duration,
}

/// The routes with their descriptions; none where `dlq.admin` is off.
pub fn routes(queue: Queue, config: &Config, http: &HttpConfig) -> OpenApiRouter {
    if !config.admin {
        return OpenApiRouter::new();
    }
    let desk = Desk { queue, limits: http.limits(), timeout: Duration::from_millis(config.scan_timeout_ms) };
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(replay))
        .routes(routes!(purge))
        .with_state(desk)
}

/// Which dead-letter topic.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// Records that postrider's own processing gave up.
    Events,
    /// Records that somebody's endpoint did not take.
    Deliveries,
}

/// Which letters to list; all that is set must hold.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListParams {
    /// Without it, both.
    #[param(inline)]
    letters: Option<Kind>,
    /// The record's topic, with or without `kafka.topic_prefix`.
    topic: Option<String>,
    /// The record's key.
    key: Option<String>,
    /// Failed last at this RFC 3339 time or later, or within this age: `90s`, `15m`, `2h`, `7d`.
    since: Option<String>,
    /// The error's class, or a part of its message.
    error: Option<String>,
    /// How many; 50 without it.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
}

/// Which letters to change; all that is set must hold.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
struct ChangeBody {
    /// The letters of these names.
    ids: Vec<String>,
    /// Without it, both.
    letters: Option<Kind>,
    /// The record's topic, with or without `kafka.topic_prefix`.
    topic: Option<String>,
    /// The record's key.
    key: Option<String>,
    /// Failed last at this RFC 3339 time or later, or within this age: `90s`, `15m`, `2h`, `7d`.
    since: Option<String>,
    /// The error's class, or a part of its message.
    error: Option<String>,
    /// How many, in the order of their records; 1000 without it.
    #[schema(minimum = 1, maximum = 10000)]
    limit: Option<usize>,
    /// Change nothing, and say what would be.
    dry_run: bool,
    /// Every letter is meant. Needed where nothing else chooses, unless it is a dry run.
    all: bool,
}

refusals! {
    /// Of routes that read the dead-letter topics.
    Reading { 429: "Another request is reading", 503: "Kafka cannot be reached, or reading took too long" }
    /// Of bodies that choose letters.
    Choice { 400: "Malformed", 422: "Nothing chooses, a field breaks a rule, or too many match" }
}

/// List dead letters
///
/// The newest first. Reads the dead-letter topics, one request at a time. Until there is
/// authentication (scope `admin`), whoever reaches this port may use it: `dlq.admin` turns it off.
#[utoipa::path(
    get,
    path = "/admin/dlq",
    tag = "dlq",
    params(ListParams),
    responses(
        (status = 200, description = "Those that match", body = Listing),
        (status = 400, description = "A parameter cannot be read", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "A parameter breaks a rule", body = ProblemBody, content_type = "application/problem+json"),
        Reading,
    ),
)]
async fn list(
    State(desk): State<Desk>,
    params: Result<QueryString<ListParams>, QueryRejection>,
) -> Result<Json<Listing>, Problem> {
    let QueryString(params) = params.map_err(|error| Problem::new(Code::InvalidRequest, error.body_text()))?;
    let ListParams { letters, topic, key, since, error, limit } = params;
    let filter = Filter { ids: Vec::new(), topic, key, since_ms: since_ms(since.as_deref())?, error };
    let query = Query { letters: of_kind(letters), filter, limit: within(limit, 50, MAX_LISTED)? };
    Ok(Json(desk.queue.list(query, desk.bounds()).await?))
}

/// Show one dead letter
///
/// With its record's value and headers. The id is percent-encoded: `messages%2F3%401234%20postrider-kv`.
/// Until there is authentication (scope `admin`), whoever reaches this port may use it.
#[utoipa::path(
    get,
    path = "/admin/dlq/{id}",
    tag = "dlq",
    params(("id" = String, Path, min_length = 1, description = "As it is listed")),
    responses(
        (status = 200, description = "The letter", body = Detail),
        (status = 400, description = "The id cannot be read", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "No such letter", body = ProblemBody, content_type = "application/problem+json"),
        Reading,
    ),
)]
async fn show(State(desk): State<Desk>, id: Result<Path<String>, PathRejection>) -> Result<Json<Detail>, Problem> {
    let Path(id) = id.map_err(|error| Problem::new(Code::InvalidRequest, error.body_text()))?;
    let found = desk.queue.show(Letters::All, id, desk.bounds()).await?;
    found.map(Json).ok_or_else(|| Problem::new(Code::NotFound, "there is no dead letter of this id"))
}

/// Replay dead letters
///
/// Writes their records to their topics again: key, value, headers and event id as they were, to the
/// same partition, in order. A letter is deleted once Kafka has its record. Doing it twice does no harm
/// where consumers drop doubles by event id. Left out is what a newer record of its key has superseded
/// in a compacted topic. Until there is authentication (scope `admin`), whoever reaches this port may use it.
#[utoipa::path(
    post,
    path = "/admin/dlq/replay",
    tag = "dlq",
    request_body = ChangeBody,
    responses(
        (status = 200, description = "What became of each", body = Report),
        Choice,
        Reading,
        JsonBody,
    ),
)]
async fn replay(State(desk): State<Desk>, request: Request) -> Result<Json<Report>, Problem> {
    let (query, dry_run) = desk.read_change(request).await?;
    Ok(Json(desk.queue.replay(query, dry_run, desk.bounds()).await?))
}

/// Purge dead letters
///
/// Deletes them, by tombstones. Until there is authentication (scope `admin`), whoever reaches this port
/// may use it.
#[utoipa::path(
    post,
    path = "/admin/dlq/purge",
    tag = "dlq",
    request_body = ChangeBody,
    responses(
        (status = 200, description = "What became of each", body = Report),
        Choice,
        Reading,
        JsonBody,
    ),
)]
async fn purge(State(desk): State<Desk>, request: Request) -> Result<Json<Report>, Problem> {
    let (query, dry_run) = desk.read_change(request).await?;
    Ok(Json(desk.queue.purge(query, dry_run, desk.bounds()).await?))
}

impl Desk {
    fn bounds(&self) -> Bounds {
        Bounds {
            deadline: Instant::now() + self.timeout,
            max_letters: MAX_LETTERS,
            chunk_bytes: CHUNK_BYTES,
            progress: Box::new(|_, _, _| {}),
        }
    }

    async fn read_change(&self, request: Request) -> Result<(Query, bool), Problem> {
        // Stricter than other routes: a form of somebody else's page must not be able to do this.
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(Code::UnsupportedMediaType, "this needs `Content-Type: application/json`"));
        }
        let body = body::read(request.into_body(), self.limits).await?;
        let ChangeBody { ids, letters, topic, key, since, error, limit, dry_run, all } = json::parse_object(&body)?;
        let filter = Filter { ids, topic, key, since_ms: since_ms(since.as_deref())?, error };
        if filter.is_empty() && !all && !dry_run {
            let detail = "nothing says which letters; name `ids`, `topic`, `key`, `since` or `error`, or say `all`";
            return Err(Problem::new(Code::InvalidField, detail));
        }
        let limit = within(limit, 1_000, MAX_CHANGED)?;
        Ok((Query { letters: of_kind(letters), filter, limit }, dry_run))
    }
}

fn of_kind(kind: Option<Kind>) -> Letters {
    match kind {
        None => Letters::All,
        Some(Kind::Events) => Letters::Events,
        Some(Kind::Deliveries) => Letters::Deliveries,
    }
}

fn since_ms(since: Option<&str>) -> Result<Option<i64>, Problem> {
    let parse = |text| parse_since(text, clock::now_ms());
    since.map(parse).transpose().map_err(|detail| Problem::new(Code::InvalidField, format!("`since`: {detail}")))
}

fn within(limit: Option<usize>, default: usize, most: usize) -> Result<usize, Problem> {
    match limit.unwrap_or(default) {
        limit if (1..=most).contains(&limit) => Ok(limit),
        _ => Err(Problem::new(Code::InvalidField, format!("`limit` must be 1 to {most}"))),
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Busy => Code::ScanInProgress,
            Error::Deadline => Code::ScanTimeout,
            Error::TooMany(_) => Code::InvalidField,
            Error::UnknownTopic(_) => Code::UnknownTopic,
            Error::Kafka(_) | Error::Topic(_) => Code::KafkaUnavailable,
            Error::Ended => Code::Internal,
        };
        Problem::new(code, error.to_string())
    }
}
