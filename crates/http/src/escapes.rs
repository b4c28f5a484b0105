//! Refuses paths whose percent-encoding is broken. The router would take `%zz` as it is, and so name
//! another key than the client means.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    http::Response,
    response::IntoResponse,
};
use futures_util::future::Either;
use tower::{Layer, Service};

use super::{code::Code, decode::shortened, problem::Problem};

/// Returns the first `%` that two hexadecimal digits do not follow, with what does.
pub(super) fn broken_escape(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&byte| byte == b'%') {
        rest = &rest[at..];
        match rest {
            [_, high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => rest = &rest[3..],
            _ => return Some(&rest[..rest.len().min(3)]),
        }
    }
    None
}

/// Returns the rest of the sentence about a broken escape.
pub(super) fn explain(escape: &[u8]) -> String {
    let escape = shortened(&String::from_utf8_lossy(escape));
    format!("has the broken percent-encoding `{escape}`; write a `%` itself as `%25`")
}

/// Layer around the routes of a router, within the [outer one](crate::layer::OuterLayer).
#[derive(Clone)]
pub struct EscapesLayer;

impl<S> Layer<S> for EscapesLayer {
    type Service = Escapes<S>;

    fn layer(&self, inner: S) -> Escapes<S> {
        Escapes(inner)
    }
}

/// Service of [`EscapesLayer`].
#[derive(Clone)]
pub struct Escapes<S>(S);

impl<S> Service<Request> for Escapes<S>
where
    S: Service<Request, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Result<Response<Body>, Infallible>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        match broken_escape(request.uri().path().as_bytes()) {
            Some(escape) => Either::Left(ready(Ok(refusal(&request, escape).into_response()))),
            None => Either::Right(self.0.call(request)),
        }
    }
}

/// Returns the problem, which names the parameter that the escape is in.
#[cold]
fn refusal(request: &Request, escape: &[u8]) -> Problem {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let mut segments = route.split('/').zip(request.uri().path().split('/'));
    let within = segments.find(|(_, segment)| broken_escape(segment.as_bytes()).is_some());
    let parameter = within.and_then(|(name, _)| name.strip_prefix('{')?.strip_suffix('}'));
    match parameter {
        Some(name) => Problem::new(Code::INVALID_REQUEST, format!("`{name}` {}", explain(escape))).at_parameter(name),
        None => Problem::new(Code::INVALID_REQUEST, format!("the path {}", explain(escape))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_escape_needs_two_hexadecimal_digits() {
        for text in ["", "a", "%25", "a%2Fb%c3%A4", "%2525"] {
            assert_eq!(broken_escape(text.as_bytes()), None, "{text}");
        }
        for (text, escape) in [("%", "%"), ("100%", "%"), ("%2", "%2"), ("a%zz%20", "%zz"), ("%25%2g", "%2g")] {
            assert_eq!(broken_escape(text.as_bytes()), Some(escape.as_bytes()), "{text}");
        }
    }
}
