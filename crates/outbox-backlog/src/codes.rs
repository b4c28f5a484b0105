//! Error codes of the outbox.

postrider_http::codes! {
    OUTBOX_FULL "outbox_full" SERVICE_UNAVAILABLE "Too many events wait for Kafka"
        "Posts and follows are stored in Postgres with an event for Kafka, and the waiting events have reached `outbox.max_rows` or `outbox.max_bytes`. Or an event of this author cannot be sent, and `outbox.max_quarantined_rows_per_key` others wait behind it. Nothing was stored; retry after `Retry-After` seconds.";
}
