//! HTTP routes to create, read and delete posts.

use axum::{
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{Method, Response, StatusCode},
    response::IntoResponse,
};
use postrider_http::{
    Problem, ProblemBody, RequestContext, decode,
    params::Nothing,
    refusals::{JsonWrite, PostgresRead},
    shortcut::ShortCuts,
};
use postrider_time::clock;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Feed, json, meta, not_found, post_of, settled};
use crate::{
    group::Refusal,
    model::{self, PostDraft},
    reads::Post,
    writes::{self, NewPost},
};

const ROUTE: &str = "/posts";

/// Adds the shortcut for [`create`], which skips the router.
pub fn short_cut(short_cuts: ShortCuts, feed: &Feed) -> ShortCuts {
    let feed = feed.clone();
    short_cuts.with(Method::POST, ROUTE, move |request: Request, context| {
        let answer = create(State(feed.clone()), context, request);
        async move { answer.await.unwrap_or_else(IntoResponse::into_response) }
    })
}

/// Response to a created post.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
pub struct PostCreated {
    /// Id of the post, below 2^53.
    #[schema(minimum = 1, maximum = 9007199254740991u64)]
    post_id: i64,
    /// Constant text.
    message: String,
}

/// A post.
#[derive(Serialize, ToSchema)]
#[schema(as = Post)]
pub struct Shown<'a> {
    pub id: i64,
    pub author_id: &'a str,
    pub content: &'a str,
    /// Time of creation, in RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
}

impl<'a> From<&'a Post> for Shown<'a> {
    fn from(post: &'a Post) -> Self {
        Self {
            id: post.id,
            author_id: &post.author_id,
            content: &post.content,
            created_at: clock::rfc3339(post.created_ms),
        }
    }
}

/// Response to a change that returns no data.
#[derive(Serialize, ToSchema)]
#[schema(as = Confirmation)]
pub struct Said {
    /// Constant text.
    pub message: &'static str,
}

/// Create a post
///
/// Answers once Postgres has the post and its event for Kafka on disk. The post appears in
/// followers' feeds within milliseconds after that.
#[utoipa::path(
    post,
    path = "/posts",
    operation_id = "createPost",
    tag = "feed",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry return the same post instead of creating another")),
    request_body = PostDraft,
    responses(
        (status = 202, description = "Stored", body = PostCreated),
        (status = 400, description = "Malformed, or a field is empty", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "The author is being erased", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "A field is too long", body = ProblemBody, content_type = "application/problem+json"),
        JsonWrite,
    ),
)]
pub async fn create(
    State(feed): State<Feed>,
    context: RequestContext,
    request: Request,
) -> Result<Response<Body>, Problem> {
    let body = feed.body(request).await?;
    let draft: PostDraft<'_> = decode::object(&body)?;
    draft.check(feed.inner.config.max_content_bytes)?;
    context.principal.may_act_for(&draft.author_id)?;
    let meta = meta(&context, ROUTE, &body)?;
    let (head, tail) = model::created(meta.event_id, &draft.author_id, &draft.content);
    let PostDraft { author_id, content } = draft;
    let post = NewPost { meta, author_id: author_id.into_owned(), content: content.into_owned(), head, tail };
    let desk = feed.desk()?;
    let _admitted = desk.backlog.admit(&post.author_id, post.head.len() + post.tail.len())?;
    let id = settled(desk.posts.write(post).await?)?;
    let body = format!(r#"{{"post_id":{id},"message":"Post created successfully"}}"#);
    Ok(json(StatusCode::ACCEPTED, body))
}

/// Read a post
#[utoipa::path(
    get,
    path = "/posts/{id}",
    operation_id = "getPost",
    tag = "feed",
    params(("id" = i64, Path, minimum = 0, maximum = 9007199254740991u64)),
    responses(
        (status = 200, description = "The post", body = Shown),
        (status = 404, description = "No such post, or deleted", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
pub async fn show(
    State(feed): State<Feed>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response<Body>, Problem> {
    let id = post_of(id)?;
    let found = feed.desk()?.feeds.reads().posts(&[id]).await.map_err(Problem::postgres_unavailable)?;
    let post = found.first().ok_or_else(|| not_found(id))?;
    Ok(axum::Json(Shown::from(post)).into_response())
}

/// Delete a post
///
/// Once answered, the post is in no feed. Takes neither parameters nor a body.
#[utoipa::path(
    delete,
    path = "/posts/{id}",
    operation_id = "deletePost",
    tag = "feed",
    params(
        ("id" = i64, Path, minimum = 0, maximum = 9007199254740991u64),
        ("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry return the same answer"),
    ),
    responses(
        (status = 200, description = "Deleted", body = Said),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "No such post, or already deleted", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Not deleted, or outcome unknown", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
pub async fn delete(
    State(feed): State<Feed>,
    context: RequestContext,
    id: Result<Path<String>, PathRejection>,
    _: Nothing,
) -> Result<Response<Body>, Problem> {
    let id = post_of(id)?;
    let (desk, meta) = (feed.desk()?, meta(&context, ROUTE, id.to_string().as_bytes())?);
    // The post's author, who is the key of the event, is only known after the deletion.
    if context.principal.is_restricted() {
        // A post never changes its author.
        let found = desk.feeds.reads().posts(&[id]).await.map_err(Problem::postgres_unavailable)?;
        found.iter().try_for_each(|post| context.principal.may_act_for(&post.author_id))?;
    }
    let _admitted = desk.backlog.admit("", 0)?;
    let author = writes::delete_post(&desk.pool, &meta, id).await.map_err(|error| Refusal::of(&error))?;
    if author.is_none() {
        let repeated = writes::was_deleted(&desk.pool, &meta, id).await.map_err(Problem::postgres_unavailable)?;
        if !repeated {
            return Err(not_found(id));
        }
    }
    desk.feeds.note_gone([format!("p{id}")]).await;
    desk.hint.give().await;
    Ok(axum::Json(Said { message: "post deleted successfully" }).into_response())
}
