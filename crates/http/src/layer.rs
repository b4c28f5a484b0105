//! The outer layer of every route: request id, trace, metrics, panics, and problem answers.

use std::{
    convert::Infallible,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    http::{HeaderValue, Method, Response, StatusCode, Uri},
    response::IntoResponse,
};
use pin_project_lite::pin_project;
use postrider_identity::Principal;
use postrider_telemetry::trace_context::{self, TraceContext};
use tower::{Layer, Service};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{
    client_address::ClientAddress,
    code::Code,
    context::{REQUEST_ID, RequestContext, TRACEPARENT},
    gate::{Checked, Gate},
    problem::Problem,
    render,
    route_metrics::{Active, RouteMetrics},
    warning::{self, NearMiss},
};

/// Layer around a router's routes and fallback.
#[derive(Clone, Default)]
pub struct OuterLayer {
    route_metrics: Arc<RouteMetrics>,
    gate: Gate,
}

impl OuterLayer {
    pub fn new(gate: Gate) -> Self {
        Self { gate, ..Self::default() }
    }
}

impl<S> Layer<S> for OuterLayer {
    type Service = Outer<S>;

    fn layer(&self, inner: S) -> Outer<S> {
        Outer { inner, route_metrics: self.route_metrics.clone(), gate: self.gate.clone() }
    }
}

/// Service of [`OuterLayer`].
#[derive(Clone)]
pub struct Outer<S> {
    inner: S,
    route_metrics: Arc<RouteMetrics>,
    gate: Gate,
}

impl<S> Service<Request> for Outer<S>
where
    S: Service<Request, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering<Gated<S::Future>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let matched = request.extensions().get::<MatchedPath>().cloned();
        let (seen, mut context) =
            Seen::new(&request, matched.map_or(Route::Unmatched, Route::Matched), &self.route_metrics);
        let gated = match self.gate.check(&request, seen.route.known(), context.client) {
            Checked::Passes(principal) => {
                context.principal = principal;
                request.extensions_mut().insert(context);
                Gated::Passed { answer: self.inner.call(request) }
            }
            Checked::Refused(problem) => Gated::Refused { problem: Some(problem) },
            Checked::Waits(waiting) => {
                let mut inner = self.inner.clone();
                let answer = async move {
                    context.principal = match waiting.await {
                        Ok(principal) => principal,
                        Err(problem) => return Ok(problem.into_response()),
                    };
                    request.extensions_mut().insert(context);
                    inner.call(request).await
                };
                Gated::Waits { answer: Box::pin(answer) }
            }
        };
        Answering::new(gated, seen)
    }
}

pin_project! {
    /// Pending answer to a request that the gate has seen.
    #[project = GatedProjection]
    pub enum Gated<F> {
        Passed { #[pin] answer: F },
        Refused { problem: Option<Problem> },
        Waits { answer: Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>> },
    }
}

impl<F: Future<Output = Result<Response<Body>, Infallible>>> Future for Gated<F> {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            GatedProjection::Passed { answer } => answer.poll(cx),
            // Never polled again after it was ready.
            GatedProjection::Refused { problem } => {
                problem.take().map_or(Poll::Pending, |problem| Poll::Ready(Ok(problem.into_response())))
            }
            GatedProjection::Waits { answer } => answer.as_mut().poll(cx),
        }
    }
}

pin_project! {
    /// Pending answer, within the request's span and guarded against panics.
    pub struct Answering<F> {
        #[pin]
        inner: F,
        seen: Option<Seen>,
    }
}

impl<F> Answering<F> {
    pub(super) fn new(inner: F, seen: Seen) -> Self {
        Self { inner, seen: Some(seen) }
    }
}

impl<F: Future<Output = Result<Response<Body>, Infallible>>> Future for Answering<F> {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let polled = {
            let _entered = this.seen.as_ref().filter(|seen| !seen.span.is_none()).map(|seen| seen.span.enter());
            catch_unwind(AssertUnwindSafe(|| this.inner.poll(cx)))
        };
        let mut near_misses = warning::take();
        if let Some(seen) = this.seen.as_mut().filter(|_| !near_misses.is_empty()) {
            seen.near_misses.append(&mut near_misses);
        }
        let answer = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Ok(response))) => Some(response),
            Ok(Poll::Ready(Err(never))) => match never {},
            Err(_) => None,
        };
        // The future is never polled again after it was ready.
        let Some(seen) = this.seen.take() else { return Poll::Pending };
        Poll::Ready(Ok(seen.finish(answer)))
    }
}

