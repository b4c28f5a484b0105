-- Comments as the topic has them, each once. `offset` and `partition` say where in the topic it was seen first.
CREATE TABLE comments (
    event_id     uuid        PRIMARY KEY,
    topic_epoch  bigint      NOT NULL,
    partition    integer     NOT NULL,
    "offset"     bigint      NOT NULL,
    text         text        NOT NULL,
    author_id    text,
    post_id      text,
    created_at   timestamptz NOT NULL,
    CONSTRAINT comments_position_key UNIQUE (topic_epoch, partition, "offset")
);

CREATE INDEX comments_newest ON comments (created_at, topic_epoch, partition, "offset");
CREATE INDEX comments_of_post ON comments (post_id, created_at, topic_epoch, partition, "offset")
    WHERE post_id IS NOT NULL;

-- How far each partition of the topic is stored: everything below `next`. Moved by the statement that stores.
CREATE TABLE comments_progress (
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    next         bigint  NOT NULL,
    PRIMARY KEY (topic_epoch, partition)
);
