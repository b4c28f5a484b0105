//! Error codes of the key-value view.

postrider_http::codes! {
    KEY_NOT_FOUND "key_not_found" NOT_FOUND "The key does not exist"
        "The view is complete and has no value for this key: never pushed, deleted, or expired.";
    TOO_MANY_IDEMPOTENCY_KEYS "too_many_idempotency_keys" SERVICE_UNAVAILABLE "Too many idempotency keys are stored"
        "The number of writes whose `Idempotency-Key` is stored, each for 36 hours, has reached `kv.max_idempotency_ids`. Nothing was stored. Retries of those writes are still accepted, and so are writes without the header. Retry after `Retry-After` seconds.";
    NOT_YET_VISIBLE "not_yet_visible" GATEWAY_TIMEOUT "The awaited write is not visible yet"
        "The write named by `Postrider-After` did not reach the view within the wait. It is not lost; retry the read.";
}
