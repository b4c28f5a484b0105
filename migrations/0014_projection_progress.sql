-- One table for how far each projection has stored each partition of its topic: everything below `next`. The statement
-- that stores a batch moves it too.
CREATE TABLE projection_progress (
    projection   text        COLLATE "C" NOT NULL,
    topic_epoch  bigint      NOT NULL,
    partition    integer     NOT NULL,
    next         bigint      NOT NULL,
    -- Time of the last mark of messages, from which their age is known.
    marked_at    timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (projection, topic_epoch, partition)
) WITH (fillfactor = 50);

-- Programs of the version before find the former tables as views that they can write to. A later minor version drops them.
-- While something else holds them, such as a dump, this fails, and `postrider migrate` can be run again.
SET LOCAL lock_timeout = '3s';
LOCK TABLE comments_progress, messages_progress, feed_progress IN ACCESS EXCLUSIVE MODE;

INSERT INTO projection_progress (projection, topic_epoch, partition, next)
SELECT 'comments', topic_epoch, partition, next FROM comments_progress
UNION ALL SELECT 'feed', topic_epoch, partition, next FROM feed_progress;
INSERT INTO projection_progress (projection, topic_epoch, partition, next, marked_at)
SELECT 'messages', topic_epoch, partition, next, marked_at FROM messages_progress;

DROP TABLE comments_progress, messages_progress, feed_progress;

CREATE VIEW comments_progress AS
    SELECT topic_epoch, partition, next, projection FROM projection_progress WHERE projection = 'comments';
ALTER VIEW comments_progress ALTER COLUMN projection SET DEFAULT 'comments';
CREATE VIEW feed_progress AS
    SELECT topic_epoch, partition, next, projection FROM projection_progress WHERE projection = 'feed';
ALTER VIEW feed_progress ALTER COLUMN projection SET DEFAULT 'feed';
CREATE VIEW messages_progress AS
    SELECT topic_epoch, partition, next, marked_at, projection FROM projection_progress WHERE projection = 'messages';
ALTER VIEW messages_progress ALTER COLUMN projection SET DEFAULT 'messages';
