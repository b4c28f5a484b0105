//! HTTP route that reads a feed in pages.

use std::collections::HashMap;

use axum::{
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderName, HeaderValue, Method, Response, StatusCode},
    response::IntoResponse,
};
use postrider_http::{
    Code, Params, Problem, ProblemBody, RequestContext,
    decode::{is_too_large, quoted},
    json as output, params,
    shortcut::{self, ShortCuts},
};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Feed, bad_cursor, invalid, json, posts::Shown, user_of};
use crate::{
    feeds::{Page, Start},
    model::MAX_POST_ID,
    reads::Post,
};

static X_CACHE: HeaderName = HeaderName::from_static("x-cache");

const ROUTE: &str = "/feeds/{user_id}";
const DEFAULT_LIMIT: usize = 20;
const MAX_LIMIT: i64 = 100;
/// Maximum offset. Clients reach older posts by cursor, whose cost does not grow with the distance.
const MAX_OFFSET: i64 = 10_000;

/// Adds the shortcut for [`feed`], which skips the router.
pub fn short_cut(short_cuts: ShortCuts, feed: &Feed) -> ShortCuts {
    let feed = feed.clone();
    short_cuts.with(Method::GET, ROUTE, move |request: Request, context| {
        let user_id = shortcut::parameter(request.uri().path()).to_owned();
        let feed = feed.clone();
        async move {
            let answer = match params::from_query(request.uri().query()) {
                Ok(query) => self::feed(State(feed), context, Ok(Path(user_id)), Params(query)).await,
                Err(problem) => Err(problem),
            };
            answer.unwrap_or_else(IntoResponse::into_response)
        }
    })
}

#[derive(Default, Deserialize)]
pub struct FeedQuery {
    limit: Option<String>,
    offset: Option<i64>,
    cursor: Option<String>,
    expand: Option<String>,
}

/// A page of a feed.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
pub struct FeedPage<'a> {
    user_id: String,
    /// Post ids, newest first, each below 2^53.
    post_ids: Vec<i64>,
    /// The posts in the same order, if `expand` asks for them.
    #[schema(nullable = false)]
    posts: Option<Vec<Shown<'a>>>,
    /// Cursor of the next page; null on the last page.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// Read a feed
