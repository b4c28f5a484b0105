//! Rate, errors and duration of every route, with OpenTelemetry's metric names.

use std::{cell::RefCell, sync::Arc, time::Duration};

use axum::http::Method;
use metrics::{Gauge, Histogram, gauge, histogram};

/// Histogram of the answers of one route, by method and status.
struct Answers {
    route: String,
    method: Method,
    status: u16,
    took: Histogram,
}

thread_local! {
    /// Handles of this thread, the last used one first, which avoids a lock and a lookup in the
    /// registry. There is one per route, method and status.
    static ANSWERS: RefCell<Vec<Answers>> = const { RefCell::new(Vec::new()) };
}

/// Gauge of active requests.
pub struct RouteMetrics {
    active: Gauge,
}

impl Default for RouteMetrics {
    fn default() -> Self {
        Self { active: gauge!("http_server_active_requests") }
    }
}

/// Counts a request as active until dropped, also if the client disconnects.
pub struct Active(Arc<RouteMetrics>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.decrement(1);
    }
}

impl RouteMetrics {
    pub fn enter(route_metrics: &Arc<Self>) -> Active {
        route_metrics.active.increment(1);
        Active(route_metrics.clone())
    }
}

impl Active {
    /// Records the answer and its duration.
    pub fn observe(&self, route: &str, method: &Method, status: u16, took: Duration) {
        let method = known(method);
        ANSWERS.with_borrow_mut(|answers| {
            let known = |kept: &Answers| kept.status == status && kept.method == method && kept.route == route;
            let at = answers.iter().position(known).unwrap_or_else(|| {
                let histogram = histogram!(
                    "http_server_request_duration_seconds",
                    "http_request_method" => method.to_string(),
                    "http_route" => route.to_owned(),
                    "http_response_status_code" => status.to_string(),
                );
                answers.push(Answers { route: route.to_owned(), method: method.clone(), status, took: histogram });
                answers.len() - 1
            });
            answers.swap(0, at);
            answers[0].took.record(took);
        });
    }
}

/// Bounds the values of the label, because a client may send any word as a method; unknown ones
/// count as `TRACE`.
fn known(method: &Method) -> Method {
    const KNOWN: [Method; 8] = [
        Method::GET,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::HEAD,
        Method::OPTIONS,
        Method::CONNECT,
    ];
    if KNOWN.contains(method) { method.clone() } else { Method::TRACE }
}
