//! Webhook target for tests: responds with random delays and failures.

use std::time::Duration;

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use postrider_http::{Bounded, Code, Params, Problem, ProblemBody, body, decode};
use postrider_time::clock;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Gateway;

/// Upper bound of the delay parameters, in milliseconds.
const MAX_DELAY_MS: u64 = 60_000;

/// Default rates of 500, 400 and 503, in percent, used if the query sets no rate.
const DEFAULT_RATES: [f64; 3] = [5.0, 5.0, 2.0];

pub(super) fn routes(gateway: &Gateway) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(simulate)).with_state(gateway.clone())
}

/// Delay and failure rates of the response.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Overrides {
    /// Shortest response time in milliseconds.
    #[param(value_type = Option<u64>, maximum = 60000)]
    min_delay_ms: Option<Bounded<0, MAX_DELAY_MS>>,
    /// Longest response time in milliseconds.
    #[param(value_type = Option<u64>, maximum = 60000)]
    max_delay_ms: Option<Bounded<0, MAX_DELAY_MS>>,
    /// Percentage of responses with status 500.
    #[param(minimum = 0, maximum = 100)]
    rate_500: Option<f64>,
    /// Percentage of responses with status 400.
    #[param(minimum = 0, maximum = 100)]
    rate_400: Option<f64>,
    /// Percentage of responses with status 503.
    #[param(minimum = 0, maximum = 100)]
    rate_503: Option<f64>,
}

/// Response of the simulated target.
#[derive(ToSchema)]
#[schema(as = SimulatedSuccess)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
struct Processed {
    /// Always `processed`.
    status: String,
    /// Constant text.
    message: String,
    /// Time that the target waited, in milliseconds.
    processing_time_ms: u64,
    #[schema(format = DateTime)]
    received_at: String,
}

/// Failure of the simulated target.
#[derive(ToSchema)]
#[schema(as = SimulatedFailure)]
#[expect(dead_code, reason = "describes the JSON, which is written directly")]
struct Failed {
    error: String,
    /// Fault of the body, if it is not a JSON object.
    #[schema(nullable = false)]
    details: Option<String>,
    /// Time that the target waited, in milliseconds.
    #[schema(nullable = false)]
    processing_time_ms: Option<u64>,
}

/// Simulate a webhook target
///
/// Waits, then fails at the given rates (5 % 500, 5 % 400 and 2 % 503 if none is given), otherwise
/// succeeds.
#[utoipa::path(
    post,
    path = "/webhook-simulator",
    operation_id = "simulateWebhook",
    tag = "gateway",
    params(Overrides),
    request_body = serde_json::Map<String, serde_json::Value>,
    responses(
        (status = 200, description = "Processed", body = Processed),
        (status = 400, description = "Not a JSON object, or a simulated failure; a problem if the query is malformed", content((Failed = "application/json"), (ProblemBody = "application/problem+json"))),
        (status = 408, description = "Body too slow", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "Invalid query parameter", body = ProblemBody, content_type = "application/problem+json"),
        (status = 500, description = "Simulated failure", body = Failed),
        (status = 503, description = "Simulated failure; a problem if the process is overloaded", content((Failed = "application/json"), (ProblemBody = "application/problem+json"))),
    ),
)]
async fn simulate(
    State(gateway): State<Gateway>,
    Params(overrides): Params<Overrides>,
    request: Request,
) -> Result<Response, Problem> {
    let plan = Plan::new(&gateway, &overrides)?;
    let body = body::read(request, gateway.inner.http.limits()).await?;
    if let Err(problem) = decode::object::<IgnoredAny>(&body) {
        let answer = json!({"error": "Invalid JSON payload", "details": problem.detail});
        return Ok((StatusCode::BAD_REQUEST, Json(answer)).into_response());
    }
    let delay_ms = fastrand::u64(plan.min_delay_ms..=plan.max_delay_ms);
    tokio::time::sleep(Duration::from_millis(delay_ms)).await;
    Ok(plan.answer(fastrand::f64() * 100.0, delay_ms))
}

impl Overrides {
    /// Returns the rates of 500, 400 and 503.
    fn rates(&self) -> Result<[f64; 3], Problem> {
        let rates = match [self.rate_500, self.rate_400, self.rate_503] {
            [None, None, None] => return Ok(DEFAULT_RATES),
            given => given.map(|rate| rate.unwrap_or(0.0)),
        };
        let named = ["rate_500", "rate_400", "rate_503"].into_iter().zip(rates);
        if let Some((name, rate)) = named.clone().find(|(_, rate)| !(0.0..=100.0).contains(rate)) {
            let detail = format!("`{name}` must be from 0 to 100 percent (got {rate})");
            return Err(Problem::new(Code::INVALID_FIELD, detail).at_parameter(name));
        }
        let sum: f64 = rates.iter().sum();
        if sum <= 100.0 {
            return Ok(rates);
        }
        let detail = format!("`rate_500`, `rate_400` and `rate_503` must be at most 100 percent together (got {sum})");
        let problem = Problem::new(Code::INVALID_FIELD, detail);
        Err(named.filter(|(_, rate)| *rate > 0.0).fold(problem, |problem, (name, _)| problem.at_parameter(name)))
    }
}

struct Plan {
    min_delay_ms: u64,
    max_delay_ms: u64,
    /// Cumulative rates in percent, with the status of each.
    failures: [(f64, StatusCode, &'static str); 3],
}

impl Plan {
    fn new(gateway: &Gateway, overrides: &Overrides) -> Result<Self, Problem> {
        let config = &gateway.inner.config.simulator;
        let (min, max) = (overrides.min_delay_ms.map(Bounded::get), overrides.max_delay_ms.map(Bounded::get));
        let max_delay_ms = max.unwrap_or(config.max_delay_ms.max(min.unwrap_or(0)));
        let min_delay_ms = min.unwrap_or(config.min_delay_ms.min(max_delay_ms));
        if min_delay_ms > max_delay_ms {
            let detail = format!("`min_delay_ms` must be at most `max_delay_ms`, {max_delay_ms} (got {min_delay_ms})");
            return Err(Problem::new(Code::INVALID_FIELD, detail).at_parameter("min_delay_ms"));
        }
        let rates = overrides.rates()?;
        let failures = [
            (rates[0], StatusCode::INTERNAL_SERVER_ERROR, "Simulated internal server error"),
            (rates[0] + rates[1], StatusCode::BAD_REQUEST, "Simulated bad request"),
            (rates[0] + rates[1] + rates[2], StatusCode::SERVICE_UNAVAILABLE, "Simulated service unavailable"),
        ];
        Ok(Self { min_delay_ms, max_delay_ms, failures })
    }

    fn answer(&self, drawn: f64, delay_ms: u64) -> Response {
        if let Some((_, status, error)) = self.failures.iter().find(|(below, _, _)| drawn < *below) {
            return (*status, Json(json!({"error": error, "processing_time_ms": delay_ms}))).into_response();
        }
        let answer = json!({
            "status": "processed",
            "message": "Webhook processed successfully",
            "processing_time_ms": delay_ms,
            "received_at": clock::rfc3339(clock::now_ms()),
        });
        Json(answer).into_response()
    }
}
