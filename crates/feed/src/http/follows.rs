//! HTTP routes of follows, and the erasure of accounts.

use axum::{
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{Response, StatusCode},
    response::IntoResponse,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use postrider_http::{
    Bounded, Params, Problem, ProblemBody, RequestContext,
    body::RequestBody,
    decode,
    params::Nothing,
    refusals::{JsonWrite, PostgresRead, refusals},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Feed, bad_cursor, meta, posts::Said, settled, user_of};
use crate::{
    group::Refusal,
    model::{self, FollowDraft},
    reads::Side,
    writes::{self, Pair},
};

refusals! {
    /// Refusals of bodies with a follower and a followee.
    Following {
        400: "Malformed, a field is empty, or both ids are the same",
        409: "One of the accounts is being erased",
        422: "A field is too long",
    }
}

/// Follow a user
///
/// The followee's posts, including older ones, appear in the follower's feed within moments.
/// Following again changes nothing.
#[utoipa::path(
    post,
    path = "/follow",
    operation_id = "followUser",
    tag = "feed",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry change nothing, even if the user was unfollowed in between")),
    request_body = FollowDraft,
    responses(
        (status = 200, description = "Stored", body = Said),
        Following,
        JsonWrite,
    ),
)]
pub async fn follow(
    State(feed): State<Feed>,
    context: RequestContext,
    request: Request,
) -> Result<Response<Body>, Problem> {
    let body = feed.body(request).await?;
    let pair = pair(&context, &body, decode::object(&body)?, "/follow", "USER_FOLLOWED")?;
    let desk = feed.desk()?;
    let _admitted = desk.backlog.admit(&pair.followee_id, pair.value.len())?;
    settled(desk.follows.write(pair).await?)?;
    Ok(axum::Json(Said { message: "followed successfully" }).into_response())
}

/// Unfollow a user
///
/// Once answered, the followee's posts are no longer in the feed. Unfollowing a user who is not
/// followed changes nothing. Unknown fields are refused.
#[utoipa::path(
    post,
    path = "/unfollow",
    operation_id = "unfollowUser",
    tag = "feed",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry change nothing, even if the user was followed in between")),
    request_body = FollowDraft,
    responses(
        (status = 200, description = "Stored", body = Said),
        Following,
        JsonWrite,
    ),
)]
pub async fn unfollow(
    State(feed): State<Feed>,
    context: RequestContext,
    request: Request,
) -> Result<Response<Body>, Problem> {
    let body = feed.body(request).await?;
    let pair = pair(&context, &body, decode::strict(&body)?, "/unfollow", "USER_UNFOLLOWED")?;
    let (desk, member) = (feed.desk()?, format!("u{}", pair.follower_id));
    let _admitted = desk.backlog.admit(&pair.followee_id, pair.value.len())?;
    // If nothing changed, no event would ever remove the member from the `gone` list.
    if settled(desk.unfollows.write(pair).await?)? {
        desk.feeds.note_gone([member]).await;
    }
    Ok(axum::Json(Said { message: "unfollowed successfully" }).into_response())
}

fn pair(
    context: &RequestContext,
    body: &RequestBody,
    draft: FollowDraft<'_>,
    route: &str,
    kind: &str,
) -> Result<Pair, Problem> {
    draft.check()?;
    context.principal.may_act_for(&draft.follower_id)?;
    let meta = meta(context, route, body)?;
    let value = model::followed(meta.event_id, kind, &draft.follower_id, &draft.followee_id);
    let FollowDraft { follower_id, followee_id } = draft;
    Ok(Pair { meta, follower_id: follower_id.into_owned(), followee_id: followee_id.into_owned(), value })
}

