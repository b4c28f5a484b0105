//! Error codes of `/produce`.

postrider_http::codes! {
    TOPIC_FORBIDDEN "topic_forbidden" FORBIDDEN "Writing to the topic is not allowed"
        "The topic is internal to postrider or Kafka, or is not in `gateway.topics.allow`.";
}
