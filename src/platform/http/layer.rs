//! The outer layer of every route: request id, trace, metrics, panics, and problem answers.

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    http::{HeaderValue, Method, Response, StatusCode, Uri, header},
};
use futures_util::FutureExt;
use tower::{Layer, Service};
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{
    code::Code,
    context::{REQUEST_ID, RequestContext, TRACEPARENT},
    problem::Problem,
    red::Red,
};
use crate::platform::trace_context::{self, TraceContext};

/// Wraps a router's routes and fallback.
#[derive(Clone, Default)]
pub struct OuterLayer {
    red: Arc<Red>,
}

impl<S> Layer<S> for OuterLayer {
    type Service = Outer<S>;

    fn layer(&self, inner: S) -> Outer<S> {
        Outer { inner, red: self.red.clone() }
    }
}

/// See [`OuterLayer`].
#[derive(Clone)]
pub struct Outer<S> {
    inner: S,
    red: Arc<Red>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> Service<Request> for Outer<S>
where
    S: Service<Request, Response = Response<Body>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Answer {
        let started = Instant::now();
        let mut context = RequestContext::from_headers(request.headers());
        let recorded = context.trace.sampled && trace_context::is_recording();
        let span = if recorded { open_span(&request, &mut context) } else { tracing::Span::none() };
        let seen = Seen {
            route: request.extensions().get::<MatchedPath>().cloned(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            context: context.clone(),
        };
        request.extensions_mut().insert(context);
        let active = self.red.enter();
        let answer = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
        let red = self.red.clone();
        let recorded = span.clone();
        let finish = async move {
            let response = match answer.await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(_) => panicked(&seen),
            };
            let response = finish(response, &seen);
            recorded.record("http.response.status_code", response.status().as_u16());
            let route = seen.route.as_ref().map_or("unmatched", MatchedPath::as_str);
            red.observe(route, &seen.method, response.status().as_u16(), started.elapsed());
            drop(active);
            Ok(response)
        };
        if span.is_none() { Box::pin(finish) } else { Box::pin(finish.instrument(span)) }
    }
}

struct Seen {
    route: Option<MatchedPath>,
    method: Method,
    uri: Uri,
    context: RequestContext,
}

/// Opens the server span and makes it the parent of what the request causes.
fn open_span(request: &Request, context: &mut RequestContext) -> tracing::Span {
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str);
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{} {route}", request.method()),
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = route,
        http.response.status_code = tracing::field::Empty,
        request.id = context.request_id.to_str().unwrap_or_default(),
    );
    let parent = context.parent.map_or_else(opentelemetry::Context::new, TraceContext::to_otel);
    if span.set_parent(parent).is_ok()
        && let Some(own) = TraceContext::from_otel(&span.context())
    {
        context.trace = own;
    }
    span
}

fn panicked(seen: &Seen) -> Response<Body> {
    let request_id = seen.context.request_id.to_str().unwrap_or_default();
    tracing::error!(request.id = request_id, http.path = seen.uri.path(), "a handler panicked");
    Problem::new(Code::Internal, "a handler failed; the log has the request id").respond(Some(seen.uri.path()))
}

/// Renders problems and adds the headers that every answer has.
fn finish(mut response: Response<Body>, seen: &Seen) -> Response<Body> {
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        response = render_problem(response, status, seen);
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID.clone(), seen.context.request_id.clone());
    if let Ok(traceparent) = HeaderValue::from_bytes(&seen.context.trace.traceparent()) {
        headers.insert(TRACEPARENT.clone(), traceparent);
    }
    response
}

fn render_problem(mut response: Response<Body>, status: StatusCode, seen: &Seen) -> Response<Body> {
    let path = seen.uri.path();
    let problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if response.headers().contains_key(header::CONTENT_TYPE) => return response,
        None if status == StatusCode::METHOD_NOT_ALLOWED => {
            Problem::new(Code::MethodNotAllowed, format!("{} is not a method of {path}", seen.method))
        }
        None if status == StatusCode::NOT_FOUND => Problem::new(Code::NotFound, format!("{path} is not a route")),
        None => return response,
    };
    if status.is_server_error() {
        let request_id = seen.context.request_id.to_str().unwrap_or_default();
        tracing::debug!(request.id = request_id, error.code = problem.code.word(), "refused: {}", problem.detail);
    }
    let mut rendered = problem.respond(Some(path));
    for (name, value) in response.headers() {
        rendered.headers_mut().entry(name).or_insert_with(|| value.clone());
    }
    rendered.headers_mut().remove(header::CONTENT_LENGTH);
    rendered
}
