"""Scenario `relay`: `postrider relay` to a local target, bench/target.rs. Measures throughput, the rate limit, latency,
the effect of a key that hangs, and the gaps when a member joins and leaves."""

import json
import shlex
import time
import urllib.request
from statistics import median

from .procs import Failed, Meter, await_true, get, memory_mib, say, say_aims
from .stack import free_port, short

KEYS, PARTITIONS, WORKERS = 10_000, 3, 64
# The Go program that the relay replaces, on the same kind of machine.
BEFORE = {"at once": 14_500, "10 ms": 300}
AIM_AT_ONCE, AIM_SLOW, AIM_P99_MS, AIM_HANG, AIM_GAP_MS, AIM_RATE = 25_000, 20_000, 50, 1.2, 1_000, 0.02
LIMITED_RPS = 1_000
# Below a third of the maximum, so that the latency shows the effect of the hanging key and not of the load.
HANG_RPS, HANG_KEYS = 3_000, 3_000
MOVE_RPS, MOVE_PARTITIONS = 3_000, 6


class Bench:
    """Starts targets, relays and writers. The relays of each target share a new consumer group."""

    def __init__(self, stack):
        self.stack, self.number = stack, 0

    def start_target(self, *options):
        port = free_port()
        argv = [short(self.stack.examples / "target"), f"127.0.0.1:{port}", *options]
        target = self.stack.start("target", [str(self.stack.examples / "target"), *argv[1:]])
        target.shown, target.url = shlex.join(argv), f"http://127.0.0.1:{port}"
        await_true("start of the target", 10, lambda: get(f"{target.url}/stats")[0] == 200)
        self.number += 1
        return target

    def start_relay(self, target, topic, workers, rate, *flags, member="a"):
        stack, management = self.stack, free_port()
        argv = ["relay", "--broker", stack.env["KAFKA_BROKERS"], "--topic", topic, "--target-url", f"{target.url}/{member}",
                "--group", f"bench-{topic}-{self.number}", "--workers", str(workers), "--rate", str(rate),
                "--management", f"127.0.0.1:{management}", *flags]
        env = {name: value for name, value in stack.product_env("relay", 0, management).items()
               if name not in ("POSTRIDER_MANAGEMENT__LISTEN", "POSTRIDER_KAFKA__BROKERS")}
        relay = stack.start(f"relay-{member}", [stack.binary, *argv], env)
        relay.shown, relay.management = shlex.join(["postrider", *argv]), f"http://127.0.0.1:{management}"
        return relay

    def start_writer(self, topic, records, keys, rate):
        argv = [short(self.stack.examples / "fill"), self.stack.env["KAFKA_BROKERS"], topic, str(records), str(keys), "100",
                "plain", f"rate={rate}"]
        writer = self.stack.start("writer", [str(self.stack.examples / "fill"), *argv[1:]])
        writer.shown = shlex.join(argv)
        return writer

    def make_topic(self, topic, records, keys, partitions, rate):
        """Creates a topic with records. They have a rate, because only then do the values contain the due time. A high
        rate makes a backlog."""
        argv = [short(self.stack.examples / "fill"), self.stack.env["KAFKA_BROKERS"], topic, str(records), str(keys), "100",
                "plain", f"rate={rate}", f"partitions={partitions}"]
        writer = self.stack.start("writer", [str(self.stack.examples / "fill"), *argv[1:]])
        await_end(writer, 120)
        self.stack.children.remove(writer)
        return shlex.join(argv)

    def meter(self, **processes):
        return Meter({"kafka": self.stack.pids["kafka"]} | {name: process.pid for name, process in processes.items()})

    def stop(self, *children):
        for child in children:
            self.stack.stop(child)


def await_end(child, seconds):
    if child.child.wait(seconds) != 0:
        child.check()
        raise Failed(f"{child.name} failed: see {child.log}")


def stats(target):
    status, text = get(f"{target.url}/stats", 5)
    if status != 200:
        raise Failed("the target does not respond")
    return json.loads(text)


def reset(target):
    urllib.request.urlopen(urllib.request.Request(f"{target.url}/!reset", b"", method="POST"), timeout=5).close()


def await_fresh(target, relay, records, seconds):
    """Waits until so many different records have arrived, each after the earlier records of its key."""
    def come():
        relay.check()
        found = stats(target)
        return found if found["fresh"] >= records else None
    return await_true(f"{records} records at the target", seconds, come, every=0.1)


def per_delivery(used, deliveries):
    return {name: round(seconds * 1e6 / max(deliveries, 1), 1) for name, seconds in used.items()}


def strict(found):
    """Fails if a record arrived twice, out of order, or while another record of its key was unanswered."""
    for name in ("again", "overlapping"):
        if found[name]:
            raise Failed(f"relay: {found[name]} records arrived {name}")


