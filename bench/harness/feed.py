"""Scenario `feed`: accepting posts, reading feeds, fan-out of many posts, fan-out to many followers, and cold feeds."""

import json
import statistics
import time

from .feed_tools import Backlog, Client, Fleet, Probe, drop_timelines, seed, sql, verify
from .load import interleave, measured_wrk, oha, summary
from .procs import Failed, await_true, say, say_aims

USERS, FOLLOWS = 10_000, 20
READERS = 5_000
# Follows of each user with a cold feed.
AUTHORS, CELEBRITIES = 500, 20


def run(stack, settings):
    users, posts = (1_000, 1_000) if settings.quick else (USERS, 20_000)
    say(f"feed: seeding {users} users, {FOLLOWS} follows each")
    seed(stack, users, FOLLOWS, posts)
    result = {"users": users, "follows": FOLLOWS}
    result["accepted_alone"] = accepted(stack, settings, users, others=False)
    result["accepted"] = accepted(stack, settings, users, others=True)
    result["reads"] = cached_reads(stack, settings, users)
    result["to_feeds"] = [to_feeds(stack, settings, users, rate) for rate in ((200,) if settings.quick else (1_000, 3_000))]
    result["one_to_many"] = one_to_many(stack, settings, users)
    result["cold"] = cold(stack, 5 if settings.quick else 30)
    cases = (result["accepted"], result["accepted_alone"], result["reads"]["api"], *result["to_feeds"])
    errors, drift = sum(case["errors"] for case in cases), verify(stack)
    result["check"] = {"errors": errors, "drift": drift, "passed": errors == 0 and drift == 0}
    result["aims"] = aims(result)
    say_aims("feed", result["aims"])
    return result


def accepted(stack, settings, users, others):
    """Measures posts on 100 connections, with relay and processor running or stopped."""
    fleet = Fleet(stack, *(("relay", "processor", "api") if others else ("api",)))
    behind = Backlog(stack, fleet["api"], fleet["processor"]) if others else None
    rounds = [measured_wrk(fleet.pids, f"{fleet['api'].url}/posts", ["posts", str(users)], settings, 100, stack.work)
              for _ in range(settings.rounds)]
    found = summary(rounds)
    say(f"feed: {found['rps']} posts/s accepted {'with relay and processor' if others else 'alone'}, p99 {found['p99_ms']} ms")
    if others:
        left = behind.count() - behind.first
    else:
        fleet.stop()
        fleet, left = Fleet(stack, "relay", "processor"), found["ok"]
    found["left"], found["drained_after_s"] = round(left), fleet.drain()
    found["drained_per_s"] = round(left / max(found["drained_after_s"], 0.1))
    say(f"feed: the backlog of {left:.0f} posts is in feeds after {found['drained_after_s']} s")
    fleet.stop()
    return found


