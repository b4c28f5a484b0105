-- Feeds whose oldest rows were trimmed: nothing below the floor belongs to them any more, whether its row is still there or not.
CREATE TABLE feed_floors (
    user_id  text   COLLATE "C" PRIMARY KEY,
    floor    bigint NOT NULL
);

-- How far the walk over all feeds is that trims them. Who locks the row goes on with it.
CREATE TABLE feed_walk (
    after_user  text        COLLATE "C" NOT NULL DEFAULT '',
    -- Of this walk, or the next one.
    begins_at   timestamptz NOT NULL DEFAULT now(),
    only_one    boolean     PRIMARY KEY DEFAULT true CHECK (only_one)
);

INSERT INTO feed_walk DEFAULT VALUES;
