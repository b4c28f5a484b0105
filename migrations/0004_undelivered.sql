-- When a partition of the topic had what stored, about once a second: rows from `offset` on, up to the next mark of their
-- partition, have a `stored_at` within a second from that of the mark.
CREATE TABLE message_marks (
    topic_epoch  bigint      NOT NULL,
    partition    integer     NOT NULL,
    "offset"     bigint      NOT NULL,
    stored_at    timestamptz NOT NULL,
    PRIMARY KEY (topic_epoch, partition, "offset")
);

-- The time of the last mark.
ALTER TABLE messages_progress ADD COLUMN marked_at timestamptz NOT NULL DEFAULT '-infinity';

-- Up to where each partition was looked through for messages that nobody has got.
CREATE TABLE message_undelivered (
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    next         bigint  NOT NULL,
    PRIMARY KEY (topic_epoch, partition)
) WITH (fillfactor = 50);

-- Which process does that, and until when unless it says so again.
CREATE TABLE message_undelivered_owner (
    only_one  boolean     PRIMARY KEY DEFAULT true CHECK (only_one),
    owner     uuid        NOT NULL,
    until     timestamptz NOT NULL
) WITH (fillfactor = 50);
