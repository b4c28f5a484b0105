"""Posts accepted, cached feeds read, posts from acceptance to feeds, and one post to many followers."""

import http.client
import json
import statistics
import threading
import time
import urllib.parse

from .load import interleave, measured_wrk, oha, summary
from .procs import Failed, await_true, say
from .stack import shell, short

USERS, FOLLOWS = 10_000, 20


def run(stack, settings):
    sizes = (1_000, 1_000) if settings.quick else (USERS, 20_000)
    say(f"feed: seeding {sizes[0]} users, {FOLLOWS} follows each")
    seed(stack, sizes[0], sizes[1])
    result = {"users": sizes[0], "follows": FOLLOWS}
    result["accepted_alone"] = accepted(stack, settings, sizes[0], others=False)
    result["accepted"] = accepted(stack, settings, sizes[0], others=True)
    result["reads"] = cached_reads(stack, settings, sizes[0])
    result["to_feeds"] = to_feeds(stack, settings, sizes[0])
    result["one_to_many"] = one_to_many(stack, 999 if settings.quick else 9_999)
    errors = sum(case["errors"] for case in (result["accepted"], result["accepted_alone"], *result["to_feeds"]["rates"]))
    drift = verify(stack)
    result["check"] = {"errors": errors, "drift": drift, "passed": errors == 0 and drift == 0}
    return result


def command(stack, *words, seconds=600):
    return shell([stack.binary, "feed", *words], seconds, env=stack.product_env("api", 0, 0), cwd=stack.work)


def seed(stack, users, posts):
    command(stack, "seed", "--users", str(users), "--follows", str(FOLLOWS), "--posts", str(posts), "--shape", "even")


def verify(stack):
    report = json.loads(command(stack, "verify", "--sample", "500", "--output", "json"))
    return report["missing_rows"] + report["surplus_rows"] + report["wrong_timelines"]


def start_all(stack):
    return [stack.start_product(role) for role in ("relay", "processor")]


def drained(stack, relay, processor):
    """Nothing is on its way to feeds any more."""
    return (stack.metric(relay, "postrider_outbox_oldest_age_seconds") == 0
            and stack.metric(processor, "postrider_feed_jobs_waiting") == 0
            and stack.metric(processor, "postrider_consumer_lag_records") == 0)


def accepted(stack, settings, users, others):
    """Posts at 100 connections, with relay and processor running or without them."""
    running = start_all(stack) if others else []
    api = stack.start_product("api")
    pids = stack.pids | {"api": api.pid} | {child.name: child.pid for child in running}
    rounds = [measured_wrk(pids, f"{api.url}/posts", ["posts", str(users)], settings, 100, stack.work)
              for _ in range(settings.rounds)]
    found = summary(rounds)
    say(f"feed: {found['rps']} posts/s accepted {'with relay and processor' if others else 'alone'}, p99 {found['p99_ms']} ms")
    stack.stop(api)
    if not others:
        running = start_all(stack)
    relay, processor = running
    began = time.monotonic()
    await_true("the backlog is carried into feeds", 240, lambda: drained(stack, relay, processor), every=0.5)
    found["drained_after_s"] = round(time.monotonic() - began, 1)
    for child in running:
        stack.stop(child)
    return found


def cached_reads(stack, settings, users):
    """First pages out of Redis beside the bare route."""
    bare, processor, api = stack.start_bare(), stack.start_product("processor"), stack.start_product("api")
    readers = min(users, 5_000)
    pids = stack.pids | {"bare": bare.pid, "api": api.pid, "processor": processor.pid}

    def target(url):
        return lambda: measured_wrk(pids, url, ["feed", str(readers)], settings, 50, stack.work)

    # Once over all of them, so that their timelines are there.
    measured_wrk(pids, api.url, ["feed", str(readers)], settings, 20, stack.work)
    found = interleave({"bare": target(bare.url), "api": target(api.url)}, settings.rounds)
    hits, misses = (stack.metric(api, f'postrider_feed_reads_total{{cache="{kind}"}}') for kind in ("hit", "miss"))
    found["ratio"] = round(found["api"]["rps"] / max(found["bare"]["rps"], 1), 4)
    say(f"feed: {found['api']['rps']} cached reads/s, {found['ratio']:.1%} of bare")
    for child in (api, processor, bare):
        stack.stop(child)
    return found | {"hits": hits, "misses": misses}


