//! The management port: probes and metrics, in every role.

use axum::{
    Json,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use metrics_exporter_prometheus::PrometheusHandle;
use postrider_openapi::{NoInput, SERVICE, tagged};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};

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
        Self { listen: vec!["127.0.0.1:9090".to_owned()] }
    }
}

/// Returns the routes `/livez`, `/readyz`, `/startupz`, `/consumers` and `/metrics` with their
/// OpenAPI descriptions.
pub fn routes(health: Health, metrics: PrometheusHandle) -> OpenApiRouter {
    OpenApiRouter::with_openapi(tagged("management", "The state of this process, for its supervisor and operators."))
        .routes(routes!(livez))
        .routes(routes!(readyz))
        .routes(routes!(startupz))
        .routes(routes!(consumers))
        .with_state(health)
        .merge(metrics_routes(metrics))
}

/// Returns the route `/metrics` with its OpenAPI description.
pub fn metrics_routes(metrics: PrometheusHandle) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(render_metrics)).with_state(metrics)
}

/// Check that the process works
///
/// Asks no dependency. If it fails, restart the process.
#[utoipa::path(
    get,
    path = "/livez",
    operation_id = "checkLiveness",
    tag = "management",
    params(("verbose" = Option<bool>, Query, description = "`true`, or without a value: answer with a JSON report per check")),
    responses(
        (status = 200, description = "The process works", content((String = "text/plain", example = "ok"), (serde_json::Map<String, Value> = "application/json"))),
        (status = 503, description = "A loop of the process does not respond", content((String = "text/plain", example = "failing"), (serde_json::Map<String, Value> = "application/json"))),
        NoInput,
    ),
)]
async fn livez(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (alive, report) = health.liveness();
    answer(alive, report, query)
}

/// Check that the process can do its work
///
/// Fails while a dependency is missing, and as soon as the process stops.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "checkReadiness",
    tag = "management",
    params(("verbose" = Option<bool>, Query, description = "`true`, or without a value: answer with a JSON report per check")),
    responses(
        (status = 200, description = "Ready", content((String = "text/plain", example = "ok"), (serde_json::Map<String, Value> = "application/json"))),
        (status = 503, description = "Not ready", content((String = "text/plain", example = "failing"), (serde_json::Map<String, Value> = "application/json"))),
        NoInput,
    ),
)]
async fn readyz(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (ready, report) = health.readiness();
    answer(ready, report, query)
}

/// Check that the process has started
///
/// Succeeds once the process was ready for the first time.
#[utoipa::path(
    get,
    path = "/startupz",
    operation_id = "checkStartup",
    tag = "management",
    params(("verbose" = Option<bool>, Query, description = "`true`, or without a value: answer with a JSON report per check")),
    responses(
        (status = 200, description = "Started", content((String = "text/plain", example = "ok"), (serde_json::Map<String, Value> = "application/json"))),
        (status = 503, description = "Still starting", content((String = "text/plain", example = "failing"), (serde_json::Map<String, Value> = "application/json"))),
        NoInput,
    ),
)]
async fn startupz(State(health): State<Health>, RawQuery(query): RawQuery) -> Response {
    let (_, report) = health.readiness();
    answer(health.has_started(), report, query)
}

/// Report the progress of consumers
///
/// Has, per consumer and partition, the commit point, the size of the span past it, and the record
/// that holds it.
#[utoipa::path(
    get,
    path = "/consumers",
    operation_id = "listConsumers",
    tag = "management",
    responses((status = 200, description = "The consumers of this process", body = serde_json::Map<String, Value>), NoInput),
)]
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

/// Read the metrics
///
/// In Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "getMetrics",
    tag = SERVICE,
    responses((status = 200, description = "The metrics", body = String, content_type = "text/plain"), NoInput),
)]
async fn render_metrics(State(metrics): State<PrometheusHandle>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}