def backlog(bench, topic, records, workers, *options):
    """Measures the delivery of a topic's first records, by a new group without a rate limit."""
    target = bench.start_target(*options)
    relay = bench.start_relay(target, topic, workers, 0)
    await_fresh(target, relay, 1, 30)
    meter, begun = bench.meter(postrider=relay, target=target), stats(target)["count"]
    found = await_fresh(target, relay, records, 120)
    used = meter.read()
    strict(found)
    rss = memory_mib(relay.pid)
    bench.stop(relay, target)
    rps = round((found["count"] - 1) * 1e6 / (found["last_us"] - found["first_us"]))
    say(f"  {workers} workers{''.join(', ' + option for option in options)}: {rps}/s, "
        f"responses took {found['answer_ms']:.2f} ms, "
        f"CPU {per_delivery(used, records - begun)}")
    return {"rps": rps, "records": found["count"], "answer_ms": round(found["answer_ms"], 3), "rss_mib": rss,
            "cpu_seconds": used, "cpu_us_per_delivery": per_delivery(used, found["count"] - begun),
            "commands": [target.shown, relay.shown]}


def limited(bench, topic, seconds):
    target = bench.start_target()
    relay = bench.start_relay(target, topic, WORKERS, LIMITED_RPS)
    await_fresh(target, relay, LIMITED_RPS, 30)
    meter, before = bench.meter(postrider=relay, target=target), stats(target)
    time.sleep(seconds)
    after, used = stats(target), meter.read()
    bench.stop(relay, target)
    strict(after)
    count = after["count"] - before["count"]
    rps = round(count * 1e6 / (after["now_us"] - before["now_us"]), 1)
    say(f"  --rate {LIMITED_RPS}: {rps}/s over {seconds} s")
    return {"wanted_rps": LIMITED_RPS, "rps": rps, "seconds": seconds, "off": round(abs(rps / LIMITED_RPS - 1), 4),
            "cpu_seconds": used, "cpu_us_per_delivery": per_delivery(used, count), "commands": [target.shown, relay.shown]}