class Probe(threading.Thread):
    """Posts now and then, and looks when a follower sees it."""

    def __init__(self, url, author, follower):
        super().__init__(daemon=True)
        self.address, self.author, self.follower = urllib.parse.urlsplit(url), author, follower
        self.took, self.over = [], threading.Event()

    def ask(self, connection, method, path, body=None):
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def run(self):
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=10)
        while not self.over.wait(0.05):
            post = json.dumps({"author_id": self.author, "content": "probe"})
            status, body = self.ask(connection, "POST", "/posts", post)
            if status != 202:
                continue
            began = time.perf_counter()
            while time.perf_counter() - began < 10:
                status, page = self.ask(connection, "GET", f"/feeds/{self.follower}?limit=20")
                if status == 200 and body["post_id"] in page["post_ids"]:
                    break
                time.sleep(0.002)
            self.took.append((time.perf_counter() - began) * 1000)

    def percentiles(self):
        self.over.set()
        self.join(15)
        took = sorted(self.took)
        if len(took) < 10:
            raise Failed(f"only {len(took)} probes were seen")
        return {"probes": len(took), "p50_ms": round(statistics.median(took), 1),
                "p99_ms": round(took[len(took) * 99 // 100], 1), "max_ms": round(took[-1], 1)}


def follow(api, follower, followee):
    address = urllib.parse.urlsplit(api.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request("POST", "/follow", json.dumps({"follower_id": follower, "followee_id": followee}),
                       {"content-type": "application/json"})
    if connection.getresponse().status != 200:
        raise Failed("a follow was refused")
    connection.close()


def to_feeds(stack, settings, users):
    """Constant rates of posts by authors with 20 followers: the backlog, and how soon a follower sees a post."""
    relay, processor = start_all(stack)
    api = stack.start_product("api")
    follow(api, "watcher", "probe")
    bodies = stack.work / "posts.jsonl"
    lines = (json.dumps({"author_id": f"u{number}", "content": "x" * 60}) for number in range(1, users + 1))
    bodies.write_text("\n".join(lines) + "\n")
    rates = []
    for rate in (200,) if settings.quick else (1_000, 3_000):
        probe = Probe(api.url, "probe", "watcher")
        probe.start()
        pids = stack.pids | {"api": api.pid, "relay": relay.pid, "processor": processor.pid}
        rows = stack.metric(processor, "postrider_feed_rows_total")
        found = oha(f"{api.url}/posts", bodies, rate, 100, 5 if settings.quick else 60, pids, stack.work, each_line=True)
        backlog = stack.metric(processor, "postrider_consumer_lag_records")
        age = stack.metric(relay, "postrider_outbox_oldest_age_seconds")
        found["feed_rows"] = stack.metric(processor, "postrider_feed_rows_total") - rows
        found |= {"visible": probe.percentiles(), "backlog_records": backlog, "outbox_age_s": round(age, 2)}
        say(f"feed: {found['rps']} posts/s to feeds, visible p99 {found['visible']['p99_ms']} ms, backlog {backlog:.0f}")
        await_true("the backlog is carried into feeds", 240, lambda: drained(stack, relay, processor), every=0.5)
        rates.append(found)
    for child in (api, processor, relay):
        stack.stop(child)
    return {"rates": rates}


def one_to_many(stack, followers):
    """One post by an author with many followers, until the last of them has it."""
    names = f"SELECT 'star', 'fan' || n FROM generate_series(1, {followers}) AS n"
    sql(stack, f"INSERT INTO follows (followee_id, follower_id) {names} ON CONFLICT DO NOTHING; "
               f"INSERT INTO feed_authors (author_id, followers) VALUES ('star', {followers}) ON CONFLICT DO NOTHING")
    relay, processor = start_all(stack)
    api = stack.start_product("api")
    took = []
    for number in range(5):
        address = urllib.parse.urlsplit(api.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        connection.request("POST", "/posts", json.dumps({"author_id": "star", "content": f"post {number}"}),
                           {"content-type": "application/json"})
        post = json.loads(connection.getresponse().read())["post_id"]
        began = time.perf_counter()
        count = f"SELECT count(*) FROM feed_rows JOIN follows ON followee_id = 'star' AND follower_id = user_id WHERE post_id = {post}"
        await_true("all of them have it", 20, lambda: int(sql(stack, count)) == followers, every=0.01)
        took.append(round((time.perf_counter() - began) * 1000))
    say(f"feed: one post to {followers} feeds in {statistics.median(took)} ms (polled by psql)")
    for child in (api, processor, relay):
        stack.stop(child)
    return {"followers": followers, "ms": took}


def sql(stack, statement):
    argv = ["psql", "-XAtq", stack.env["DATABASE_URL"], "-c", f"SET search_path = postrider; {statement}"]
    return shell(argv, 30).strip()
