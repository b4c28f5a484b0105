-- When the last message of a receiver came, so that those who get none any more can be forgotten. Not indexed: it changes with
-- every message, and is looked at once a day.
ALTER TABLE message_receivers ADD COLUMN last_stored_at timestamptz NOT NULL DEFAULT now();
