//! Shortcuts past the router, for the busiest routes.
//!
//! The router clones a route's services and boxes their futures for every request. A shortcut calls
//! the same handler under the same layer. It takes plain requests only: other methods, and paths
//! that need decoding, go through the router.

use std::{convert::Infallible, net::IpAddr, pin::Pin, sync::Arc};

use axum::{
    body::Body,
    extract::Request,
    http::{Method, Response, header},
    response::IntoResponse,
};

use super::{
    context::RequestContext,
    gate::{Checked, Gate},
    layer::{Answering, Route, Seen},
    route_metrics::RouteMetrics,
};

/// Answer of a shortcut's handler.
pub(super) type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;
type Handler = Arc<dyn Fn(Request, RequestContext) -> Answer + Send + Sync>;

/// The shortcuts of a server.
#[derive(Default)]
pub struct ShortCuts {
    all: Vec<ShortCut>,
    route_metrics: Arc<RouteMetrics>,
    gate: Gate,
    /// Set if every request goes through the router.
    off: bool,
}

/// One shortcut.
pub(super) struct ShortCut {
    method: Method,
    /// Path as the router knows it.
    route: &'static str,
    handler: Handler,
    route_metrics: Arc<RouteMetrics>,
    gate: Gate,
}

impl ShortCuts {
    pub fn new(gate: Gate) -> Self {
        Self { gate, ..Self::default() }
    }

    /// Makes every request go through the router, for layers that only it has.
    #[must_use]
    pub fn off_if(mut self, off: bool) -> Self {
        self.off = off;
        self
    }

    /// Adds a shortcut. The route is a path; its last segment may be a `{parameter}`.
    #[must_use]
    pub fn with<H, F>(mut self, method: Method, route: &'static str, handler: H) -> Self
    where
        H: Fn(Request, RequestContext) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request, context| {
            let answer = handler(request, context);
            Box::pin(async move { Ok(answer.await) })
        });
        let (route_metrics, gate) = (self.route_metrics.clone(), self.gate.clone());
        self.all.push(ShortCut { method, route, handler, route_metrics, gate });
        self
    }

    /// Returns the shortcut for this request.
    pub(super) fn find(&self, request: &Request) -> Option<&ShortCut> {
        // Answers to pages of other origins need more headers, which the router adds.
        if self.off || request.headers().contains_key(header::ORIGIN) {
            return None;
        }
        let (method, path) = (request.method(), request.uri().path());
        self.all.iter().find(|one| one.method == method && matches(one.route, path))
    }
}

impl ShortCut {
    pub fn call(&self, request: Request, client: IpAddr) -> Answering<Answer> {
        let (seen, mut context) = Seen::new(&request, Route::Known(self.route), &self.route_metrics);
        context.client = Some(client);
        let answer: Answer = match self.gate.check(&request, Some(self.route), context.client) {
            Checked::Passes(principal) => {
                context.principal = principal;
                (self.handler)(request, context)
            }
            Checked::Refused(problem) => Box::pin(std::future::ready(Ok(problem.into_response()))),
            Checked::Waits(waiting) => {
                let handler = self.handler.clone();
                Box::pin(async move {
                    context.principal = match waiting.await {
                        Ok(principal) => principal,
                        Err(problem) => return Ok(problem.into_response()),
                    };
                    handler(request, context).await
                })
            }
        };
        Answering::new(answer, seen)
    }
}

/// Returns whether the path matches this route, with a parameter that needs no decoding.
fn matches(route: &str, path: &str) -> bool {
    let Some((prefix, _)) = route.split_once('{') else { return route == path };
    path.strip_prefix(prefix).is_some_and(|parameter| {
        !parameter.is_empty() && parameter.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~:@".contains(&byte))
    })
}

/// Returns the last segment of a path that matched a shortcut with a parameter.
pub fn parameter(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, last)| last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_take_the_short_cut() {
        assert!(matches("/produce", "/produce"));
        assert!(!matches("/produce", "/produce/"));
        assert!(matches("/pull/{key}", "/pull/user:1-a.b_c~@"));
        for other in ["/pull", "/pull/", "/pull/a/b", "/pull/a%20b", "/pull/a%2Fb", "/pull/\u{e9}", "/push/a"] {
            assert!(!matches("/pull/{key}", other), "{other}");
        }
        assert_eq!(parameter("/pull/a"), "a");
    }
}
