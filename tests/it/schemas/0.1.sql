CREATE TABLE @schema@._sqlx_migrations (
    version bigint NOT NULL,
    description text NOT NULL,
    installed_on timestamp with time zone DEFAULT now() NOT NULL,
    success boolean NOT NULL,
    checksum bytea NOT NULL,
    execution_time bigint NOT NULL
);
CREATE TABLE @schema@.comments (
    event_id uuid NOT NULL,
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    text text NOT NULL,
    author_id text,
    post_id text,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE @schema@.comments_progress (
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    next bigint NOT NULL
);
CREATE TABLE @schema@.feed_authors (
    author_id text NOT NULL COLLATE pg_catalog."C",
    followers bigint DEFAULT 0 NOT NULL,
    state smallint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');
CREATE TABLE @schema@.feed_erasures (
    user_id text NOT NULL COLLATE pg_catalog."C",
    requested_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.feed_floors (
    user_id text NOT NULL COLLATE pg_catalog."C",
    floor bigint NOT NULL
);
CREATE TABLE @schema@.feed_jobs (
    id bigint NOT NULL,
    kind text NOT NULL,
    author_id text NOT NULL COLLATE pg_catalog."C",
    user_id text COLLATE pg_catalog."C",
    post_id bigint,
    after_post bigint,
    after_user text COLLATE pg_catalog."C",
    owner uuid,
    until timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    made_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT feed_jobs_kind_check CHECK ((kind = ANY (ARRAY['fan_out'::text, 'backfill'::text, 'unfollow'::text, 'purge'::text, 'rise'::text, 'fall'::text, 'erase'::text])))
);
ALTER TABLE @schema@.feed_jobs ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME @schema@.feed_jobs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE @schema@.feed_progress (
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    next bigint NOT NULL
);
CREATE TABLE @schema@.feed_requests (
    event_id uuid NOT NULL,
    post_id bigint,
    made_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.feed_rows (
    user_id text NOT NULL COLLATE pg_catalog."C",
    post_id bigint NOT NULL
);
CREATE TABLE @schema@.feed_timelines (
    epoch bigint DEFAULT 1 NOT NULL,
    only_one boolean DEFAULT true NOT NULL,
    CONSTRAINT feed_timelines_only_one_check CHECK (only_one)
);
CREATE TABLE @schema@.feed_walk (
    after_user text DEFAULT ''::text NOT NULL COLLATE pg_catalog."C",
    begins_at timestamp with time zone DEFAULT now() NOT NULL,
    only_one boolean DEFAULT true NOT NULL,
    CONSTRAINT feed_walk_only_one_check CHECK (only_one)
);
CREATE TABLE @schema@.follows (
    followee_id text NOT NULL COLLATE pg_catalog."C",
    follower_id text NOT NULL COLLATE pg_catalog."C"
);
CREATE TABLE @schema@.installation (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    only_one boolean DEFAULT true NOT NULL,
    CONSTRAINT installation_only_one_check CHECK (only_one)
);
CREATE TABLE @schema@.message_cursors (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    delivered bigint NOT NULL
)
WITH (fillfactor='70');
CREATE TABLE @schema@.message_ids (
    event_id uuid NOT NULL,
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    stored_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.message_marks (
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    stored_at timestamp with time zone NOT NULL
);
CREATE TABLE @schema@.message_receivers (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    last bigint NOT NULL,
    last_stored_at timestamp with time zone DEFAULT now() NOT NULL
)
WITH (fillfactor='70');
CREATE TABLE @schema@.message_undelivered (
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    next bigint NOT NULL
)
WITH (fillfactor='50');
CREATE TABLE @schema@.message_undelivered_owner (
    only_one boolean DEFAULT true NOT NULL,
    owner uuid NOT NULL,
    until timestamp with time zone NOT NULL,
    CONSTRAINT message_undelivered_owner_only_one_check CHECK (only_one)
)
WITH (fillfactor='50');
CREATE TABLE @schema@.messages (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    prev bigint NOT NULL,
    event_id uuid NOT NULL,
    value text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    stored_at timestamp with time zone DEFAULT now() NOT NULL
)
PARTITION BY RANGE (stored_at);
CREATE TABLE @schema@.messages_d20261101 (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    prev bigint NOT NULL,
    event_id uuid NOT NULL,
    value text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    stored_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.messages_d20261102 (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    prev bigint NOT NULL,
    event_id uuid NOT NULL,
    value text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    stored_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.messages_default (
    receiver_id text NOT NULL COLLATE pg_catalog."C",
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    prev bigint NOT NULL,
    event_id uuid NOT NULL,
    value text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    stored_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.messages_progress (
    topic_epoch bigint NOT NULL,
    partition integer NOT NULL,
    next bigint NOT NULL,
    marked_at timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL
);
CREATE SEQUENCE @schema@.outbox_ids
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
CREATE TABLE @schema@.outbox (
    slot smallint DEFAULT (((EXTRACT(epoch FROM clock_timestamp()))::bigint / 10) % (4)::bigint) NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED NOT NULL,
    id bigint DEFAULT nextval('@schema@.outbox_ids'::regclass) NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
)
PARTITION BY LIST (slot);
CREATE TABLE @schema@.outbox_0 (
    slot smallint DEFAULT (((EXTRACT(epoch FROM clock_timestamp()))::bigint / 10) % (4)::bigint) NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED NOT NULL,
    id bigint DEFAULT nextval('@schema@.outbox_ids'::regclass) NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE @schema@.outbox_1 (
    slot smallint DEFAULT (((EXTRACT(epoch FROM clock_timestamp()))::bigint / 10) % (4)::bigint) NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED NOT NULL,
    id bigint DEFAULT nextval('@schema@.outbox_ids'::regclass) NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE @schema@.outbox_2 (
    slot smallint DEFAULT (((EXTRACT(epoch FROM clock_timestamp()))::bigint / 10) % (4)::bigint) NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED NOT NULL,
    id bigint DEFAULT nextval('@schema@.outbox_ids'::regclass) NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE @schema@.outbox_3 (
    slot smallint DEFAULT (((EXTRACT(epoch FROM clock_timestamp()))::bigint / 10) % (4)::bigint) NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtext(key) & 7)) STORED NOT NULL,
    id bigint DEFAULT nextval('@schema@.outbox_ids'::regclass) NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE @schema@.outbox_quarantine (
    id bigint NOT NULL,
    topic text NOT NULL,
    key text NOT NULL COLLATE pg_catalog."C",
    event_id uuid NOT NULL,
    kind text NOT NULL,
    source text NOT NULL,
    traceparent text,
    value text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    reason text,
    quarantined_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE SEQUENCE @schema@.post_ids
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    MAXVALUE 9007199254740991
    CACHE 1;
CREATE TABLE @schema@.posts (
    id bigint NOT NULL,
    author_id text NOT NULL COLLATE pg_catalog."C",
    content text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone
);
CREATE TABLE @schema@.processed_events (
    event_id uuid NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL
)
PARTITION BY RANGE (seen_at);
CREATE TABLE @schema@.processed_events_d20261101 (
    event_id uuid NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE @schema@.processed_events_default (
    event_id uuid NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL
);
ALTER TABLE ONLY @schema@.messages ATTACH PARTITION @schema@.messages_d20261101 FOR VALUES FROM ('2026-11-01 00:00:00+00') TO ('2026-11-02 00:00:00+00');
ALTER TABLE ONLY @schema@.messages ATTACH PARTITION @schema@.messages_d20261102 FOR VALUES FROM ('2026-11-02 00:00:00+00') TO ('2026-11-03 00:00:00+00');
ALTER TABLE ONLY @schema@.messages ATTACH PARTITION @schema@.messages_default DEFAULT;
ALTER TABLE ONLY @schema@.outbox ATTACH PARTITION @schema@.outbox_0 FOR VALUES IN ('0');
ALTER TABLE ONLY @schema@.outbox ATTACH PARTITION @schema@.outbox_1 FOR VALUES IN ('1');
ALTER TABLE ONLY @schema@.outbox ATTACH PARTITION @schema@.outbox_2 FOR VALUES IN ('2');
ALTER TABLE ONLY @schema@.outbox ATTACH PARTITION @schema@.outbox_3 FOR VALUES IN ('3');
ALTER TABLE ONLY @schema@.processed_events ATTACH PARTITION @schema@.processed_events_d20261101 FOR VALUES FROM ('2026-11-01 00:00:00+00') TO ('2026-11-02 00:00:00+00');
ALTER TABLE ONLY @schema@.processed_events ATTACH PARTITION @schema@.processed_events_default DEFAULT;
INSERT INTO @schema@._sqlx_migrations VALUES (1, 'installation', '2026-11-27 07:03:17.472013+00', true, '\x86f4fd7ef3634233885b4d5c77a12c2b636992730d938e1051c53edca1ccb91fe530b97eeefbba3f31ed0b62cdf49495', 2046683);
INSERT INTO @schema@._sqlx_migrations VALUES (2, 'comments', '2026-11-27 07:03:17.474421+00', true, '\xde683e9de482eae968ac0354992d2f9cebb9087587ba6c2821e8ee2009569d8a6689ed54cf3e8092fb0c4e015467be79', 3095107);
INSERT INTO @schema@._sqlx_migrations VALUES (3, 'messages', '2026-11-27 07:03:17.477749+00', true, '\x0daca8463f58a7d48dfc0ddec87d78839a426012ba6ebdf23ab0d254ddaeb98c20af49e2aed6a42cec84052f87cbb3d6', 5960380);
INSERT INTO @schema@._sqlx_migrations VALUES (4, 'undelivered', '2026-11-27 07:03:17.483982+00', true, '\x25cabd8fa1ff252aa4487a61c715454a7075c5b0d2fa1c6e6720d09b3c2e44a1247d29b15ea39a1e3aa0d30e9c5755fa', 2202284);
INSERT INTO @schema@._sqlx_migrations VALUES (5, 'message receivers age', '2026-11-27 07:03:17.486404+00', true, '\x4aeec5625217b647f15f2cbf4ceef2a7aa6194c52deba329eb72b53bb6b056bd85ad278bb60c706e4ee7a810b03bf85d', 497952);
INSERT INTO @schema@._sqlx_migrations VALUES (10, 'outbox', '2026-11-27 07:03:17.487103+00', true, '\x54d41235f97d2709fa52854f4b92987015bda6fa3fe0f464b80ec3aed401aee5b1559b48c3411d8ff64c6c04027a4dde', 7350494);
INSERT INTO @schema@._sqlx_migrations VALUES (11, 'feed', '2026-11-27 07:03:17.494706+00', true, '\xf0a5192c9ba23d9a37b870dc9be2d45ffcb9d4ce0359d335b839b9469bdc1080f2efc3500ba844f6c30a5bba7f987bec', 11716585);
INSERT INTO @schema@._sqlx_migrations VALUES (12, 'feed floors', '2026-11-27 07:03:17.506702+00', true, '\xa2a69139bee4313f53fdb5040ef5a315847d7b90fc26d4e16bf3d385d2518545180a06255352cd9a62b4a5c03809582e', 2758575);
INSERT INTO @schema@.comments VALUES ('018f0000-0000-7000-8000-000000000003', 0, 0, 1, 'a comment', NULL, NULL, '2026-11-01 10:00:00+00');
INSERT INTO @schema@.feed_authors VALUES ('bob', 1, 0);
INSERT INTO @schema@.feed_rows VALUES ('ann', 1);
INSERT INTO @schema@.feed_timelines VALUES (1, true);
INSERT INTO @schema@.feed_walk VALUES ('', '2026-11-27 07:03:17.506702+00', true);
INSERT INTO @schema@.follows VALUES ('bob', 'ann');
INSERT INTO @schema@.installation VALUES ('fc873812-1b09-4619-bfb5-62811b6c86dc', '2026-11-27 07:03:17.472013+00', true);
INSERT INTO @schema@.message_cursors VALUES ('ann', 0, 0, 3);
INSERT INTO @schema@.message_ids VALUES ('018f0000-0000-7000-8000-000000000001', 'ann', '2026-11-01 10:00:00+00');
INSERT INTO @schema@.message_ids VALUES ('018f0000-0000-7000-8000-000000000002', 'ann', '2026-11-01 10:05:00+00');
INSERT INTO @schema@.message_receivers VALUES ('ann', 0, 0, 5, '2026-11-01 10:05:00+00');
INSERT INTO @schema@.messages_d20261101 VALUES ('ann', 0, 0, 3, -1, '018f0000-0000-7000-8000-000000000001', '{"chatId":"c","senderId":"s","receiverId":"ann","content":"first"}', '2026-11-01 10:00:00+00', '2026-11-01 10:00:00+00');
INSERT INTO @schema@.messages_d20261101 VALUES ('ann', 0, 0, 5, 3, '018f0000-0000-7000-8000-000000000002', '{"chatId":"c","senderId":"s","receiverId":"ann","content":"second"}', '2026-11-01 10:05:00+00', '2026-11-01 10:05:00+00');
INSERT INTO @schema@.posts VALUES (1, 'bob', 'a post', '2026-11-01 10:00:00+00', NULL);
INSERT INTO @schema@.processed_events_d20261101 VALUES ('018f0000-0000-7000-8000-000000000004', '2026-11-01 10:00:00+00');
SELECT pg_catalog.setval('@schema@.feed_jobs_id_seq', 1, false);
SELECT pg_catalog.setval('@schema@.outbox_ids', 1, false);
SELECT pg_catalog.setval('@schema@.post_ids', 1, true);
ALTER TABLE ONLY @schema@._sqlx_migrations
    ADD CONSTRAINT _sqlx_migrations_pkey PRIMARY KEY (version);
ALTER TABLE ONLY @schema@.comments
    ADD CONSTRAINT comments_pkey PRIMARY KEY (event_id);
ALTER TABLE ONLY @schema@.comments
    ADD CONSTRAINT comments_position_key UNIQUE (topic_epoch, partition, "offset");
ALTER TABLE ONLY @schema@.comments_progress
    ADD CONSTRAINT comments_progress_pkey PRIMARY KEY (topic_epoch, partition);
ALTER TABLE ONLY @schema@.feed_authors
    ADD CONSTRAINT feed_authors_pkey PRIMARY KEY (author_id);
ALTER TABLE ONLY @schema@.feed_erasures
    ADD CONSTRAINT feed_erasures_pkey PRIMARY KEY (user_id);
ALTER TABLE ONLY @schema@.feed_floors
    ADD CONSTRAINT feed_floors_pkey PRIMARY KEY (user_id);
ALTER TABLE ONLY @schema@.feed_jobs
    ADD CONSTRAINT feed_jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY @schema@.feed_progress
    ADD CONSTRAINT feed_progress_pkey PRIMARY KEY (topic_epoch, partition);
ALTER TABLE ONLY @schema@.feed_requests
    ADD CONSTRAINT feed_requests_pkey PRIMARY KEY (event_id);
ALTER TABLE ONLY @schema@.feed_rows
    ADD CONSTRAINT feed_rows_pkey PRIMARY KEY (user_id, post_id);
ALTER TABLE ONLY @schema@.feed_timelines
    ADD CONSTRAINT feed_timelines_pkey PRIMARY KEY (only_one);
ALTER TABLE ONLY @schema@.feed_walk
    ADD CONSTRAINT feed_walk_pkey PRIMARY KEY (only_one);
ALTER TABLE ONLY @schema@.follows
    ADD CONSTRAINT follows_pkey PRIMARY KEY (followee_id, follower_id);
ALTER TABLE ONLY @schema@.installation
    ADD CONSTRAINT installation_only_one_key UNIQUE (only_one);
ALTER TABLE ONLY @schema@.installation
    ADD CONSTRAINT installation_pkey PRIMARY KEY (id);
ALTER TABLE ONLY @schema@.message_cursors
    ADD CONSTRAINT message_cursors_pkey PRIMARY KEY (receiver_id, topic_epoch, partition);
ALTER TABLE ONLY @schema@.message_ids
    ADD CONSTRAINT message_ids_pkey PRIMARY KEY (event_id, receiver_id);
ALTER TABLE ONLY @schema@.message_marks
    ADD CONSTRAINT message_marks_pkey PRIMARY KEY (topic_epoch, partition, "offset");
ALTER TABLE ONLY @schema@.message_receivers
    ADD CONSTRAINT message_receivers_pkey PRIMARY KEY (receiver_id, topic_epoch, partition);
ALTER TABLE ONLY @schema@.message_undelivered_owner
    ADD CONSTRAINT message_undelivered_owner_pkey PRIMARY KEY (only_one);
ALTER TABLE ONLY @schema@.message_undelivered
    ADD CONSTRAINT message_undelivered_pkey PRIMARY KEY (topic_epoch, partition);
ALTER TABLE ONLY @schema@.messages
    ADD CONSTRAINT messages_pkey PRIMARY KEY (receiver_id, topic_epoch, partition, "offset", stored_at);
ALTER TABLE ONLY @schema@.messages_d20261101
    ADD CONSTRAINT messages_d20261101_pkey PRIMARY KEY (receiver_id, topic_epoch, partition, "offset", stored_at);
ALTER TABLE ONLY @schema@.messages_d20261102
    ADD CONSTRAINT messages_d20261102_pkey PRIMARY KEY (receiver_id, topic_epoch, partition, "offset", stored_at);
ALTER TABLE ONLY @schema@.messages_default
    ADD CONSTRAINT messages_default_pkey PRIMARY KEY (receiver_id, topic_epoch, partition, "offset", stored_at);
ALTER TABLE ONLY @schema@.messages_progress
    ADD CONSTRAINT messages_progress_pkey PRIMARY KEY (topic_epoch, partition);
ALTER TABLE ONLY @schema@.outbox_quarantine
    ADD CONSTRAINT outbox_quarantine_pkey PRIMARY KEY (id);
ALTER TABLE ONLY @schema@.posts
    ADD CONSTRAINT posts_pkey PRIMARY KEY (id);
CREATE INDEX comments_newest ON @schema@.comments USING btree (created_at, topic_epoch, partition, "offset");
CREATE INDEX comments_of_post ON @schema@.comments USING btree (post_id, created_at, topic_epoch, partition, "offset") WHERE (post_id IS NOT NULL);
CREATE INDEX feed_authors_merged ON @schema@.feed_authors USING btree (author_id) WHERE (state <> 0);
CREATE INDEX feed_jobs_of_author ON @schema@.feed_jobs USING btree (author_id, kind);
CREATE INDEX feed_requests_age ON @schema@.feed_requests USING btree (made_at);
CREATE INDEX follows_of_follower ON @schema@.follows USING btree (follower_id, followee_id);
CREATE INDEX message_ids_age ON @schema@.message_ids USING btree (stored_at);
CREATE INDEX outbox_order ON ONLY @schema@.outbox USING btree (shard, id);
CREATE INDEX outbox_0_shard_id_idx ON @schema@.outbox_0 USING btree (shard, id);
CREATE INDEX outbox_1_shard_id_idx ON @schema@.outbox_1 USING btree (shard, id);
CREATE INDEX outbox_2_shard_id_idx ON @schema@.outbox_2 USING btree (shard, id);
CREATE INDEX outbox_3_shard_id_idx ON @schema@.outbox_3 USING btree (shard, id);
CREATE INDEX outbox_quarantine_keys ON @schema@.outbox_quarantine USING btree (key);
CREATE INDEX posts_deleted ON @schema@.posts USING btree (deleted_at) WHERE (deleted_at IS NOT NULL);
CREATE INDEX posts_of_author ON @schema@.posts USING btree (author_id, id);
CREATE INDEX processed_events_ids ON ONLY @schema@.processed_events USING btree (event_id);
CREATE INDEX processed_events_d20261101_event_id_idx ON @schema@.processed_events_d20261101 USING btree (event_id);
CREATE INDEX processed_events_default_event_id_idx ON @schema@.processed_events_default USING btree (event_id);
ALTER INDEX @schema@.messages_pkey ATTACH PARTITION @schema@.messages_d20261101_pkey;
ALTER INDEX @schema@.messages_pkey ATTACH PARTITION @schema@.messages_d20261102_pkey;
ALTER INDEX @schema@.messages_pkey ATTACH PARTITION @schema@.messages_default_pkey;
ALTER INDEX @schema@.outbox_order ATTACH PARTITION @schema@.outbox_0_shard_id_idx;
ALTER INDEX @schema@.outbox_order ATTACH PARTITION @schema@.outbox_1_shard_id_idx;
ALTER INDEX @schema@.outbox_order ATTACH PARTITION @schema@.outbox_2_shard_id_idx;
ALTER INDEX @schema@.outbox_order ATTACH PARTITION @schema@.outbox_3_shard_id_idx;
ALTER INDEX @schema@.processed_events_ids ATTACH PARTITION @schema@.processed_events_d20261101_event_id_idx;
ALTER INDEX @schema@.processed_events_ids ATTACH PARTITION @schema@.processed_events_default_event_id_idx;
