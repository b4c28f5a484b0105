//! Error codes of feeds.

postrider_http::codes! {
    POST_NOT_FOUND "post_not_found" NOT_FOUND "The post does not exist"
        "There is no post with this id, or it was deleted.";
    BEING_ERASED "being_erased" CONFLICT "The account is being erased"
        "Nothing is written for this account until all of its data is deleted. Retry later; anything written then belongs to a new account.";
    TOO_MANY_READS "too_many_reads" SERVICE_UNAVAILABLE "Too many reads wait for Postgres"
        "Feeds that are not in Redis are read from Postgres, `feed.max_postgres_reads` at a time, and this read waited three seconds for its turn. Retry after `Retry-After` seconds.";
}
