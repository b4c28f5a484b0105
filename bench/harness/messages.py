"""Scenario `messages`: cost of idle WebSockets, latency of frames, and saturation. Takes turns with Centrifugo, with
its Kafka consumer and Redis engine. bench/sockets.rs is the load generator."""

import json
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from statistics import median

from .procs import Failed, Meter, await_true, get, memory_mib, say, say_aims
from .stack import REPO, free_port, short

CONNECT_RATE, RATE, WINDOW = 2_000, 2_000, 1_000
PEER_PREFIX = "bench-peer-"
PEER_TOPIC = f"{PEER_PREFIX}message"
AIM_KIB, AIM_REST_PERCENT, AIM_P50_MS, AIM_P99_MS = 15, 5, 6, 20
SETTLE_SECONDS = 4
LATENCIES = ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms")


class Receivers:
    """A load generator with its connections to one server."""

    def __init__(self, stack, name, server, count, first=0, peer=None):
        control = free_port()
        argv = [short(stack.examples / "sockets"), f"127.0.0.1:{control}", server.url.removeprefix("http://"), str(count),
                f"first={first}", *([f"peer={peer}"] if peer else [])]
        self.child = stack.start(name, [str(stack.examples / "sockets"), *argv[1:]])
        self.count, self.shown, self.url = count, shlex.join(argv), f"http://127.0.0.1:{control}"
        await_true("start of the load generator", 10, lambda: get(f"{self.url}/stats")[0] == 200)

    def ask(self, path, seconds=10):
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failed(f"messages: {path}: {error.read().decode()}") from error
        except OSError as error:
            self.child.check()
            raise Failed(f"messages: {path}: {error}; see {self.child.log}") from error

    def connect(self):
        found = self.ask(f"/connect?rate={CONNECT_RATE}", 180)
        say(f"  {found['connected']} of {self.count} connected in {found['seconds']:.1f} s, handshakes p50 "
            f"{found['handshake_p50_ms']} ms, p99 {found['handshake_p99_ms']} ms, {found['refused']} refused "
            f"{found['first_refusal'][:200]}")
        if not found["connected"]:
            raise Failed(f"messages: no receiver could connect: {found['first_refusal']}")
        return found

    def send(self, to, seconds, how):
        return self.ask(f"/send?to={to.url.removeprefix('http://')}&seconds={seconds}&{how}", seconds + 60)


def start_peer(stack, binary):
    """Starts Centrifugo with a realistic configuration: Redis engine, history for reconnects, small buffers."""
    port = free_port()
    config = {
        "address": "127.0.0.1", "port": port, "engine": "redis", "redis_address": stack.env["REDIS_URL"],
        "client_insecure": True, "health": True, "ping_interval": "20s", "websocket_use_write_buffer_pool": True,
        "namespaces": [{"name": "to", "history_size": 100, "history_ttl": "300s", "force_recovery": True}],
        "consumers": [{"name": "messages", "type": "kafka", "kafka": {
            "brokers": [stack.env["KAFKA_BROKERS"]], "topics": [PEER_TOPIC], "consumer_group": "bench-peer"}}],
    }
    path = stack.work / "centrifugo.json"
    path.write_text(json.dumps(config, indent=1), encoding="ascii")
    peer = stack.start("centrifugo", [binary, "-c", str(path)])
    peer.url, peer.config = f"http://127.0.0.1:{port}", config
    await_true("start of Centrifugo", 20, lambda: peer.check() or get(f"{peer.url}/health")[0] == 200)
    return peer


