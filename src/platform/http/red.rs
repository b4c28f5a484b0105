//! Rate, errors and duration of every route, by OpenTelemetry's names.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use axum::http::Method;
use metrics::{Gauge, Histogram, gauge, histogram};

/// The histograms of one route, by method and status.
type Answers = HashMap<(Method, u16), Histogram>;

/// Requests seen, with metric handles kept so that the hot path does no registry look-up.
pub struct Red {
    routes: RwLock<HashMap<String, Answers>>,
    active: Gauge,
}

impl Default for Red {
    fn default() -> Self {
        Self { routes: RwLock::default(), active: gauge!("http_server_active_requests") }
    }
}

/// Counts a request as active until it is dropped, also when the client goes away.
pub struct Active(Gauge);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

impl Red {
    pub fn enter(&self) -> Active {
        self.active.increment(1);
        Active(self.active.clone())
    }

    pub fn observe(&self, route: &str, method: &Method, status: u16, took: Duration) {
        let key = (known(method), status);
        {
            let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(histogram) = routes.get(route).and_then(|answers| answers.get(&key)) {
                histogram.record(took);
                return;
            }
        }
        let histogram = histogram!(
            "http_server_request_duration_seconds",
            "http_request_method" => key.0.to_string(),
            "http_route" => route.to_owned(),
            "http_response_status_code" => status.to_string(),
        );
        histogram.record(took);
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.entry(route.to_owned()).or_default().insert(key, histogram);
    }
}

/// Bounds the label: a client may send any word as a method.
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
