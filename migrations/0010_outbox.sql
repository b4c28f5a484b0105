-- What is to be written to Kafka, stored by the transaction that makes it true. Whoever has something to say inserts
-- topic (before the prefix), key, event_id, kind, source, traceparent and value; the rest has defaults. A row must be
-- inserted after the locks that its truth needs are held, so that rows of one truth are numbered in their order.
CREATE SEQUENCE outbox_ids;

CREATE TABLE outbox (
    -- Partitions take turns of ten seconds.
    slot         smallint    NOT NULL DEFAULT ((extract(epoch FROM clock_timestamp())::bigint / 10) % 4),
    shard        smallint    NOT NULL GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED,
    id           bigint      NOT NULL DEFAULT nextval('outbox_ids'),
    topic        text        NOT NULL,
    key          text        COLLATE "C" NOT NULL,
    event_id     uuid        NOT NULL,
    kind         text        NOT NULL,
    source       text        NOT NULL,
    traceparent  text,
    value        text        NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) PARTITION BY LIST (slot);

CREATE TABLE outbox_0 PARTITION OF outbox FOR VALUES IN (0);
CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES IN (1);
CREATE TABLE outbox_2 PARTITION OF outbox FOR VALUES IN (2);
CREATE TABLE outbox_3 PARTITION OF outbox FOR VALUES IN (3);

CREATE INDEX outbox_order ON outbox (shard, id);

-- Rows that Kafka will never take, with all later ones of their keys, until somebody decides.
CREATE TABLE outbox_quarantine (
    id              bigint      PRIMARY KEY,
    topic           text        NOT NULL,
    key             text        COLLATE "C" NOT NULL,
    event_id        uuid        NOT NULL,
    kind            text        NOT NULL,
    source          text        NOT NULL,
    traceparent     text,
    value           text        NOT NULL,
    created_at      timestamptz NOT NULL,
    -- Null for those that only came later than one with a reason.
    reason          text,
    quarantined_at  timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX outbox_quarantine_keys ON outbox_quarantine (key);
