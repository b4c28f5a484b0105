//! Stable error codes. Those that several capabilities answer are here; a capability defines its
//! own with [`codes!`](crate::codes). docs/errors.md lists all of them.

pub use axum::http::StatusCode;

/// A stable error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// Word that clients match on.
    pub word: &'static str,
    /// Status of the answer.
    pub status: StatusCode,
    /// Summary, the same for every occurrence.
    pub title: &'static str,
    /// Meaning and remedy, for docs/errors.md.
    pub meaning: &'static str,
}

/// Defines constants for error codes, and `ALL` for docs/errors.md. Each has a name, the word that
/// clients match on, the status, the summary, and the meaning with the remedy.
#[macro_export]
macro_rules! codes {
    ($($name:ident $word:literal $status:ident $title:literal $meaning:literal;)+) => {
        $(#[doc = $meaning] pub const $name: $crate::Code = $crate::codes!(@ $word $status $title $meaning);)+

        /// The error codes that are defined here.
        pub const ALL: &'static [$crate::Code] = &[$($crate::codes!(@ $word $status $title $meaning)),+];
    };
    (@ $word:literal $status:ident $title:literal $meaning:literal) => {
        $crate::Code { word: $word, status: $crate::code::StatusCode::$status, title: $title, meaning: $meaning }
    };
}

impl Code {
    codes! {
        INVALID_JSON "invalid_json" BAD_REQUEST "The body is not valid JSON"
            "The body is empty, not UTF-8 or not JSON, or has raw control characters, a lone surrogate, or more than 128 levels. Correct it; the detail says where.";
        INVALID_REQUEST "invalid_request" BAD_REQUEST "The request is malformed"
            "A field is missing or has the wrong type, or a parameter or header cannot be parsed. The detail names it, and so does the member `errors`, with a JSON pointer for a field.";
        INVALID_BODY "invalid_body" BAD_REQUEST "The body could not be read"
            "The connection broke, or the chunked encoding was invalid, while the body was read, or the body is not what its `Content-Encoding` says. Nothing was written; send the request again.";
        UNAUTHENTICATED "unauthenticated" UNAUTHORIZED "There are no valid credentials"
            "The request has no credentials, or they are unknown, revoked or expired. Send `Authorization: Bearer` with an API key or a token; the detail says what is wrong.";
        FORBIDDEN "forbidden" FORBIDDEN "The credentials do not allow this"
            "The credential lacks a scope, which the member `scope` names, or is for another subject. Use another one, or ask for the scope.";
        ORIGIN_FORBIDDEN "origin_forbidden" FORBIDDEN "Pages of this origin may not do this"
            "A page of another origin wants to write or to open a WebSocket, and its `Origin` is not in `http.cors.origins`.";
        NOT_FOUND "not_found" NOT_FOUND "Not found"
            "There is no such route or resource.";
        UNKNOWN_TOPIC "unknown_topic" NOT_FOUND "The topic does not exist"
            "Kafka has no such topic, and it is not created automatically. Create it, or turn on `gateway.auto_create_topics` if the broker allows that.";
        METHOD_NOT_ALLOWED "method_not_allowed" METHOD_NOT_ALLOWED "The method is not allowed here"
            "The path exists, but not with this method; the `Allow` header lists the allowed methods.";
        REQUEST_TIMEOUT "request_timeout" REQUEST_TIMEOUT "The body took too long to arrive"
            "The body was not complete within `http.body_timeout_ms`. Nothing was written.";
        BODY_TOO_LARGE "body_too_large" PAYLOAD_TOO_LARGE "The body is too large"
            "The body, or one record of a stream, is larger than `http.max_body_bytes`, or the record is larger than the broker's `message.max.bytes`. Nothing was written; send less.";
        UNSUPPORTED_MEDIA_TYPE "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "The content type is not supported"
            "Send `application/json`, or `application/x-ndjson` if the route accepts it.";
        UNSUPPORTED_ENCODING "unsupported_encoding" UNSUPPORTED_MEDIA_TYPE "The content encoding is not supported"
            "Send the body plain, or with `Content-Encoding: gzip`, `deflate` or `zstd`, one of them; `Accept-Encoding` of the answer lists them.";
        INVALID_FIELD "invalid_field" UNPROCESSABLE_ENTITY "A field breaks a rule"
            "The request is well-formed, but a field is outside its limits. The detail names the field and the limit.";
        OVERLOADED "overloaded" SERVICE_UNAVAILABLE "Too many writes are in flight"
            "The producer's limit on records or bytes in flight is reached. Nothing was written; retry after `Retry-After` seconds.";
        KAFKA_UNAVAILABLE "kafka_unavailable" SERVICE_UNAVAILABLE "Kafka cannot be reached"
            "No broker answers, or postrider's topics do not exist as required. The write was refused before it reached Kafka's client, so it is not stored. Retry after `Retry-After` seconds.";
        OUTCOME_UNKNOWN "outcome_unknown" SERVICE_UNAVAILABLE "It is unknown whether the write was stored"
            "The write was sent but not confirmed in time. It may or may not be stored; a retry with the same `Idempotency-Key` is safe.";
        KAFKA_REJECTED "kafka_rejected" SERVICE_UNAVAILABLE "Kafka rejected the write"
            "The broker rejected the record, for example because of authorization, too few in-sync replicas, or a full disk. The detail has the broker's message. The record was not stored.";
        REDIS_UNAVAILABLE "redis_unavailable" SERVICE_UNAVAILABLE "Redis cannot be reached"
            "The view cannot be read at the moment. Writes are not affected. Retry after `Retry-After` seconds.";
        POSTGRES_UNAVAILABLE "postgres_unavailable" SERVICE_UNAVAILABLE "Postgres cannot be reached"
            "Data in Postgres cannot be read at the moment, or `postgres.url` is not set. Writes to Kafka are not affected. Retry after `Retry-After` seconds.";
        TOO_MANY_STREAMS "too_many_streams" SERVICE_UNAVAILABLE "Too many live streams are open"
            "This process has as many open live streams as its configuration allows. Retry after `Retry-After` seconds; another process may accept the stream.";
        AUTHENTICATION_UNAVAILABLE "authentication_unavailable" SERVICE_UNAVAILABLE "Credentials cannot be checked"
            "The API keys, the issuer's keys or the tickets cannot be read at the moment, so it is unknown whether the credential is valid. Retry after `Retry-After` seconds.";
        REBUILDING "rebuilding" SERVICE_UNAVAILABLE "The view is being rebuilt"
            "Redis has lost data, or the processor has not filled it yet. Until the view is complete, it is unknown whether this key exists. Retry after `Retry-After` seconds.";
        INTERNAL "internal" INTERNAL_SERVER_ERROR "Internal error"
            "A bug or an unforeseen fault; the log has the details under the request id.";
    }
}

/// Returns the table of docs/errors.md, in the order of the status.
pub fn markdown_table(codes: &[&[Code]]) -> String {
    let mut codes: Vec<Code> = codes.concat();
    codes.sort_by_key(|code| code.status);
    let mut table = "| code | status | meaning and remedy |\n| --- | --- | --- |\n".to_owned();
    for Code { word, status, title, meaning } in codes {
        let status = status.as_u16();
        table.push_str(&format!("| <a id=\"{word}\"></a>`{word}` | {status} | **{title}.** {meaning} |\n"));
    }
    table
}
