//! HTTP routes of the comments capability.

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response, header},
    response::IntoResponse,
};
use postrider_http::{
    Bounded, Code, Params, Problem, ProblemBody, RequestContext, body,
    context::{require_content_type, single},
    decode::quoted,
    refusals::PostgresRead,
    sse,
};
use postrider_kafka::{Outgoing, event::Event};
use postrider_openapi::tagged;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Comments, Shelf,
    cursor::{Cursor, Malformed, Position},
    model::{Comment, Draft, Id, Listed, check_field},
    store::Row,
    stream,
};

const ROUTE: &str = "/api/v1/comments";
const FORM: &str = "application/x-www-form-urlencoded";
const DEFAULT_LIMIT: u64 = 20;
const MAX_LIMIT: u64 = 100;
static LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Returns the routes of the capability with their OpenAPI descriptions.
pub fn routes(comments: Comments) -> OpenApiRouter {
    let head = tagged("comments", "Comments: stored, listed and streamed.");
    OpenApiRouter::with_openapi(head).routes(routes!(push, list)).routes(routes!(live)).with_state(comments)
}

/// Response to a stored comment.
#[derive(Serialize, ToSchema)]
#[schema(as = CommentAccepted)]
struct Pushed {
    /// Always true.
    success: bool,
    /// Constant text.
    message: &'static str,
    /// The comment as it was sent.
    comment: Comment,
}

/// One page of comments.
#[derive(Serialize, ToSchema)]
#[schema(as = CommentPage)]
struct Page<'a> {
    /// Newest first.
    comments: Vec<Listed<'a>>,
    /// Cursor of the next page; null on the last page.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// Post a comment
