-- API keys. Of the key itself, only a hash is stored.
CREATE TABLE api_keys (
    id          text        COLLATE "C" PRIMARY KEY,
    -- SHA-256 of the key's secret part, which is random and long, so that no slow hash is needed.
    secret_hash bytea       NOT NULL CHECK (octet_length(secret_hash) = 32),
    subject     text        NOT NULL,
    tenant      text,
    scopes      text[]      NOT NULL,
    note        text        NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    revoked_at  timestamptz
);

-- Counts the changes of the keys. Processes read it every second, and the keys only when it has changed. The
-- statement that changes a key locks the row, so the changes become visible in the order of the count.
CREATE TABLE api_key_changes (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    count   bigint  NOT NULL
);
INSERT INTO api_key_changes (count) VALUES (0);
