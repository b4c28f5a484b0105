//! HTTP routes of the feed capability.

mod feeds;
mod follows;
mod posts;

use std::fmt::Display;

use axum::{
    body::Body,
    extract::{Path, Request, rejection::PathRejection},
    http::{HeaderValue, Response, StatusCode, header},
};
use postrider_http::{
    Code, Problem, RequestContext,
    body::{self, RequestBody},
    context::require_content_type,
    decode::{is_too_large, quoted},
    params,
    shortcut::ShortCuts,
};
use postrider_openapi::tagged;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Desk, Feed,
    model::{MAX_ID_BYTES, MAX_POST_ID, check_field},
    writes::{Meta, Outcome},
};
use crate::codes;

/// Returns the routes of the capability with their OpenAPI descriptions.
pub fn routes(feed: Feed) -> OpenApiRouter {
    let head = tagged("feed", "Posts, follows, and the feeds that result from them.");
    OpenApiRouter::with_openapi(head)
        .routes(routes!(posts::create))
        .routes(routes!(posts::show, posts::delete))
        .routes(routes!(follows::follow))
        .routes(routes!(follows::unfollow))
        .routes(routes!(follows::followers))
        .routes(routes!(follows::following))
        .routes(routes!(follows::erase))
        .routes(routes!(feeds::feed))
        .with_state(feed)
}

/// Adds shortcuts past the router for the busiest routes: feeds are read most, and posts are
/// written most.
pub fn short_cuts(short_cuts: ShortCuts, feed: &Feed) -> ShortCuts {
    posts::short_cut(feeds::short_cut(short_cuts, feed), feed)
}

impl Feed {
    fn desk(&self) -> Result<&Desk, Problem> {
        let off = || Problem::new(Code::POSTGRES_UNAVAILABLE, "set `postgres.url` to use feeds; it is not set");
        self.inner.desk.as_ref().ok_or_else(off)
    }

    /// Reads the body of a write.
    async fn body(&self, request: Request) -> Result<RequestBody, Problem> {
        require_content_type(request.headers(), &["application/json"])?;
        body::read(request, self.inner.http.limits()).await
    }
}

/// Returns the user in the path, for whom the caller must be allowed to act.
fn user_of(context: &RequestContext, path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let user_id = params::from_path("user_id", path)?;
    check_field("user_id", &user_id, MAX_ID_BYTES).map_err(|flaw| flaw.problem().at_parameter("user_id"))?;
    context.principal.may_act_for(&user_id)?;
    Ok(user_id)
}

/// Describes a write. `content` is the body, or the part of the path that identifies the object.
fn meta(context: &RequestContext, route: &str, content: &[u8]) -> Result<Meta, Problem> {
    let event_id = context.event_id(route, None, &[content])?;
    let traceparent = String::from_utf8_lossy(&context.trace.traceparent()).into_owned();
    Ok(Meta { event_id, keyed: context.has_idempotency_key(), traceparent })
}

fn settled<T>(outcome: Outcome<T>) -> Result<T, Problem> {
    match outcome {
        Outcome::Done(outcome) => Ok(outcome),
        Outcome::Erased => {
            Err(Problem::new(codes::BEING_ERASED, "an account in this request is being erased; retry later"))
        }
    }
}

/// Returns the post's id from a path.
fn post_of(path: Result<Path<String>, PathRejection>) -> Result<i64, Problem> {
    let text = params::from_path("id", path)?;
    match text.parse() {
        Ok(id) if (1..=MAX_POST_ID).contains(&id) => Ok(id),
        Err(_) if !is_too_large(&text) => {
            let detail = format!("`id` must be a whole number (got {})", quoted(&text));
            Err(invalid(detail).at_parameter("id"))
        }
        _ => Err(not_found(&text)),
    }
}

fn bad_cursor(text: &str) -> Problem {
    invalid(format!("`cursor` must be the `next_cursor` of a page (got {})", quoted(text))).at_parameter("cursor")
}

fn not_found(id: impl Display) -> Problem {
    Problem::new(codes::POST_NOT_FOUND, format!("post {id} does not exist or was deleted"))
}

fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(Code::INVALID_REQUEST, detail)
}

fn json(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
