//! Renders problems as answers, and names near misses in their headers.

use std::{future::poll_fn, pin::pin};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    http::{Method, Response, StatusCode, header},
    middleware::Next,
};

use super::{code::Code, problem::Problem, warning};

/// Middleware of a listener without request ids and request metrics, such as that of operators:
/// renders problems and names near misses, as [`OuterLayer`](crate::layer::OuterLayer) does.
pub async fn plainly(request: Request, next: Next) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut near_misses = Vec::new();
    let mut answering = pin!(next.run(request));
    let mut response = poll_fn(|cx| {
        let polled = answering.as_mut().poll(cx);
        near_misses.append(&mut warning::take());
        polled
    })
    .await;
    if let Some(problem) = problem_of(&mut response, &method, &path) {
        response = rendered(&problem, &response, &path);
    }
    warning::count(route.as_ref().map_or("unmatched", MatchedPath::as_str), &near_misses);
    warning::name(response.headers_mut(), &near_misses);
    response
}

/// Returns the problem of an answer, or the one for an error of the router, which has no body.
pub(super) fn problem_of(response: &mut Response<Body>, method: &Method, path: &str) -> Option<Problem> {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return None;
    }
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        return Some(problem);
    }
    match status {
        _ if response.headers().contains_key(header::CONTENT_TYPE) => None,
        StatusCode::METHOD_NOT_ALLOWED => {
            Some(Problem::new(Code::METHOD_NOT_ALLOWED, format!("method {method} is not allowed for {path}")))
        }
        StatusCode::NOT_FOUND => Some(Problem::new(Code::NOT_FOUND, format!("there is no route {path}"))),
        _ => None,
    }
}

/// Returns the answer with a problem as its body, and with its own headers.
pub(super) fn rendered(problem: &Problem, response: &Response<Body>, path: &str) -> Response<Body> {
    let mut rendered = problem.respond(Some(path));
    for (name, value) in response.headers() {
        rendered.headers_mut().entry(name).or_insert_with(|| value.clone());
    }
    rendered.headers_mut().remove(header::CONTENT_LENGTH);
    rendered
}
