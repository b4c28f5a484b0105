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

-- Counts the changes of the keys. Processes read it every second, and the keys when it has changed. A change locks the
-- row, so the changes become visible in the order of the count.
CREATE TABLE api_key_changes (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    count   bigint  NOT NULL
);
INSERT INTO api_key_changes (count) VALUES (0);

-- However a key is changed, also by hand.
CREATE FUNCTION count_api_key_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE api_key_changes SET count = count + 1;
    RETURN NULL;
END
$$;
CREATE TRIGGER count_changes AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION count_api_key_change();
