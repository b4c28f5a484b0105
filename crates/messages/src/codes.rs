//! Error codes of messages.

postrider_http::codes! {
    TOO_MANY_CONNECTIONS "too_many_connections" TOO_MANY_REQUESTS "This receiver or address has too many connections"
        "A receiver may have `messages.max_connections_per_receiver` open connections and streams in a process, and a client's address may have `messages.max_connections_per_address`; the detail says which limit is reached. Close a connection, or retry after `Retry-After` seconds.";
    TOO_MANY_RECEIVERS "too_many_receivers" SERVICE_UNAVAILABLE "Too many receivers have messages"
        "The number of receivers that have had a message has reached `messages.max_receivers`, and this receiver is not one of them. Nothing was stored. Messages to the other receivers are still accepted. Retry after `Retry-After` seconds.";
}
