"""Scenario `feed-growth`: the figures of feeds by number of users, with the plans of statements and a verification."""

import json
import time

from .feed import accepted, cached_reads, to_feeds
from .feed_tools import Client, Fleet, command, drop_timelines, seed, sql, verify
from .procs import say

# Users: (follows of each, posts), such that each size is created within two minutes. The second size has a million
# posts and ten million feed rows.
SIZES = {10_000: (20, 20_000), 100_000: (10, 1_000_000), 1_000_000: (5, 100_000)}
# The maximum number of users who post during the measurement.
AUTHORS = 100_000
TABLES = "posts, follows, feed_rows, feed_authors, feed_requests, feed_jobs, feed_floors, processed_events, outbox"


def run(stack, settings):
    sizes = {1_000: (20, 1_000), 2_000: (10, 4_000)} if settings.quick else {users: SIZES[users] for users in settings.feed_users}
    rows = [one_size(stack, settings, users, follows, posts) for users, (follows, posts) in sizes.items()]
    errors = sum(row[name]["errors"] for row in rows for name in ("alone", "steady", "reads"))
    drift = sum(row["drift"] for row in rows)
    return {"sizes": rows, "check": {"errors": errors, "drift": drift, "passed": not (errors or drift)}}


def one_size(stack, settings, users, follows, posts):
    """Measures one size. Empties all tables first; the backlog of the previous size is already processed."""
    sql(stack, f"TRUNCATE {TABLES}", 60)
    began = time.monotonic()
    seed(stack, users, follows, posts)
    seeded = round(time.monotonic() - began)
    say(f"feed-growth: {users} users with {follows} follows each, seeded in {seeded} s")
    found = {"users": users, "follows": follows, "seeded_s": seeded, "seeded_posts": posts,
             "alone": accepted(stack, settings, min(users, AUTHORS), others=False)}
    reads = cached_reads(stack, settings, users)
    found |= {"reads": reads["api"], "reads_ratio": reads["ratio"], "steady": to_feeds(stack, settings, min(users, AUTHORS), 200 if settings.quick else 1_000)}
    found["cold_ms"] = cold(stack, users)
    found["counts"] = {table: int(sql(stack, f"SELECT count(*) FROM {table}", 300)) for table in ("posts", "follows", "feed_rows")}
    # `plans` fails if a statement scans a whole large table.
    found["plans"] = json.loads(command(stack, "plans", "--output", "json"))
    began = time.monotonic()
    found["drift"], found["verify_s"] = verify(stack, 1_000), round(time.monotonic() - began, 1)
    say(f"feed-growth: with {found['counts']} no plan of {len(found['plans'])} scans a large table; verified 1,000 feeds in {found['verify_s']} s")
    found["bytes"] = {table: int(sql(stack, f"SELECT pg_total_relation_size('{table}')")) for table in ("posts", "follows", "feed_rows")}
    return found


def cold(stack, users):
    """Returns the median of 200 reads of first pages that Redis does not have."""
    fleet, took = Fleet(stack, "processor", "api"), []
    client = Client(fleet["api"].url)
    drop_timelines(stack)
    for number in range(users - 200, users):
        began = time.perf_counter()
        client.ask("GET", f"/feeds/u{number}?limit=20")
        took.append((time.perf_counter() - began) * 1000)
    fleet.stop()
    return round(sorted(took)[100], 1)
