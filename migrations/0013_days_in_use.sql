-- Days (UTC) on which a processor ran. Retention counts them and not only what the clock says: a clock that jumps ahead
-- adds one day, not all that it passed over.
CREATE TABLE days_in_use (
    day       date        PRIMARY KEY,
    noted_at  timestamptz NOT NULL DEFAULT now()
);

-- Before this table there was only the clock. All days up to the newest daily partition that has begun count as days in use.
INSERT INTO days_in_use (day)
SELECT generate_series(date '2020-01-01', coalesce(
    (SELECT max(to_date(right(relname, 8), 'YYYYMMDD'))
     FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
     WHERE inhparent IN ('messages'::regclass, 'processed_events'::regclass) AND relname ~ '_d[0-9]{8}$'
       AND to_date(right(relname, 8), 'YYYYMMDD') <= (now() AT TIME ZONE 'UTC')::date),
    (now() AT TIME ZONE 'UTC')::date), interval '1 day')::date;
