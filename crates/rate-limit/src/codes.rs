//! The error code of a refused request.

postrider_http::codes! {
    RATE_LIMITED "rate_limited" TOO_MANY_REQUESTS "Too many requests"
        "This caller has sent more requests or bytes than `limits` allows. Nothing was done; retry after `Retry-After` seconds. The headers `RateLimit` and `RateLimit-Policy` have the state and the limit.";
}
