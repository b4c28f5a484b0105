-- One row that says which installation these tables belong to.
CREATE TABLE installation (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    created_at  timestamptz NOT NULL DEFAULT now(),
    only_one    boolean NOT NULL DEFAULT true UNIQUE CHECK (only_one)
);

INSERT INTO installation DEFAULT VALUES;
