//! Refuses requests of callers above their rate, and tells all of them where they stand.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response},
    middleware::Next,
    response::IntoResponse,
};
use hyper::body::Body as _;
use postrider_http::{Code, Problem, RequestContext};

use super::{
    Config,
    bucket::Decision,
    codes,
    counting::Counting,
    limiter::{Limiter, count_refusal},
};

static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Middleware inside of the outer layer, which knows who sends the request.
pub async fn limit(State(limiter): State<Arc<Limiter>>, request: Request, next: Next) -> Response<Body> {
    if request.extensions().get::<MatchedPath>().is_some_and(|path| limiter.free.contains(&path.as_str())) {
        return next.run(request).await;
    }
    let Some(caller) = request.extensions().get::<RequestContext>().map(caller) else {
        return Problem::new(Code::INTERNAL, "the request has no context").into_response();
    };
    let known = request.body().size_hint().exact();
    let decision = limiter.take(&caller, known.unwrap_or(0)).await;
    let mut response = if decision.wait > 0.0 {
        count_refusal();
        refused(&limiter.config, &decision).into_response()
    } else if known.is_some() || limiter.config.bytes_per_second == 0 {
        next.run(request).await
    } else {
        let request = request.map(|body| Body::new(Counting::new(body, limiter.clone(), caller)));
        next.run(request).await
    };
    describe(response.headers_mut(), &limiter.config, &decision);
    response
}

/// Returns who has the limit: the principal, or the client's address while authentication is off.
fn caller(context: &RequestContext) -> String {
    match (context.principal.identity(), context.client) {
        (Some(_), _) => format!("p:{}", context.principal.id()),
        (None, Some(client)) => format!("a:{client}"),
        (None, None) => "a:".to_owned(),
    }
}

fn refused(config: &Config, decision: &Decision) -> Problem {
    let Config { requests_per_second, bytes_per_second, .. } = config;
    let limits = match (requests_per_second, bytes_per_second) {
        (requests, 0) => format!("{requests} requests per second"),
        (0, bytes) => format!("{bytes} bytes per second"),
        (requests, bytes) => format!("{requests} requests and {bytes} bytes per second"),
    };
    let mut problem = Problem::new(codes::RATE_LIMITED, format!("a caller may send {limits} (`limits`)"));
    problem.retry_after_s = Some(seconds(decision.wait).max(1));
    problem
}

/// Adds the headers of the draft "RateLimit header fields for HTTP".
fn describe(headers: &mut HeaderMap, config: &Config, decision: &Decision) {
    let burst = u64::from(config.burst_seconds);
    let kinds = [
        ("requests", u64::from(config.requests_per_second), decision.requests_full, ""),
        ("bytes", config.bytes_per_second, decision.bytes_full, ";qu=\"content-bytes\""),
    ];
    let (mut policies, mut states) = (Vec::new(), Vec::new());
    for (name, rate, full, unit) in kinds.into_iter().filter(|(_, rate, ..)| *rate > 0) {
        let quota = rate.saturating_mul(burst);
        let left = (quota as f64 - full * rate as f64 / 1e6).max(0.0).floor();
        policies.push(format!("\"{name}\";q={quota};w={burst}{unit}"));
        states.push(format!("\"{name}\";r={left};t={}", seconds(full)));
    }
    for (name, values) in [(&RATE_LIMIT_POLICY, policies), (&RATE_LIMIT, states)] {
        if let Ok(value) = HeaderValue::try_from(values.join(", ")) {
            headers.insert(name.clone(), value);
        }
    }
}

fn seconds(microseconds: f64) -> u32 {
    (microseconds / 1e6).ceil() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_have_the_policy_and_what_is_left() {
        let config = Config { requests_per_second: 10, bytes_per_second: 1_000, burst_seconds: 5 };
        let decision = Decision { wait: 0.0, requests_full: 1_250_000.0, bytes_full: 9_000_000.0 };
        let mut headers = HeaderMap::new();
        describe(&mut headers, &config, &decision);
        assert_eq!(headers["ratelimit-policy"], r#""requests";q=50;w=5, "bytes";q=5000;w=5;qu="content-bytes""#);
        assert_eq!(headers["ratelimit"], r#""requests";r=37;t=2, "bytes";r=0;t=9"#);
        let refused = refused(&config, &Decision { wait: 1_200_000.0, ..decision });
        assert_eq!((refused.retry_after_s, refused.code.status.as_u16()), (Some(2), 429));
    }
}