/// Route of a request.
pub(super) enum Route {
    Matched(MatchedPath),
    Known(&'static str),
    Unmatched,
}

impl Route {
    fn as_str(&self) -> &str {
        match self {
            Self::Matched(path) => path.as_str(),
            Self::Known(path) => path,
            Self::Unmatched => "unmatched",
        }
    }

    /// Returns the path as the router knows it, if a route has it.
    fn known(&self) -> Option<&str> {
        (!matches!(self, Self::Unmatched)).then(|| self.as_str())
    }
}

/// State of a request that is kept until its answer.
pub(super) struct Seen {
    started: Instant,
    route: Route,
    method: Method,
    uri: Uri,
    request_id: HeaderValue,
    client: Option<IpAddr>,
    trace: TraceContext,
    span: tracing::Span,
    active: Active,
    near_misses: Vec<NearMiss>,
}

impl Seen {
    /// Counts the request, and creates its context.
    pub(super) fn new(request: &Request, route: Route, route_metrics: &Arc<RouteMetrics>) -> (Self, RequestContext) {
        let started = Instant::now();
        let mut context = RequestContext::new(request.headers(), Principal::nobody());
        context.client = request.extensions().get().map(|ClientAddress(client)| *client);
        let recorded = context.trace.sampled && trace_context::is_recording();
        let span = if recorded { open_span(request, route.as_str(), &mut context) } else { tracing::Span::none() };
        let seen = Self {
            started,
            route,
            method: request.method().clone(),
            uri: request.uri().clone(),
            request_id: context.request_id.clone(),
            client: context.client,
            trace: context.trace,
            span,
            active: RouteMetrics::enter(route_metrics),
            near_misses: Vec::new(),
        };
        (seen, context)
    }

    /// Renders problems, adds the headers that every answer has, and records metrics. `None` means
    /// that the handler panicked.
    fn finish(self, answer: Option<Response<Body>>) -> Response<Body> {
        let mut response = match answer {
            Some(response) => self.with_problem(response),
            None => self.panicked(),
        };
        let status = response.status().as_u16();
        let headers = response.headers_mut();
        if let Ok(traceparent) = HeaderValue::from_bytes(&self.trace.traceparent()) {
            headers.insert(TRACEPARENT.clone(), traceparent);
        }
        if !self.near_misses.is_empty() {
            warning::count(self.route.as_str(), &self.near_misses);
            warning::name(headers, &self.near_misses);
        }
        if !self.span.is_none() {
            self.span.record("http.response.status_code", status);
        }
        self.active.observe(self.route.as_str(), &self.method, status, self.started.elapsed());
        headers.insert(REQUEST_ID.clone(), self.request_id);
        response
    }

    fn panicked(&self) -> Response<Body> {
        let (request_id, path) = (self.request_id.to_str().unwrap_or_default(), self.uri.path());
        let client = self.client.map(tracing::field::display);
        tracing::error!(request.id = request_id, http.path = path, client.address = client, "handler panicked");
        Problem::new(Code::INTERNAL, "the handler failed; look for the request id in the log").respond(Some(path))
    }

    fn with_problem(&self, response: Response<Body>) -> Response<Body> {
        let status = response.status();
        if status.is_client_error() || status.is_server_error() {
            render_problem(response, status, self)
        } else {
            response
        }
    }
}

/// Opens the server span and makes it the parent of everything that the request causes.
fn open_span(request: &Request, route: &str, context: &mut RequestContext) -> tracing::Span {
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{} {route}", request.method()),
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = route,
        http.response.status_code = tracing::field::Empty,
        request.id = context.request_id.to_str().unwrap_or_default(),
        client.address = context.client.map(tracing::field::display),
    );
    let parent = context.parent.map_or_else(opentelemetry::Context::new, TraceContext::to_otel);
    if span.set_parent(parent).is_ok()
        && let Some(own) = TraceContext::from_otel(&span.context())
    {
        context.trace = own;
    }
    span
}

fn render_problem(mut response: Response<Body>, status: StatusCode, seen: &Seen) -> Response<Body> {
    let path = seen.uri.path();
    let Some(problem) = render::problem_of(&mut response, &seen.method, path) else { return response };
    if status.is_server_error() {
        let request_id = seen.request_id.to_str().unwrap_or_default();
        let (code, client) = (problem.code.word, seen.client.map(tracing::field::display));
        tracing::debug!(
            request.id = request_id,
            error.code = code,
            client.address = client,
            "request refused: {}",
            problem.detail
        );
    }
    render::rendered(&problem, &response, path)
}
