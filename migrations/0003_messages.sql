-- Messages as the topic has them, each once. `prev` is the offset of the one before it for the same receiver in the
-- same partition of the topic, -1 for the first: a reader sees by it whether it has missed anything.
CREATE TABLE messages (
    receiver_id  text        COLLATE "C" NOT NULL,
    topic_epoch  bigint      NOT NULL,
    partition    integer     NOT NULL,
    "offset"     bigint      NOT NULL,
    prev         bigint      NOT NULL,
    event_id     uuid        NOT NULL,
    value        text        NOT NULL,
    created_at   timestamptz NOT NULL,
    stored_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (receiver_id, topic_epoch, partition, "offset", stored_at)
) PARTITION BY RANGE (stored_at);

-- A partition for each day is made ahead by the processor; this takes what comes when it is late.
CREATE TABLE messages_default PARTITION OF messages DEFAULT;

-- Uniqueness of events across the partitions above.
CREATE TABLE message_ids (
    event_id     uuid        NOT NULL,
    receiver_id  text        COLLATE "C" NOT NULL,
    stored_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (event_id, receiver_id)
);

CREATE INDEX message_ids_age ON message_ids (stored_at);

-- The last message of each receiver in each partition of the topic that had any for it.
CREATE TABLE message_receivers (
    receiver_id  text    COLLATE "C" NOT NULL,
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    last         bigint  NOT NULL,
    PRIMARY KEY (receiver_id, topic_epoch, partition)
) WITH (fillfactor = 70);

-- Up to where a receiver is known to have got them.
CREATE TABLE message_cursors (
    receiver_id  text    COLLATE "C" NOT NULL,
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    delivered    bigint  NOT NULL,
    PRIMARY KEY (receiver_id, topic_epoch, partition)
) WITH (fillfactor = 70);

-- How far each partition of the topic is stored: everything below `next`. Moved by the statement that stores.
CREATE TABLE messages_progress (
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    next         bigint  NOT NULL,
    PRIMARY KEY (topic_epoch, partition)
);