def steady(bench, topic, rate, seconds, keys=KEYS, hang=None):
    """Measures the latency at a constant rate, from a record's due time to its arrival, without the first seconds."""
    lead = 3
    target = bench.start_target(*([f"hang={hang}"] if hang else []))
    records = rate * (seconds + lead)
    bench.make_topic(topic, 1, keys, PARTITIONS, 1000)
    relay = bench.start_relay(target, topic, WORKERS, 0)
    bench.stack.await_ready(relay)
    await_true("the first record at the target", 30, lambda: stats(target)["fresh"] + stats(target)["hung"])
    writer = bench.start_writer(topic, records, keys, rate)
    time.sleep(lead)
    reset(target)
    meter = bench.meter(postrider=relay, target=target, writer=writer)
    time.sleep(seconds - 0.5)
    used, found = meter.read(), stats(target)
    await_end(writer, 30)
    bench.stack.children.remove(writer)
    # Each run of `keys` records has one record of the key that hangs.
    hanging = -(-records // keys) if hang else -1
    after = await_fresh(target, relay, records - hanging, 30)
    strict(after)
    bench.stop(relay, target)
    latency = {name: round(found[name], 2) for name in ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms")}
    rps = round(found["count"] * 1e6 / (found["last_us"] - found["first_us"]))
    say(f"  {rate}/s{', one key hangs' if hang else ''}: {rps}/s arrived, p50 {latency['p50_ms']} ms, p99 {latency['p99_ms']} ms")
    return {"wanted_rps": rate, "rps": rps, "seconds": seconds, **latency, "cpu_seconds": used,
            "cpu_us_per_delivery": per_delivery(used, found["count"]), "commands": [target.shown, relay.shown, writer.shown]}


def hanging(bench, settings):
    """Measures the same rate with and without a key whose requests are never answered, in turns."""
    found = {"without": [], "with": []}
    for number in range(settings.rounds):
        for name, hang in (("without", None), ("with", "key-0")):
            found[name].append(steady(bench, f"relay-hang-{number}-{name}", HANG_RPS, settings.hang_seconds, HANG_KEYS, hang))
    result = {name: {"p99_ms": median(one["p99_ms"] for one in rounds), "rounds": rounds} for name, rounds in found.items()}
    result["ratio"] = round(result["with"]["p99_ms"] / result["without"]["p99_ms"], 3)
    return result


def moving(bench, seconds):
    """Lets a second member join and leave under load, and measures the longest gap of each partition."""
    topic, records = "relay-move", MOVE_RPS * seconds * 3
    bench.make_topic(topic, 100, KEYS, MOVE_PARTITIONS, 1000)
    target = bench.start_target()
    first = bench.start_relay(target, topic, WORKERS, 0, member="a")
    await_fresh(target, first, 100, 30)
    writer = bench.start_writer(topic, records, KEYS, MOVE_RPS)
    time.sleep(seconds)
    reset(target)
    meter = bench.meter(postrider=first, target=target, writer=writer)
    second = bench.start_relay(target, topic, WORKERS, 0, member="b")
    await_true("the second member's first delivery", 30, lambda: delivered_by(stats(target), "b"))
    time.sleep(seconds / 2)
    bench.stop(second)
    used = meter.read()
    time.sleep(seconds / 2)
    found = stats(target)
    await_end(writer, 60)
    bench.stack.children.remove(writer)
    after = await_fresh(target, first, records + 100, 30)
    bench.stop(first, target)
    stayed = {one["partition"]: one["longest_gap_ms_until_now"] for one in found["partitions"] if "b" not in one["by_member"]}
    moved = {one["partition"]: one["longest_gap_ms_until_now"] for one in found["partitions"] if "b" in one["by_member"]}
    if not stayed or not moved:
        raise Failed(f"relay: partitions stayed {list(stayed)}, moved {list(moved)}: nothing was measured")
    say(f"  two members: gaps of partitions that stayed {stayed} ms, that moved {moved} ms, "
        f"{after['again']} records arrived again")
    return {"wanted_rps": MOVE_RPS, "stayed_gap_ms": stayed, "moved_gap_ms": moved, "again": after["again"],
            "cpu_seconds": used, "commands": [target.shown, first.shown, second.shown, writer.shown]}


def delivered_by(found, member):
    return sum(one["by_member"].get(member, 0) for one in found["partitions"])


def throughput(bench, settings):
    """Measures a backlog with a fast and a slow target in turns, and with a rate limit."""
    topic, records, at_once, slow = "relay-backlog", settings.relay_records, [], []
    say(f"relay: writing {records} records with {KEYS} keys")
    fill = bench.make_topic(topic, records, KEYS, PARTITIONS, 1_000_000)
    for _ in range(settings.rounds):
        at_once.append(backlog(bench, topic, records, WORKERS))
        slow.append(backlog(bench, topic, records // 3, 256, "delay_us=10000"))
    return {"fill": fill, "limited": limited(bench, topic, settings.relay_seconds),
            "at_once": {"workers": WORKERS, "rps": round(median(one["rps"] for one in at_once)), "rounds": at_once},
            "slow": {"workers": 256, "rps": round(median(one["rps"] for one in slow)), "rounds": slow}}


def lateness(bench, settings, saturation):
    return {"steady": steady(bench, "relay-steady", saturation // 2, settings.relay_seconds), "hanging": hanging(bench, settings)}


def run(stack, settings):
    bench = Bench(stack)
    result = {"records": settings.relay_records, "keys": KEYS, "partitions": PARTITIONS} | throughput(bench, settings)
    result |= lateness(bench, settings, result["at_once"]["rps"])
    result["moving"] = moving(bench, settings.relay_seconds)
    result["aims"] = aims(result)
    say_aims("relay", result["aims"])
    result["check"] = {"passed": True}
    return result


def aims(result):
    at_once, slow, limit, gap = (result["at_once"], result["slow"], result["limited"],
                                 max(result["moving"]["stayed_gap_ms"].values()))
    rows = [
        (f"deliveries to a target that responds at once, {at_once['workers']} workers", f"{at_once['rps']:,}/s",
         f"at least {AIM_AT_ONCE:,}/s (Go program: {BEFORE['at once']:,}/s)", at_once["rps"] >= AIM_AT_ONCE),
        (f"deliveries to a target that takes 10 ms, {slow['workers']} workers", f"{slow['rps']:,}/s",
         f"at least {AIM_SLOW:,}/s (Go program: {BEFORE['10 ms']:,}/s)", slow["rps"] >= AIM_SLOW),
        (f"--rate {LIMITED_RPS}", f"{limit['rps']:,}/s, {limit['off']:.2%} off", f"within {AIM_RATE:.0%}",
         limit["off"] <= AIM_RATE),
        (f"from due to delivered at {result['steady']['wanted_rps']:,}/s, half of saturation",
         f"p99 {result['steady']['p99_ms']} ms", f"below {AIM_P99_MS} ms", result["steady"]["p99_ms"] < AIM_P99_MS),
        ("p99 of other keys: with a key that hangs / without", f"{result['hanging']['ratio']}", f"below {AIM_HANG}",
         result["hanging"]["ratio"] < AIM_HANG),
        ("longest gap of partitions that stay while a member joins and leaves", f"{gap:.0f} ms",
         f"below {AIM_GAP_MS} ms", gap < AIM_GAP_MS),
    ]
    return [dict(zip(("what", "measured", "aim", "reached"), row)) for row in rows]