/// Erase an account
///
/// Erases the account's posts, its follows in both directions, and its feed. Once answered, none of
/// it is shown; until all of it is deleted, writes for the account get 409. Erasing again changes
/// nothing. Takes neither parameters nor a body.
#[utoipa::path(
    delete,
    path = "/users/{user_id}",
    operation_id = "eraseUser",
    tag = "feed",
    params(
        ("user_id" = String, Path, min_length = 1, max_length = 255),
        ("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Determines the id of the event"),
    ),
    responses(
        (status = 202, description = "The erasure has begun", body = Said),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The id is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Not stored, or outcome unknown", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
pub async fn erase(
    State(feed): State<Feed>,
    context: RequestContext,
    user_id: Result<Path<String>, PathRejection>,
    _: Nothing,
) -> Result<Response<Body>, Problem> {
    let user_id = user_of(&context, user_id)?;
    let (desk, meta) = (feed.desk()?, meta(&context, "/users", user_id.as_bytes())?);
    let value = model::erased(meta.event_id, &user_id);
    let _admitted = desk.backlog.admit(&user_id, value.len())?;
    writes::erase(&desk.pool, &meta, &user_id, &value).await.map_err(|error| Refusal::of(&error))?;
    // A timeline cannot have posts of one author beyond this number of newest ones.
    let newest = 2 * feed.inner.config.timeline_ids;
    let posts = desk.feeds.reads().newest_of_erased(&user_id, newest).await.map_err(Problem::postgres_unavailable)?;
    let members = posts.into_iter().map(|id| format!("p{id}")).chain([format!("u{user_id}")]);
    desk.feeds.note_gone(members).await;
    desk.hint.give().await;
    Ok((StatusCode::ACCEPTED, axum::Json(Said { message: "erasure accepted" })).into_response())
}

/// A page of a user's followers.
#[derive(Serialize, ToSchema)]
pub struct FollowersPage {
    user_id: String,
    /// Follower ids in ascending order.
    followers: Vec<String>,
    /// Cursor of the next page; null on the last page.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// A page of the users whom a user follows.
#[derive(Serialize, ToSchema)]
pub struct FollowingPage {
    user_id: String,
    /// Followee ids in ascending order.
    following: Vec<String>,
    /// Cursor of the next page; null on the last page.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// Number of users in a page by default.
const DEFAULT_LIMIT: usize = 20;

#[derive(Deserialize)]
pub struct ListQuery {
    limit: Option<Bounded<1, 100>>,
    cursor: Option<String>,
}

/// List a user's followers
#[utoipa::path(
    get,
    path = "/users/{user_id}/followers",
    operation_id = "listFollowers",
    tag = "feed",
    params(
        ("user_id" = String, Path, min_length = 1, max_length = 255),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 100, description = "Maximum number of users; default 20"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the previous page"),
    ),
    responses(
        (status = 200, description = "A page of followers", body = FollowersPage),
        (status = 422, description = "The id is too long, or the limit out of range", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
pub async fn followers(
    State(feed): State<Feed>,
    context: RequestContext,
    user_id: Result<Path<String>, PathRejection>,
    Params(query): Params<ListQuery>,
) -> Result<Response<Body>, Problem> {
    let (user_id, followers, next_cursor) = list(&feed, &context, Side::Followers, user_id, query).await?;
    Ok(axum::Json(FollowersPage { user_id, followers, next_cursor }).into_response())
}

/// List the users whom a user follows
#[utoipa::path(
    get,
    path = "/users/{user_id}/following",
    operation_id = "listFollowing",
    tag = "feed",
    params(
        ("user_id" = String, Path, min_length = 1, max_length = 255),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 100, description = "Maximum number of users; default 20"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the previous page"),
    ),
    responses(
        (status = 200, description = "A page of followed users", body = FollowingPage),
        (status = 422, description = "The id is too long, or the limit out of range", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
pub async fn following(
    State(feed): State<Feed>,
    context: RequestContext,
    user_id: Result<Path<String>, PathRejection>,
    Params(query): Params<ListQuery>,
) -> Result<Response<Body>, Problem> {
    let (user_id, following, next_cursor) = list(&feed, &context, Side::Following, user_id, query).await?;
    Ok(axum::Json(FollowingPage { user_id, following, next_cursor }).into_response())
}

async fn list(
    feed: &Feed,
    context: &RequestContext,
    side: Side,
    user_id: Result<Path<String>, PathRejection>,
    query: ListQuery,
) -> Result<(String, Vec<String>, Option<String>), Problem> {
    let user_id = user_of(context, user_id)?;
    let limit = query.limit.map_or(DEFAULT_LIMIT, Bounded::as_usize);
    let after = query.cursor.as_deref().map_or(Ok(String::new()), user_after)?;
    let users = feed.desk()?.feeds.reads().users(side, &user_id, &after, limit + 1).await;
    let mut users = users.map_err(Problem::postgres_unavailable)?;
    let more = users.len() > limit;
    users.truncate(limit);
    let next = users.last().filter(|_| more).map(|last| BASE64_URL_SAFE_NO_PAD.encode(last));
    Ok((user_id, users, next))
}

fn user_after(cursor: &str) -> Result<String, Problem> {
    let text = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    text.filter(|text| !text.contains('\0')).ok_or_else(|| bad_cursor(cursor))
}