def cached_reads(stack, settings, users):
    """Measures reads of first pages from Redis, in turns with the bare route, and at half of the measured rate."""
    bare, fleet = stack.start_bare(), Fleet(stack, "processor", "api")
    api, readers = fleet["api"], min(users, READERS)
    pids = fleet.pids | {"bare": bare.pid}

    def target(url):
        return lambda: measured_wrk(pids, url, ["feed", str(readers)], settings, 50, stack.work)

    # Builds the timelines in Redis.
    measured_wrk(pids, api.url, ["feed", str(readers)], settings, 20, stack.work)
    found = interleave({"bare": target(bare.url), "api": target(api.url)}, settings.rounds)
    found["ratio"] = round(found["api"]["rps"] / max(found["bare"]["rps"], 1), 4)
    say(f"feed: {found['api']['rps']} cached reads/s, {found['ratio']:.1%} of bare")
    urls = stack.work / "feeds.txt"
    urls.write_text("\n".join(f"{api.url}/feeds/u{number}" for number in range(1, readers + 1)) + "\n")
    found["half"] = oha(urls, None, found["api"]["rps"] // 2, 50, settings.seconds, fleet.pids, stack.work)
    hits, misses = (stack.metric(api, f'postrider_feed_reads_total{{cache="{kind}"}}') for kind in ("hit", "miss"))
    fleet.stop()
    stack.stop(bare)
    return found | {"hits": hits, "misses": misses}


def bodies(stack, users):
    """Writes a file of posts by authors with 20 followers each."""
    file = stack.work / "posts.jsonl"
    lines = (json.dumps({"author_id": f"u{number}", "content": "x" * 60}) for number in range(1, users + 1))
    file.write_text("\n".join(lines) + "\n")
    return file


def to_feeds(stack, settings, users, rate):
    """Measures a constant rate of posts: the backlog, and the time until a follower sees a post."""
    fleet = Fleet(stack, "relay", "processor", "api")
    probe, backlog = Probe(fleet["api"].url), Backlog(stack, fleet["api"], fleet["processor"])
    rows = stack.metric(fleet["processor"], "postrider_feed_rows_total")
    probe.start()
    backlog.start()
    found = oha(f"{fleet['api'].url}/posts", bodies(stack, users), rate, 100, 5 if settings.quick else settings.feed_seconds,
                fleet.pids, stack.work, each_line=True)
    found |= {"backlog": backlog.growth(), "visible": probe.percentiles(), "drained_after_s": fleet.drain()}
    found["feed_rows"] = stack.metric(fleet["processor"], "postrider_feed_rows_total") - rows
    say(f"feed: {found['rps']} posts/s to feeds, visible p99 {found['visible']['p99_ms']} ms, {found['backlog']['behind']} behind, "
        f"grows by {found['backlog']['grows_per_s']}/s")
    fleet.stop()
    return found


def one_to_many(stack, settings, users):
    """Measures the time until all followers of an author with many followers have a post, while others post 500 times a
    second, and the time until a follower sees a post of another author, with and without those posts."""
    followers, seconds, stars = (999, 4, 2) if settings.quick else (9_999, 15, 10)
    names = f"SELECT 'star', 'fan' || n FROM generate_series(1, {followers}) AS n"
    sql(stack, f"INSERT INTO follows (followee_id, follower_id) {names} ON CONFLICT DO NOTHING; "
               f"INSERT INTO feed_authors (author_id, followers) VALUES ('star', {followers}) ON CONFLICT DO NOTHING; ANALYZE follows")
    fleet = Fleet(stack, "relay", "processor", "api")
    client, took, others = Client(fleet["api"].url), [], {}
    for name, posts in (("without", 0), ("with", stars)):
        probe, file = Probe(fleet["api"].url), bodies(stack, users)
        load = stack.start("oha", ["oha", "--no-tui", "-z", f"{seconds}s", "-q", "500", "-c", "20", "-m", "POST", "-T",
                                   "application/json", "-Z", str(file), f"{fleet['api'].url}/posts"])
        probe.start()
        for _ in range(posts):
            took.append(until_all_have_it(stack, client, followers))
            time.sleep(0.8)
        load.child.wait(seconds + 20)
        stack.children.remove(load)
        others[name] = probe.percentiles()
        fleet.drain()
    say(f"feed: one post to {followers} feeds in {statistics.median(took)} ms; p99 of others {others['without']['p99_ms']} ms "
        f"without, {others['with']['p99_ms']} ms with it")
    fleet.stop()
    return {"followers": followers, "ms": took, "others": others}


def until_all_have_it(stack, client, followers):
    """Returns the milliseconds from the response to a post until the last follower sees it. Followers get it in the
    order of their names, so this reads only the last one's feed, and then checks that all have the post."""
    last = max(f"fan{number}" for number in range(1, followers + 1))
    post = client.post("star")
    began = time.perf_counter()
    await_true("fan-out to the last follower", 20,
               lambda: post in client.ask("GET", f"/feeds/{last}?limit=20")[1]["post_ids"], every=0.002)
    took = round((time.perf_counter() - began) * 1000)
    count = int(sql(stack, "SELECT count(*) FROM follows JOIN feed_rows ON user_id = follower_id "
                           f"AND post_id = {post} WHERE followee_id = 'star'"))
    if count != followers:
        raise Failed(f"the last of {followers} followers has the post, but only {count} have it")
    return took


def cold(stack, users):
    """Measures first pages of users who follow many authors and some celebrities, when Redis has no timelines."""
    sql(stack, f"""
        INSERT INTO follows (followee_id, follower_id)
        SELECT author, 'cold' || n FROM generate_series(1, {users}) AS n, (
            SELECT 'u' || a AS author FROM generate_series(1, {AUTHORS}) AS a
            UNION ALL SELECT 'celebrity' || c FROM generate_series(1, {CELEBRITIES}) AS c) AS followed;
        INSERT INTO feed_authors (author_id, followers, state) SELECT 'celebrity' || c, 20000, 2 FROM generate_series(1, {CELEBRITIES}) AS c;
        UPDATE feed_authors SET followers = followers + {users} WHERE author_id IN (SELECT 'u' || a FROM generate_series(1, {AUTHORS}) AS a);
        INSERT INTO posts (id, author_id, content) SELECT nextval('post_ids'), 'celebrity' || c, 'cold' FROM generate_series(1, {CELEBRITIES}) AS c, generate_series(1, 200);
        INSERT INTO feed_rows SELECT 'cold' || n, id FROM posts, generate_series(1, {users}) AS n
        WHERE author_id IN (SELECT 'u' || a FROM generate_series(1, {AUTHORS}) AS a);
        ANALYZE""", 600)
    fleet, took = Fleet(stack, "processor", "api"), []
    client = Client(fleet["api"].url)
    await_true("first feed read from a timeline", 20,
               lambda: client.ask("GET", "/feeds/u1")[2]["X-Cache"] == "HIT", every=0.2)
    for number in range(1, users + 1):
        drop_timelines(stack)
        began = time.perf_counter()
        status, page, headers = client.ask("GET", f"/feeds/cold{number}?limit=20")
        took.append((time.perf_counter() - began) * 1000)
        assert (status, len(page["post_ids"]), headers["X-Cache"]) == (200, 20, "MISS"), (status, page, headers["X-Cache"])
    fleet.stop()
    took.sort()
    found = {"authors": AUTHORS, "celebrities": CELEBRITIES, "reads": users, "p50_ms": round(statistics.median(took), 1),
             "max_ms": round(took[-1], 1)}
    say(f"feed: a cold feed in {found['p50_ms']} ms (p50), {found['max_ms']} ms (max)")
    return found


def aims(result):
    alone, together, reads, many, cold_feed = (result[name] for name in
                                               ("accepted_alone", "accepted", "reads", "one_to_many", "cold"))
    slow, fast = result["to_feeds"][0], result["to_feeds"][-1]
    steady = fast["rps"] >= fast["wanted_rps"] * 0.99 and fast["backlog"]["grows_per_s"] <= fast["wanted_rps"] * 0.01
    others, spared = many["others"], max(many["others"]["without"]["p99_ms"] * 1.5, 50)
    rows = [
        ("posts accepted, relay and processor paused, 100 connections", f"{alone['rps']:,}/s", "at least 10,000/s",
         alone["rps"] >= 10_000),
        ("posts accepted, relay and processor running, 100 connections", f"{together['rps']:,}/s", "at least 6,000/s",
         together["rps"] >= 6_000),
        ("cached feed reads, 50 connections", f"{reads['api']['rps']:,}/s, {reads['ratio']:.1%} of the bare route's {reads['bare']['rps']:,}/s",
         "at least 60%", reads["ratio"] >= 0.6),
        (f"cached feed reads at {reads['half']['wanted_rps']:,}/s, half of that", f"p99 {reads['half']['p99_ms']} ms", "below 10 ms",
         reads["half"]["p99_ms"] < 10),
        (f"{fast['wanted_rps']:,} posts/s to 20 feeds each", f"{fast['rps']:,}/s, backlog of "
         f"{fast['backlog']['behind']:,} at the end, growing by {fast['backlog']['grows_per_s']:,}/s",
         "sustained, without a growing backlog", steady),
        (f"from 202 to visible at {slow['wanted_rps']:,} posts/s", f"p99 {slow['visible']['p99_ms']} ms", "below 250 ms",
         slow["visible"]["p99_ms"] < 250),
        (f"one post to {many['followers']:,} followers",
         f"max {max(many['ms'])} ms, median {statistics.median(many['ms']):.0f} ms",
         "below 300 ms", max(many["ms"]) < 300),
        ("from 202 to visible for posts of others meanwhile",
         f"p99 {others['with']['p99_ms']} ms, {others['without']['p99_ms']} ms without it",
         "at most 1.5 times that, or 50 ms", others["with"]["p99_ms"] <= spared),
        (f"a cold feed of {cold_feed['authors']} authors and {cold_feed['celebrities']} celebrities",
         f"{cold_feed['p50_ms']} ms p50, {cold_feed['max_ms']} ms max", "p50 below 20 ms", cold_feed["p50_ms"] < 20),
    ]
    return [dict(zip(("what", "measured", "aim", "reached"), row)) for row in rows]
