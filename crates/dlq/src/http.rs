//! HTTP routes for operators to list, show, replay and purge dead letters.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
};
use postrider_http::{
    Bounded, Code, Config as HttpConfig, Params, Problem, ProblemBody,
    body::{self, Limits},
    context::require_json,
    decode, params,
    refusals::{JsonBody, refusals},
};
use postrider_openapi::tagged;
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Bounds, Config, Detail, Error, Filter, Letters, Listing, Query, Queue, Report,
    filter::{parse_key, parse_since},
};
use crate::codes;

/// Maximum number of letters that one request keeps track of, about 200 bytes each.
const MAX_LETTERS: usize = 100_000;
/// Maximum number of bytes of letters in memory during a replay.
const CHUNK_BYTES: usize = 16 << 20;
/// Maximum numbers of letters that one request lists, and changes.
const MAX_LISTED: u64 = 1_000;
const MAX_CHANGED: u64 = 10_000;

#[derive(Clone)]
struct Desk {
    queue: Queue,
    limits: Limits,
    timeout: Duration,
}

/// Returns the routes with their OpenAPI descriptions; none if `dlq.admin` is off.
pub fn routes(queue: Queue, config: &Config, http: &HttpConfig) -> OpenApiRouter {
    if !config.admin {
        return OpenApiRouter::new();
    }
    let desk = Desk { queue, limits: http.limits(), timeout: Duration::from_millis(config.scan_timeout_ms) };
    let text = "Dead letters: records that could not be processed or delivered.";
    OpenApiRouter::with_openapi(tagged("dlq", text))
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(replay))
        .routes(routes!(purge))
        .with_state(desk)
}

/// A dead-letter topic.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = DeadLetterTopic)]
enum Kind {
    /// Records that postrider itself could not process.
    Events,
    /// Records that a customer's endpoint did not accept.
    Deliveries,
}

/// Filter of the letters to list; a letter must meet every condition that is set.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListParams {
    /// The dead-letter topic to read; both by default.
    #[param(inline)]
    letters: Option<Kind>,
    /// The record's topic, with or without `kafka.topic_prefix`.
    topic: Option<String>,
    /// The record's key.
    key: Option<String>,
    /// The record's key in Base64, for keys that are not UTF-8; instead of `key`.
    key_base64: Option<String>,
    /// The last failure was at this RFC 3339 time or later, or within this age: `90s`, `15m`, `2h`,
    /// `7d`.
    since: Option<String>,
    /// The class of the error, or a part of its message.
    error: Option<String>,
    /// Maximum number of letters; default 50.
    #[param(value_type = Option<u64>, minimum = 1, maximum = 1000)]
    limit: Option<Bounded<1, MAX_LISTED>>,
}

/// Choice of the letters to change; a letter must meet every condition that is set. Unknown fields
/// are refused, since a misspelt condition would choose more letters than meant.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = DeadLetterSelection, examples(json!({"topic": "orders", "since": "2h", "dry_run": true})))]
struct ChangeBody {
    /// The ids of the letters.
    ids: Vec<String>,
    /// The dead-letter topic to read; both by default.
    letters: Option<Kind>,
    /// The record's topic, with or without `kafka.topic_prefix`.
    topic: Option<String>,
    /// The record's key.
    key: Option<String>,
    /// The record's key in Base64, for keys that are not UTF-8; instead of `key`.
    #[schema(content_encoding = "base64")]
    key_base64: Option<String>,
    /// The last failure was at this RFC 3339 time or later, or within this age: `90s`, `15m`, `2h`,
    /// `7d`.
    since: Option<String>,
    /// The class of the error, or a part of its message.
    error: Option<String>,
    /// Maximum number of letters, in the order of their records; default 1000.
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 10000)]
    limit: Option<Bounded<1, MAX_CHANGED>>,
    /// Changes nothing and reports what would change: `would_replay` and `would_purge`.
    dry_run: bool,
    /// Chooses every letter. Required if no other condition is set, also in a dry run.
    all: bool,
}

refusals! {
    /// Refusals of routes that read the dead-letter topics.
    Reading { 429: "Another request is reading them", 503: "Kafka cannot be reached, or reading took too long" }
    /// Refusals of bodies that choose letters.
    Choice { 400: "Malformed, or with an unknown field", 422: "No letters chosen, a field is out of range, or too many letters match" }
}

/// List dead letters
///
/// Lists the newest first. Reads the dead-letter topics, one request at a time.
/// `dlq.admin` turns it off.
#[utoipa::path(
    get,
    path = "/admin/dlq",
    operation_id = "listDeadLetters",
    tag = "dlq",
    params(ListParams),
    responses(
        (status = 200, description = "The matching letters", body = Listing),
        (status = 400, description = "A parameter is malformed or unknown", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is out of range", body = ProblemBody, content_type = "application/problem+json"),
        Reading,
    ),
)]
async fn list(State(desk): State<Desk>, Params(params): Params<ListParams>) -> Result<Json<Listing>, Problem> {
    let ListParams { letters, topic, key, key_base64, since, error, limit } = params;
    let key = key_of(key, key_base64.as_deref()).map_err(|problem| problem.at_parameter("key_base64"))?;
    let since_ms = since_ms(since.as_deref()).map_err(|problem| problem.at_parameter("since"))?;
    let filter = Filter { ids: Vec::new(), topic, key, since_ms, error };
    if let Some(name) = filter.empty_condition() {
        return Err(empty(name).at_parameter(name));
    }
    let query = Query { letters: of_kind(letters), filter, limit: limit.map_or(50, Bounded::as_usize) };
    Ok(Json(desk.queue.list(query, desk.bounds()).await?))
}

