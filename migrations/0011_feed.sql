CREATE SEQUENCE post_ids MAXVALUE 9007199254740991;

-- A post that was deleted stays, without its content, until it is out of all feeds.
CREATE TABLE posts (
    id          bigint      PRIMARY KEY,
    author_id   text        COLLATE "C" NOT NULL,
    content     text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    deleted_at  timestamptz
);

CREATE INDEX posts_of_author ON posts (author_id, id);

CREATE TABLE follows (
    followee_id  text COLLATE "C" NOT NULL,
    follower_id  text COLLATE "C" NOT NULL,
    PRIMARY KEY (followee_id, follower_id)
);

CREATE INDEX follows_of_follower ON follows (follower_id, followee_id);

-- Which posts stand in whose feed: those of all that the user follows, except of authors who are merged at read.
CREATE TABLE feed_rows (
    user_id  text   COLLATE "C" NOT NULL,
    post_id  bigint NOT NULL,
    PRIMARY KEY (user_id, post_id)
);

-- What the projection knows of authors. state: 0 ordinary, 1 rising, 2 celebrity, 3 falling; all but 0 are merged at
-- read, all but 2 are fanned out.
CREATE TABLE feed_authors (
    author_id  text     COLLATE "C" PRIMARY KEY,
    followers  bigint   NOT NULL DEFAULT 0,
    state      smallint NOT NULL DEFAULT 0
) WITH (fillfactor = 80);

CREATE INDEX feed_authors_merged ON feed_authors (author_id) WHERE state <> 0;

-- What writes with an Idempotency-Key came to.
CREATE TABLE feed_requests (
    event_id  uuid        PRIMARY KEY,
    post_id   bigint,
    made_at   timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX feed_requests_age ON feed_requests (made_at);

-- Accounts that are being erased; they neither write nor are read.
CREATE TABLE feed_erasures (
    user_id       text        COLLATE "C" PRIMARY KEY,
    requested_at  timestamptz NOT NULL DEFAULT now()
);

-- How far each partition of the topic is carried into the feeds: everything below `next`. Moved by the same transaction.
CREATE TABLE feed_progress (
    topic_epoch  bigint  NOT NULL,
    partition    integer NOT NULL,
    next         bigint  NOT NULL,
    PRIMARY KEY (topic_epoch, partition)
);

-- Events whose effect is there. Doubles have the same key and so the same writer, which looks before it inserts.
CREATE TABLE processed_events (
    event_id  uuid        NOT NULL,
    seen_at   timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (seen_at);

CREATE TABLE processed_events_default PARTITION OF processed_events DEFAULT;

CREATE INDEX processed_events_ids ON processed_events (event_id);

-- Work that goes on in chunks. What is done is told by `after_post` and `after_user`; who does it, by `owner`, until then.
CREATE TABLE feed_jobs (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind        text        NOT NULL CHECK (kind IN ('fan_out', 'backfill', 'unfollow', 'purge', 'rise', 'fall', 'erase')),
    author_id   text        COLLATE "C" NOT NULL,
    user_id     text        COLLATE "C",
    post_id     bigint,
    after_post  bigint,
    after_user  text        COLLATE "C",
    owner       uuid,
    until       timestamptz NOT NULL DEFAULT '-infinity',
    made_at     timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX feed_jobs_of_author ON feed_jobs (author_id, kind);

-- The epoch that timelines in Redis must be of; raised when Redis may have missed something.
CREATE TABLE feed_timelines (
    epoch     bigint  NOT NULL DEFAULT 1,
    only_one  boolean PRIMARY KEY DEFAULT true CHECK (only_one)
);

INSERT INTO feed_timelines DEFAULT VALUES;

CREATE INDEX posts_deleted ON posts (deleted_at) WHERE deleted_at IS NOT NULL;