def find_peer():
    """Returns the path of Centrifugo's binary, or the reason why there is none."""
    done = subprocess.run([str(REPO / "bench/centrifugo")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=600, check=False)
    if done.returncode != 0:
        return None, done.stderr.strip().removeprefix("error: ")[-500:]
    return done.stdout.strip(), None


def hold(stack, servers, counts, settings, peer=None):
    """Connects to each server, and measures the cost of idle connections, first on one server and then on all."""
    before, receivers, opened = [], [], []
    for number, (server, count) in enumerate(zip(servers, counts)):
        if number == 0:
            time.sleep(SETTLE_SECONDS)
        before.append(memory_mib(server.pid))
        receivers.append(Receivers(stack, f"receivers-{number}", server, count, sum(counts[:number]), peer))
        opened.append(receivers[-1].connect())
        if number == 0:
            first = rest(stack, servers[:1], receivers[:1], before, settings)
    everyone = rest(stack, servers, receivers, before, settings) if len(servers) > 1 else first
    ended = sum(one.ask("/stats")["ended"] for one in receivers)
    if ended:
        raise Failed(f"messages: {ended} idle connections ended: see {receivers[0].child.log}")
    stack_stop(stack, *(one.child for one in receivers))
    return {"opened": opened, "one": first, "all": everyone, "commands": [one.shown for one in receivers]}


def rest(stack, servers, receivers, before, settings):
    time.sleep(SETTLE_SECONDS)
    names = {f"server-{number}": server.pid for number, server in enumerate(servers)}
    names |= {"redis": stack.pids["redis"], "postgres": stack.pids["postgres"]}
    names |= {f"receivers-{number}": one.child.pid for number, one in enumerate(receivers)}
    meter = Meter(names)
    time.sleep(settings.rest_seconds)
    used = meter.read()
    found = []
    for number, (server, one) in enumerate(zip(servers, receivers)):
        rss = memory_mib(server.pid)
        found.append({
            "connections": one.count, "rss_before_mib": before[number], "rss_mib": rss,
            "kib_per_connection": round((rss - before[number]) * 1024 / one.count, 2),
            "cpu_percent_of_one": round(100 * used[f"server-{number}"] / settings.rest_seconds, 2)})
    say(f"  at rest: {' '.join(str(one['kib_per_connection']) for one in found)} KiB per connection, "
        f"{' '.join(str(one['cpu_percent_of_one']) for one in found)} % of a processor")
    return {"servers": found, "seconds": settings.rest_seconds, "cpu_seconds": used}


def stack_stop(stack, *children):
    for child in children:
        stack.stop(child)


def sent(receivers, api, processes, seconds, how, check):
    """Measures one run of messages."""
    meter = Meter(processes | {"load generator": receivers.child.pid})
    found = receivers.send(api, seconds, how)
    used = meter.read()
    check(found)
    each = {name: round(spent * 1e6 / max(found["delivered"], 1), 1) for name, spent in used.items()}
    say(f"    {how}: {found['rps']:.0f}/s, p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms; posted p50 "
        f"{found['posting_p50_ms']} ms; CPU {each}")
    return found | {"rps": round(found["rps"]), "cpu_seconds": used, "cpu_us_per_message": each}


def strict(found):
    """Fails if a message was lost, duplicated, or delivered to another receiver."""
    for name in ("lost", "twice", "foreign", "errors"):
        if found[name]:
            raise Failed(f"messages: {found[name]} {name} of {found['posted']} {found['first_error'][:300]}")


def delivery(stack, settings, binary):
    """Measures a constant rate and saturation, of the product and the peer in turns."""
    kafka, redis, postgres = (stack.pids[name] for name in ("kafka", "redis", "postgres"))
    api, processor = stack.start_product("api"), stack.start_product("processor")
    ours = {"api": api.pid, "processor": processor.pid, "kafka": kafka, "redis": redis, "postgres": postgres}
    sides = {"postrider": (Receivers(stack, "receivers", api, settings.receivers), ours)}
    children, config = [processor, api], None
    if binary:
        peer = start_peer(stack, binary)
        children, config = [peer, *children], peer.config
        theirs = {"api": api.pid, "centrifugo": peer.pid, "kafka": kafka, "redis": redis}
        sides["centrifugo"] = (Receivers(stack, "receivers-peer", peer, settings.receivers, peer=PEER_TOPIC), theirs)
    found = {name: {"steady": [], "saturated": [], "commands": [side[0].shown]} for name, side in sides.items()}
    for name, (receivers, processes) in sides.items():
        receivers.connect()
        # Warm-up, mostly for the broker's JIT compiler.
        receivers.send(api, settings.warm_up, f"window={WINDOW // 4}")
        receivers.send(api, 2, f"rate={RATE}")
    for _ in range(settings.rounds):
        for name, (receivers, processes) in sides.items():
            say(f"  {name}")
            # Messages that the peer loses do not fail the run; the result has their number.
            check = strict if name == "postrider" else lambda _: None
            for what, how in (("steady", f"rate={RATE}"), ("saturated", f"window={WINDOW}")):
                found[name][what].append(sent(receivers, api, processes, settings.message_seconds, how, check))
    for name, one in found.items():
        one["steady_median"] = {key: round(median(each[key] for each in one["steady"]), 3) for key in LATENCIES}
        one["saturation_rps"] = round(median(each["rps"] for each in one["saturated"]))
    stack_stop(stack, *(side[0].child for side in sides.values()), *children)
    return found, config


def idle(stack, settings, binary):
    counts = settings.idle_connections
    apis = [stack.start_product("api", f"api-{number}") for number in range(len(counts))]
    say(f"messages: {counts[0]:,} idle connections on one process, then {sum(counts):,} on {len(counts)}")
    found = {"postrider": hold(stack, apis, counts, settings)}
    stack_stop(stack, *apis)
    if binary:
        say("messages: the same with Centrifugo, one process")
        peer = start_peer(stack, binary)
        found["centrifugo"] = hold(stack, [peer], counts[:1], settings, peer=PEER_TOPIC)
        stack_stop(stack, peer)
    return found


def make_topics(stack):
    """Lets the product create its topics, and, with a prefix, the peer's, so that both have equally many partitions."""
    for prefix in ("", PEER_PREFIX):
        stack.stop(stack.start_product("api", "api-topics", POSTRIDER_KAFKA__TOPIC_PREFIX=prefix))
    if stack.partitions(PEER_TOPIC) != stack.partitions("message"):
        raise Failed("messages: the topics differ in the number of partitions, which is the peer's concurrency")


def run(stack, settings):
    binary, why_not = find_peer()
    if why_not:
        say(f"messages: without the peer: {why_not}")
    result = {"receivers": settings.receivers, "rate": RATE, "window": WINDOW, "peer_skipped": why_not}
    make_topics(stack)
    if binary:
        try:
            stack_stop(stack, start_peer(stack, binary))
        except Failed as failure:
            binary, result["peer_skipped"] = None, str(failure)
            say(f"messages: without the peer: {failure}")
    result["idle"] = idle(stack, settings, binary)
    result["delivery"], result["peer_config"] = delivery(stack, settings, binary)
    result["aims"] = aims(result)
    say_aims("messages", result["aims"])
    result["check"] = {"passed": True}
    return result


def aims(result):
    ours, theirs = result["idle"]["postrider"], result["idle"].get("centrifugo")
    steady, rps = (result["delivery"]["postrider"][name] for name in ("steady_median", "saturation_rps"))
    rows = []
    for where in ("one", "all"):
        servers = ours[where]["servers"]
        what = f"{sum(one['connections'] for one in servers):,} idle connections on {len(servers)} process{'es' * (len(servers) > 1)}"
        kib, percent = (max(one[name] for one in servers) for name in ("kib_per_connection", "cpu_percent_of_one"))
        rows += [(f"{what}: memory of each", f"{kib} KiB", f"below {AIM_KIB} KiB", kib < AIM_KIB),
                 (f"{what}: CPU of a process at rest", f"{percent}% of a processor", f"below {AIM_REST_PERCENT}%",
                  percent < AIM_REST_PERCENT)]
    slowest, refused = min(one["per_second"] for one in ours["opened"]), sum(one["refused"] for one in ours["opened"])
    rows.append(("connecting", f"{slowest:,.0f}/s, {refused} refused", f"{CONNECT_RATE:,}/s without refusals",
                 refused == 0 and slowest >= 0.97 * CONNECT_RATE))
    for name, aim in (("p50_ms", AIM_P50_MS), ("p99_ms", AIM_P99_MS)):
        rows.append((f"request to frame at {RATE:,}/s to {result['receivers']:,} receivers, {name[:3]}", f"{steady[name]} ms",
                     f"below {aim} ms", steady[name] < aim))
    if theirs:
        kib = [side["one"]["servers"][0]["kib_per_connection"] for side in (ours, theirs)]
        peer = result["delivery"]["centrifugo"]
        rows += [
            ("memory of an idle connection beside Centrifugo's", f"{kib[0]} KiB", f"below {kib[1]} KiB", kib[0] < kib[1]),
            (f"p99 at {RATE:,}/s beside Centrifugo's", f"{steady['p99_ms']} ms", f"below {peer['steady_median']['p99_ms']} ms",
             steady["p99_ms"] < peer["steady_median"]["p99_ms"]),
            ("saturation beside Centrifugo's", f"{rps:,}/s", f"above {peer['saturation_rps']:,}/s", rps > peer["saturation_rps"]),
        ]
    return [dict(zip(("what", "measured", "aim", "reached"), row)) for row in rows]