/// Show one dead letter
///
/// Returns the letter with the value and headers of its record. The id is percent-encoded:
/// `messages%2F3%401234%20postrider-kv`.
#[utoipa::path(
    get,
    path = "/admin/dlq/{id}",
    operation_id = "getDeadLetter",
    tag = "dlq",
    params(("id" = String, Path, min_length = 1, description = "The id from the list of dead letters")),
    responses(
        (status = 200, description = "The letter", body = Detail),
        (status = 400, description = "The id is malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "No such letter", body = ProblemBody, content_type = "application/problem+json"),
        Reading,
    ),
)]
async fn show(State(desk): State<Desk>, id: Result<Path<String>, PathRejection>) -> Result<Json<Detail>, Problem> {
    let id = params::from_path("id", id)?;
    let found = desk.queue.show(Letters::All, id, desk.bounds()).await?;
    found.map(Json).ok_or_else(|| Problem::new(Code::NOT_FOUND, "no dead letter has this id"))
}

/// Replay dead letters
///
/// Writes the records to their topics again, to the same partition and in order, with their
/// original key, value, headers and event id. A letter is deleted once Kafka has its record.
/// Replaying a letter twice is harmless if consumers deduplicate by event id. A record that a newer
/// one with the same key has superseded in a compacted topic is left out.
#[utoipa::path(
    post,
    path = "/admin/dlq/replay",
    operation_id = "replayDeadLetters",
    tag = "dlq",
    request_body = ChangeBody,
    responses(
        (status = 200, description = "The result for each letter", body = Report),
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
/// Deletes letters by writing tombstones.
#[utoipa::path(
    post,
    path = "/admin/dlq/purge",
    operation_id = "purgeDeadLetters",
    tag = "dlq",
    request_body = ChangeBody,
    responses(
        (status = 200, description = "The result for each letter", body = Report),
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
        require_json(request.headers())?;
        if request.uri().query().is_some_and(|query| !query.is_empty()) {
            let detail = "this route takes no parameters; send the conditions and `dry_run` in the body";
            return Err(Problem::new(Code::INVALID_REQUEST, detail));
        }
        let body = body::read(request, self.limits).await?;
        let ChangeBody { ids, letters, topic, key, key_base64, since, error, limit, dry_run, all } =
            decode::strict(&body)?;
        let key = key_of(key, key_base64.as_deref()).map_err(|problem| problem.at_field("key_base64"))?;
        let since_ms = since_ms(since.as_deref()).map_err(|problem| problem.at_field("since"))?;
        let filter = Filter { ids, topic, key, since_ms, error };
        if let Some(name) = filter.empty_condition() {
            return Err(empty(name).at_field(name));
        }
        if filter.is_empty() && !all {
            let detail = "choose letters with `ids`, `topic`, `key`, `key_base64`, `since` or `error`, or set `all` to true; so does a dry run, which takes what the change would take";
            return Err(Problem::new(Code::INVALID_FIELD, detail).at_field("all"));
        }
        let limit = limit.map_or(1_000, Bounded::as_usize);
        Ok((Query { letters: of_kind(letters), filter, limit }, dry_run))
    }
}

fn empty(name: &str) -> Problem {
    Problem::new(Code::INVALID_FIELD, format!("`{name}` must not be empty; leave it out to take every {name}"))
}

/// Returns the key to look for, which is given as text or in base64.
fn key_of(text: Option<String>, base64: Option<&str>) -> Result<Option<Vec<u8>>, Problem> {
    let invalid = |detail| Problem::new(Code::INVALID_FIELD, detail);
    match (text, base64) {
        (Some(_), Some(_)) => Err(invalid("`key_base64` must not be set beside `key`; send one of them".to_owned())),
        (text, None) => Ok(text.map(String::into_bytes)),
        (None, Some(key)) => parse_key(key).map(Some).map_err(|error| invalid(format!("`key_base64` {error}"))),
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
    since.map(parse).transpose().map_err(|detail| Problem::new(Code::INVALID_FIELD, format!("`since` {detail}")))
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Busy => codes::SCAN_IN_PROGRESS,
            Error::Deadline => codes::SCAN_TIMEOUT,
            Error::TooMany(_) => Code::INVALID_FIELD,
            Error::UnknownTopic(_) => Code::UNKNOWN_TOPIC,
            Error::Kafka(_) | Error::Topic(_) => Code::KAFKA_UNAVAILABLE,
            Error::Ended => Code::INTERNAL,
        };
        Problem::new(code, error.to_string())
    }
}