///
/// Accepts JSON or a form. Answers once all in-sync replicas of Kafka have the comment. It is
/// listed and streamed within milliseconds after that.
#[utoipa::path(
    post,
    path = "/api/v1/comments",
    operation_id = "postComment",
    tag = "comments",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry store the same comment")),
    request_body(content((Draft = "application/json"), (Draft = "application/x-www-form-urlencoded"))),
    responses(
        (status = 200, description = "Stored", body = Pushed),
        (status = 400, description = "Malformed body, or no text", body = ProblemBody, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "Neither JSON nor a form", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "A field is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Not stored, or outcome unknown", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn push(State(comments): State<Comments>, context: RequestContext, request: Request) -> Response<Body> {
    match comments.push(&context, request).await {
        Ok(pushed) => axum::Json(pushed).into_response(),
        Err(problem) => problem.with("success", false).into_response(),
    }
}

#[derive(Deserialize)]
struct ListQuery {
    limit: Option<Bounded<1, MAX_LIMIT>>,
    cursor: Option<String>,
    post_id: Option<String>,
}

/// List comments, newest first
///
/// Pages are stable while comments arrive: comments newer than the first page do not appear in
/// later pages.
#[utoipa::path(
    get,
    path = "/api/v1/comments",
    operation_id = "listComments",
    tag = "comments",
    params(
        ("limit" = Option<u16>, Query, minimum = 1, maximum = 100, description = "Maximum number of comments in the page; default 20"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the previous page"),
        ("post_id" = Option<String>, Query, description = "Only comments on this post; an empty value is ignored"),
    ),
    responses(
        (status = 200, description = "A page of comments", body = Page),
        (status = 422, description = "The limit is out of range", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
async fn list(State(comments): State<Comments>, Params(query): Params<ListQuery>) -> Result<Response<Body>, Problem> {
    let limit = query.limit.map_or(DEFAULT_LIMIT, Bounded::get) as u16;
    let cursor = query.cursor.as_deref().map_or(Ok(Cursor::NEWEST), |text| {
        let detail = || format!("`cursor` must be the `next_cursor` of a page (got {})", quoted(text));
        text.parse().map_err(|_: Malformed| invalid(detail()).at_parameter("cursor"))
    })?;
    let post_id = query.post_id.as_deref().filter(|id| !id.is_empty());
    check_field("post_id", post_id.unwrap_or_default(), usize::MAX)
        .map_err(|flaw| flaw.problem().at_parameter("post_id"))?;
    // Reads one row more than the limit to find out whether there is another page.
    let mut rows =
        comments.shelf()?.store.page(cursor, post_id, limit + 1).await.map_err(Problem::postgres_unavailable)?;
    let more = rows.len() > usize::from(limit);
    rows.truncate(usize::from(limit));
    let next_cursor = rows.last().filter(|_| more).map(|row| cursor_of(row).to_string());
    let page = Page { comments: rows.iter().map(Listed::from).collect(), next_cursor };
    Ok(axum::Json(page).into_response())
}

#[derive(Deserialize)]
struct StreamQuery {
    after: Option<String>,
}

/// Stream comments as they are stored
///
/// Sends server-sent events, each with a comment (`StoredComment`) as JSON in `data`. The `id` of
/// an event is the position of the stream. A client that sends it as `Last-Event-ID`, as browsers
/// do by themselves, continues after that event on any process, without gaps or duplicates. Without
/// it the stream begins with the next comment. Comments on one post arrive in their order.
#[utoipa::path(
    get,
    path = "/api/v1/comments/stream",
    operation_id = "streamComments",
    tag = "comments",
    params(
        ("Last-Event-ID" = Option<String>, Header, nullable = false, description = "Continue after the event with this `id`"),
        ("after" = Option<String>, Query, description = "Same as `Last-Event-ID`, for clients that cannot set headers; the header takes precedence"),
    ),
    responses(
        (status = 200, description = "The stream", body = sse::Described, content_type = "text/event-stream"),
        (status = 400, description = "The id is malformed or not a position in this stream", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Too many open streams, or Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn live(
    State(comments): State<Comments>,
    context: RequestContext,
    headers: HeaderMap,
    Params(query): Params<StreamQuery>,
) -> Result<Response<Body>, Problem> {
    let header = single(&headers, &LAST_EVENT_ID, "Last-Event-ID")?.map(|value| value.to_str().unwrap_or("?"));
    let named = |problem: Problem| match header {
        Some(_) => problem.at_header("Last-Event-ID"),
        None => problem.at_parameter("after"),
    };
    let malformed = |text: &str| {
        let name = if header.is_some() { "Last-Event-ID" } else { "after" };
        named(invalid(format!("`{name}` must be the `id` of an event of this stream (got {})", quoted(text))))
    };
    // A browser whose stream broke before the first id sends no header, or an empty one.
    let after = header.or(query.after.as_deref()).filter(|id| !id.is_empty());
    let parse = |text: &str| text.parse::<Position>().map_err(|_| malformed(text));
    let after = after.map(parse).transpose()?;
    let opened = stream::open(&comments, after, context.principal).await;
    opened.map_err(|problem| if problem.code == Code::INVALID_REQUEST { named(problem) } else { problem })
}

impl Comments {
    async fn push(&self, context: &RequestContext, request: Request) -> Result<Pushed, Problem> {
        let inner = &*self.inner;
        require_content_type(request.headers(), &["application/json", FORM])?;
        let form = is_form(request.headers());
        let body = body::read(request, inner.http.limits()).await?;
        let comment = draft(&body, form)?.check(inner.config.max_text_bytes)?;
        if let Some(author) = &comment.author_id {
            context.principal.may_act_for(&author.text())?;
        }
        if !inner.topics_ready.get() {
            let detail =
                "the topics were not checked yet, or their settings differ from what is required; see readiness";
            return Err(Problem::new(Code::KAFKA_UNAVAILABLE, detail));
        }
        let value = serde_json::to_vec(&comment).map_err(|error| Problem::new(Code::INTERNAL, error.to_string()))?;
        let id = context.event_id(ROUTE, None, &[&body])?;
        let event = Event { id, kind: "postrider.comment.pushed", source: "/comments", trace: context.trace };
        let key = comment.post_id.as_ref().or(comment.author_id.as_ref()).map(Id::text);
        let record = Outgoing {
            topic: &inner.topic,
            key: key.as_deref().map(str::as_bytes),
            payload: Some(&value),
            headers: Some(event.headers(0)),
            ..Outgoing::default()
        };
        inner.producer.store(record).await?;
        Ok(Pushed { success: true, message: "Comment pushed successfully", comment })
    }

    pub(super) fn shelf(&self) -> Result<&Shelf, Problem> {
        let off = || Problem::new(Code::POSTGRES_UNAVAILABLE, "set `postgres.url` to read comments; it is not set");
        self.inner.shelf.as_ref().ok_or_else(off)
    }
}

fn is_form(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let essence = value.split(|&byte| byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(FORM.as_bytes())
}

/// Parses a body as a form or as JSON. `curl -d '{…}'` and similar clients declare every body a
/// form; a form whose first character is `{` is parsed as JSON, because no field name of ours
/// starts with it.
fn draft(body: &[u8], form: bool) -> Result<Draft, Problem> {
    if form && body.trim_ascii_start().first() != Some(&b'{') {
        return Draft::from_form(body);
    }
    Draft::from_json(body)
}

fn cursor_of(row: &Row) -> Cursor {
    Cursor { created_ms: row.created_ms, topic_epoch: row.topic_epoch, partition: row.partition, offset: row.offset }
}

fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(Code::INVALID_REQUEST, detail)
}
