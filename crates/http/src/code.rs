//! Stable error codes, in one table for the answers and for docs/errors.md.

use axum::http::StatusCode;

macro_rules! codes {
    ($($name:ident $word:literal $status:ident $title:literal $meaning:literal;)*) => {
        /// A stable error code; each has a line in docs/errors.md.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $meaning] $name,)* }

        impl Code {
            /// Every code, in the order of the docs.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// Returns the word that clients match on.
            pub const fn word(self) -> &'static str {
                match self { $(Code::$name => $word,)* }
            }

            /// Returns the status of the answer.
            pub const fn status(self) -> StatusCode {
                match self { $(Code::$name => StatusCode::$status,)* }
            }

            /// Returns a short summary, the same for every occurrence.
            pub const fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// Returns the meaning and the remedy, for docs/errors.md.
            pub const fn meaning(self) -> &'static str {
                match self { $(Code::$name => $meaning,)* }
            }
        }
    };
}

codes! {
    InvalidJson "invalid_json" BAD_REQUEST "The body is not valid JSON"
        "The body is empty, not UTF-8 or not JSON, or has raw control characters, a lone surrogate, or more than 128 levels. Correct it; the detail says where.";
    InvalidRequest "invalid_request" BAD_REQUEST "The request is malformed"
        "A field is missing or has the wrong type, or a parameter or header cannot be parsed. The detail names it.";
    InvalidBody "invalid_body" BAD_REQUEST "The body could not be read"
        "The connection broke, or the chunked encoding was invalid, while the body was read. Nothing was written; send the request again.";
    TopicForbidden "topic_forbidden" FORBIDDEN "Writing to the topic is not allowed"
        "The topic is internal to postrider or Kafka, or is not in `gateway.topics.allow`.";
    OriginForbidden "origin_forbidden" FORBIDDEN "Pages of this origin may not connect"
        "The request's `Origin` is not in `messages.allowed_origins`.";
    NotFound "not_found" NOT_FOUND "Not found"
        "There is no such route or resource.";
    KeyNotFound "key_not_found" NOT_FOUND "The key does not exist"
        "The view is complete and has no value for this key: never pushed, deleted, or expired.";
    PostNotFound "post_not_found" NOT_FOUND "The post does not exist"
        "There is no post with this id, or it was deleted.";
    UnknownTopic "unknown_topic" NOT_FOUND "The topic does not exist"
        "Kafka has no such topic, and it is not created automatically. Create it, or turn on `gateway.auto_create_topics` if the broker allows that.";
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED "The method is not allowed here"
        "The path exists, but not with this method; the `Allow` header lists the allowed methods.";
    BeingErased "being_erased" CONFLICT "The account is being erased"
        "Nothing is written for this account until all of its data is deleted. Retry later; anything written then belongs to a new account.";
    RequestTimeout "request_timeout" REQUEST_TIMEOUT "The body took too long to arrive"
        "The body was not complete within `http.body_timeout_ms`. Nothing was written.";
    BodyTooLarge "body_too_large" PAYLOAD_TOO_LARGE "The body is too large"
        "The body, or one record of a stream, is larger than `http.max_body_bytes`, or the record is larger than the broker's `message.max.bytes`. Nothing was written; send less.";
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "The content type is not supported"
        "Send `application/json`, or `application/x-ndjson` if the route accepts it.";
    InvalidField "invalid_field" UNPROCESSABLE_ENTITY "A field breaks a rule"
        "The request is well-formed, but a field is outside its limits. The detail names the field and the limit.";
    ScanInProgress "scan_in_progress" TOO_MANY_REQUESTS "Another request is reading the dead letters"
        "A process reads dead-letter topics for one request at a time. Retry after `Retry-After` seconds.";
    TooManyConnections "too_many_connections" TOO_MANY_REQUESTS "This receiver or address has too many connections"
        "A receiver may have `messages.max_connections_per_receiver` open connections and streams in a process, and a client's address may have `messages.max_connections_per_address`; the detail says which limit is reached. Close a connection, or retry after `Retry-After` seconds.";
    Overloaded "overloaded" SERVICE_UNAVAILABLE "Too many writes are in flight"
        "The producer's limit on records or bytes in flight is reached. Nothing was written; retry after `Retry-After` seconds.";
    KafkaUnavailable "kafka_unavailable" SERVICE_UNAVAILABLE "Kafka cannot be reached"
        "No broker answers, or postrider's topics do not exist as required. The write was refused before it reached Kafka's client, so it is not stored. Retry after `Retry-After` seconds.";
    OutcomeUnknown "outcome_unknown" SERVICE_UNAVAILABLE "It is unknown whether the write was stored"
        "The write was sent but not confirmed in time. It may or may not be stored; a retry with the same `Idempotency-Key` is safe.";
    KafkaRejected "kafka_rejected" SERVICE_UNAVAILABLE "Kafka rejected the write"
        "The broker rejected the record, for example because of authorization, too few in-sync replicas, or a full disk. The detail has the broker's message. The record was not stored.";
    ScanTimeout "scan_timeout" SERVICE_UNAVAILABLE "The dead letters could not be read in time"
        "Reading the topics took longer than `dlq.scan_timeout_ms`. Nothing, or only a part, was changed; a retry is safe. Narrow the filter, or use `postrider dlq`, which may take longer.";
    RedisUnavailable "redis_unavailable" SERVICE_UNAVAILABLE "Redis cannot be reached"
        "The view cannot be read at the moment. Writes are not affected. Retry after `Retry-After` seconds.";
    PostgresUnavailable "postgres_unavailable" SERVICE_UNAVAILABLE "Postgres cannot be reached"
        "Data in Postgres cannot be read at the moment, or `postgres.url` is not set. Writes to Kafka are not affected. Retry after `Retry-After` seconds.";
    TooManyStreams "too_many_streams" SERVICE_UNAVAILABLE "Too many live streams are open"
        "This process has as many open live streams as its configuration allows. Retry after `Retry-After` seconds; another process may accept the stream.";
    TooManyReads "too_many_reads" SERVICE_UNAVAILABLE "Too many reads wait for Postgres"
        "Feeds that are not in Redis are read from Postgres, `feed.max_postgres_reads` at a time, and this read waited three seconds for its turn. Retry after `Retry-After` seconds.";
    TooManyReceivers "too_many_receivers" SERVICE_UNAVAILABLE "Too many receivers have messages"
        "The number of receivers that have had a message has reached `messages.max_receivers`, and this receiver is not one of them. Nothing was stored. Messages to the other receivers are still accepted. Retry after `Retry-After` seconds.";
    TooManyIdempotencyKeys "too_many_idempotency_keys" SERVICE_UNAVAILABLE "Too many idempotency keys are stored"
        "The number of writes whose `Idempotency-Key` is stored, each for 36 hours, has reached `kv.max_idempotency_ids`. Nothing was stored. Retries of those writes are still accepted, and so are writes without the header. Retry after `Retry-After` seconds.";
    OutboxFull "outbox_full" SERVICE_UNAVAILABLE "Too many events wait for Kafka"
        "Posts and follows are stored in Postgres with an event for Kafka, and the waiting events have reached `outbox.max_rows` or `outbox.max_bytes`. Or an event of this author cannot be sent, and `outbox.max_quarantined_rows_per_key` others wait behind it. Nothing was stored; retry after `Retry-After` seconds.";
    Rebuilding "rebuilding" SERVICE_UNAVAILABLE "The view is being rebuilt"
        "Redis has lost data, or the processor has not filled it yet. Until the view is complete, it is unknown whether this key exists. Retry after `Retry-After` seconds.";
    NotYetVisible "not_yet_visible" GATEWAY_TIMEOUT "The awaited write is not visible yet"
        "The write named by `Postrider-After` did not reach the view within the wait. It is not lost; retry the read.";
    Internal "internal" INTERNAL_SERVER_ERROR "Internal error"
        "A bug or an unforeseen fault; the log has the details under the request id.";
}

/// Returns the table of docs/errors.md.
pub fn markdown_table() -> String {
    let mut table = "| code | status | meaning and remedy |\n| --- | --- | --- |\n".to_owned();
    for code in Code::ALL {
        table.push_str(&format!(
            "| <a id=\"{0}\"></a>`{0}` | {1} | **{2}.** {3} |\n",
            code.word(),
            code.status().as_u16(),
            code.title(),
            code.meaning()
        ));
    }
    table
}
