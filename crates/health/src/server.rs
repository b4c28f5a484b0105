//! The management port: probes and metrics, in every role.

use axum::{
    Json, Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Health;

/// The listener for probes and metrics.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses of the management port, each `host:port`; port 0 picks a free one.
    pub listen: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: vec!["0.0.0.0:9090".to_owned()] }
    }
}

/// Returns the routes `/livez`, `/readyz`, `/startupz`, `/consumers` and `/metrics`. With
/// `?verbose`, the probes answer with a JSON report per check.
pub fn router(health: Health, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/startupz", get(startupz))
        .route("/consumers", get(consumers))
        .with_state(health)
        .route("/metrics", get(render_metrics))
        .with_state(metrics)
}

async fn livez(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (alive, report) = health.liveness();
    answer(alive, report, query)
}

async fn readyz(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (ready, report) = health.readiness();
    answer(ready, report, query)
}

async fn startupz(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (_, report) = health.readiness();
    answer(health.has_started(), report, query)
}

/// Reports, per consumer and partition, the commit point, the size of the span past it, and the
/// record that holds it.
async fn consumers(State(health): State<Health>) -> Json<Value> {
    Json(health.consumers())
}

fn answer(good: bool, report: Value, query: Option<String>) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let verbose = query.is_some_and(|query| query.split('&').any(|part| part == "verbose" || part == "verbose=true"));
    if verbose {
        (status, Json(report)).into_response()
    } else {
        (status, if good { "ok" } else { "failing" }).into_response()
    }
}

/// Returns the metrics in Prometheus' text format.
pub async fn render_metrics(State(metrics): State<PrometheusHandle>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}
