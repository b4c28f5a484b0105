"""Tools of the feed scenarios: seeding, requests, SQL, probes and the backlog."""

import http.client
import json
import statistics
import threading
import time
import urllib.parse

from .procs import Failed, await_true
from .stack import shell

JSON = {"content-type": "application/json"}


def command(stack, *words, seconds=900):
    return shell([stack.binary, "feed", *words], seconds, env=stack.product_env("api", 0, 0), cwd=stack.work)


def seed(stack, users, follows, posts, shape="even", prefix="u"):
    command(stack, "seed", "--users", str(users), "--follows", str(follows), "--posts", str(posts), "--shape", shape,
            "--prefix", prefix)


def verify(stack, sample=500):
    """Returns the number of wrong rows and timelines in the feeds of `sample` users."""
    report = json.loads(command(stack, "verify", "--sample", str(sample), "--output", "json"))
    return report["missing_rows"] + report["surplus_rows"] + report["wrong_timelines"]


def sql(stack, statement, seconds=120):
    argv = ["psql", "-XAtq", stack.env["DATABASE_URL"], "-c", f"SET search_path = postrider; {statement}"]
    return shell(argv, seconds).strip()


def drop_timelines(stack):
    """Deletes all timelines from Redis, and nothing else."""
    script = ("for _, key in ipairs(redis.call('KEYS', 'postrider:feed:e[0-9]*')) do redis.call('UNLINK', key) end return 1")
    shell(["redis-cli", "-u", stack.env["REDIS_URL"], "EVAL", script, "0"], 30)


class Client:
    """One connection to an api process."""

    def __init__(self, url):
        address = urllib.parse.urlsplit(url)
        self.connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)

    def ask(self, method, path, body=None):
        self.connection.request(method, path, json.dumps(body) if body else None, JSON)
        answer = self.connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text), answer.headers

    def follow(self, follower, followee):
        if self.ask("POST", "/follow", {"follower_id": follower, "followee_id": followee})[0] != 200:
            raise Failed("a follow was refused")

    def post(self, author, content="a post of the bench"):
        status, body, _ = self.ask("POST", "/posts", {"author_id": author, "content": content})
        if status != 202:
            raise Failed(f"a post was refused: {status} {body}")
        return body["post_id"]


class Probe(threading.Thread):
    """Posts every 50 ms after the last post was seen, and measures the time until its follower sees the post."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.client, self.took, self.over = Client(url), [], threading.Event()
        self.client.follow("watcher", "probe")

    def run(self):
        while not self.over.wait(0.05):
            post = self.client.post("probe")
            began = time.perf_counter()
            while time.perf_counter() - began < 30:
                status, page, _ = self.client.ask("GET", "/feeds/watcher?limit=20")
                if status == 200 and post in page["post_ids"]:
                    break
                time.sleep(0.002)
            self.took.append((time.perf_counter() - began) * 1000)

    def percentiles(self):
        self.over.set()
        self.join(40)
        took = sorted(self.took)
        if len(took) < 5:
            raise Failed(f"only {len(took)} probes finished")
        return {"probes": len(took), "p50_ms": round(statistics.median(took), 1),
                "p99_ms": round(took[len(took) * 99 // 100], 1), "max_ms": round(took[-1], 1)}


class Backlog(threading.Thread):
    """Samples, once a second, the number of posts that are stored but not yet in feeds."""

    def __init__(self, stack, api, processor):
        super().__init__(daemon=True)
        self.stack, self.api, self.processor, self.over = stack, api, processor, threading.Event()
        self.seen, self.first = [], self.count()

    def count(self):
        return (self.stack.metric(self.api, "postrider_feed_posts_stored_total")
                - self.stack.metric(self.processor, "postrider_feed_events_total"))

    def run(self):
        while not self.over.wait(1):
            self.seen.append(self.count() - self.first)

    def growth(self):
        """Returns the backlog at the end, and its growth per second over the second half."""
        self.over.set()
        self.join(10)
        half = self.seen[len(self.seen) // 2:]
        if len(half) < 2:
            return {"behind": round(self.seen[-1]) if self.seen else 0, "grows_per_s": 0.0}
        middle, average = (len(half) - 1) / 2, sum(half) / len(half)
        slope = (sum((at - middle) * (count - average) for at, count in enumerate(half))
                 / sum((at - middle) ** 2 for at in range(len(half))))
        return {"behind": round(half[-1]), "grows_per_s": round(slope, 1), "each_second": [round(count) for count in self.seen]}


class Fleet:
    """Processes of several roles on the stack."""

    def __init__(self, stack, *roles):
        self.stack = stack
        for role in roles:
            setattr(self, role, stack.start_product(role))
        self.roles = roles

    def __getitem__(self, role):
        return getattr(self, role)

    @property
    def pids(self):
        return self.stack.pids | {role: self[role].pid for role in self.roles}

    def drained(self):
        """Returns whether all events have been processed into feeds."""
        idle = sql(self.stack, "SELECT NOT EXISTS (SELECT FROM outbox) AND NOT EXISTS (SELECT FROM feed_jobs)") == "t"
        return idle and self.stack.end_offsets("post-events") == int(sql(
            self.stack, "SELECT coalesce(sum(next), 0) FROM projection_progress WHERE projection = 'feed'"))

    def drain(self, seconds=240):
        began = time.monotonic()
        await_true("an empty backlog of posts", seconds, self.drained, every=0.2)
        return round(time.monotonic() - began, 1)

    def stop(self):
        for role in reversed(self.roles):
            self.stack.stop(self[role])