///
/// Returns posts of all users whom the user follows, newest first. Pages by `cursor` are stable
/// while posts arrive.
#[utoipa::path(
    get,
    path = "/feeds/{user_id}",
    operation_id = "getFeed",
    tag = "feed",
    params(
        ("user_id" = String, Path, min_length = 1, max_length = 255),
        ("limit" = inline(Option<AnyWholeNumber>), Query, description = "Maximum number of posts, 1 to 100; default 20, also for values out of range"),
        ("offset" = Option<i64>, Query, maximum = 10000, description = "Number of newest posts to skip; a negative value counts as 0"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the previous page; takes precedence over `offset`"),
        ("expand" = Option<String>, Query, pattern = "^posts$", description = "`posts` adds the posts to the page"),
    ),
    responses(
        (status = 200, description = "A page of the feed", body = FeedPage, headers(("X-Cache" = String, description = "`HIT` if Redis had the page, else `MISS`"))),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The id is too long, or the offset too large", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Postgres cannot be reached, or too many reads wait for it", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
pub async fn feed(
    State(feed): State<Feed>,
    context: RequestContext,
    user_id: Result<Path<String>, PathRejection>,
    Params(query): Params<FeedQuery>,
) -> Result<Response<Body>, Problem> {
    let user_id = user_of(&context, user_id)?;
    let limit = fitting(query.limit.as_deref())?;
    let start = start(&query)?;
    let expand = match query.expand.as_deref() {
        None => false,
        Some("posts") => true,
        Some(other) => {
            let detail = format!("`expand` must be `posts` if set (got {})", quoted(other));
            return Err(invalid(detail).at_parameter("expand"));
        }
    };
    let feeds = &feed.desk()?.feeds;
    let mut page = feeds.page(&user_id, start, limit).await?;
    let last = page.ids.last().copied();
    let posts = if expand { Some(expanded(&feed, &mut page).await?) } else { None };
    let hit = page.hit;
    let mut response = json(StatusCode::OK, render(&user_id, &page, posts.as_deref(), last)?);
    let cache = HeaderValue::from_static(if hit { "HIT" } else { "MISS" });
    response.headers_mut().insert(X_CACHE.clone(), cache);
    Ok(response)
}

/// A whole number of any size, for the API description.
struct AnyWholeNumber;

impl utoipa::PartialSchema for AnyWholeNumber {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::Object::with_type(utoipa::openapi::Type::Integer).into()
    }
}

impl ToSchema for AnyWholeNumber {}

/// Returns the limit, or the default if it is missing or out of range, as existing clients expect.
fn fitting(limit: Option<&str>) -> Result<usize, Problem> {
    let Some(text) = limit else { return Ok(DEFAULT_LIMIT) };
    match text.parse::<i64>() {
        Ok(limit) if (1..=MAX_LIMIT).contains(&limit) => Ok(limit as usize),
        Err(_) if !is_too_large(text) => {
            let detail = format!("`limit` must be a whole number (got {})", quoted(text));
            Err(invalid(detail).at_parameter("limit"))
        }
        _ => Ok(DEFAULT_LIMIT),
    }
}

fn start(query: &FeedQuery) -> Result<Start, Problem> {
    if let Some(cursor) = query.cursor.as_deref() {
        let digits = Some(cursor).filter(|cursor| cursor.bytes().all(|byte| byte.is_ascii_digit()));
        let before = digits.and_then(|digits| digits.parse().ok()).filter(|id| (1..=MAX_POST_ID).contains(id));
        return before.map(Start::Before).ok_or_else(|| bad_cursor(cursor));
    }
    match query.offset.unwrap_or(0) {
        offset if offset > MAX_OFFSET => {
            let detail = format!("`offset` must be at most {MAX_OFFSET} (got {offset}); use `cursor` to read further");
            Err(Problem::new(Code::INVALID_FIELD, detail).at_parameter("offset"))
        }
        offset => Ok(Start::Offset(usize::try_from(offset).unwrap_or(0))),
    }
}

/// Reads the posts of the page, and removes the ids of posts that were deleted in between from the
/// page.
async fn expanded(feed: &Feed, page: &mut Page) -> Result<Vec<Post>, Problem> {
    let posts = feed.desk()?.feeds.reads().posts(&page.ids).await.map_err(Problem::postgres_unavailable)?;
    let mut posts: HashMap<i64, Post> = posts.into_iter().map(|post| (post.id, post)).collect();
    page.ids.retain(|id| posts.contains_key(id));
    Ok(page.ids.iter().filter_map(|id| posts.remove(id)).collect())
}

fn render(user_id: &str, page: &Page, posts: Option<&[Post]>, last: Option<i64>) -> Result<Vec<u8>, Problem> {
    let mut body = Vec::with_capacity(user_id.len() + 60 + page.ids.len() * 17);
    body.extend_from_slice(br#"{"user_id":"#);
    output::write_string(&mut body, user_id);
    body.extend_from_slice(br#","post_ids":["#);
    let mut digits = itoa::Buffer::new();
    for (place, &id) in page.ids.iter().enumerate() {
        if place > 0 {
            body.push(b',');
        }
        body.extend_from_slice(digits.format(id).as_bytes());
    }
    body.push(b']');
    if let Some(posts) = posts {
        body.extend_from_slice(br#","posts":"#);
        let posts: Vec<Shown<'_>> = posts.iter().map(Shown::from).collect();
        serde_json::to_writer(&mut body, &posts).map_err(|error| Problem::new(Code::INTERNAL, error.to_string()))?;
    }
    match last.filter(|_| page.more) {
        Some(last) => {
            body.extend_from_slice(br#","next_cursor":""#);
            body.extend_from_slice(digits.format(last).as_bytes());
            body.extend_from_slice(br#""}"#);
        }
        None => body.extend_from_slice(br#","next_cursor":null}"#),
    }
    Ok(body)
}
