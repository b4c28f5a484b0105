//! Error codes of dead letters.

postrider_http::codes! {
    SCAN_IN_PROGRESS "scan_in_progress" TOO_MANY_REQUESTS "Another request is reading the dead letters"
        "A process reads dead-letter topics for one request at a time. Retry after `Retry-After` seconds.";
    SCAN_TIMEOUT "scan_timeout" SERVICE_UNAVAILABLE "The dead letters could not be read in time"
        "Reading the topics took longer than `dlq.scan_timeout_ms`. Nothing, or only a part, was changed; a retry is safe. Narrow the filter, or use `postrider dlq`, which may take longer.";
}
