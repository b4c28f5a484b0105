"""The stack of the benchmarks, with the product, the bare route and the trace collector on it."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from .procs import Failed, Process, await_true, get, say

REPO = Path(__file__).resolve().parents[2]
TOPIC = "bench"
SAMPLE_RATIO = "0.01"


def shell(argv, seconds, **more):
    """Runs a command that must succeed; returns its output."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=seconds, check=False, **more)
    if done.returncode != 0:
        raise Failed(f"{shlex.join(argv)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def short(path):
    """Returns a path relative to the checkout, in which all commands run."""
    return os.path.relpath(path, REPO)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Stack:
    """A new stack of Kafka, Redis and Postgres by dev/stack, and the processes that run on it."""

    def __init__(self, state, binary, examples, changes=()):
        self.state, self.binary, self.examples = Path(state), binary, examples
        self.changes = [word for change in changes for word in ("--set", change)]
        self.env, self.pids, self.children = {}, {}, []
        self.work = REPO / "target/bench-work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.sink_port = None

    def dev(self, *words, seconds=120):
        return shell([str(REPO / "dev/stack"), *words, "--state", str(self.state)], seconds)

    def up(self):
        say("stack: wiping and starting Kafka, Redis and Postgres")
        if self.state.exists():
            self.dev("wipe")
        self.dev("up")
        for line in self.dev("env").splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            self.env[name] = shlex.split(value)[0] if value else ""
        for name, pid in re.findall(r"^(\S+) +running +\S+ +pid (\d+)", self.dev("status", seconds=20), re.M):
            self.pids[name.replace("kafka-1", "kafka")] = int(pid)
        self.sink_port = free_port()
        sink = self.start("sink", [sys.executable, str(REPO / "bench/otlp_sink.py"), str(self.sink_port)])
        await_true("start of the trace sink", 10, lambda: get(f"http://127.0.0.1:{self.sink_port}/")[0] == 200)
        self.pids["trace sink"] = sink.pid
        shell([self.binary, "migrate"], 60, env=self.product_env("api", 0, 0), cwd=self.work)

    def down(self):
        for child in reversed(self.children):
            child.stop()
        self.children.clear()
        if self.state.exists():
            self.dev("wipe")

    def start(self, name, argv, env=None):
        child = Process(name, argv, self.work / f"{name}.log", env=env, cwd=self.work)
        self.children.append(child)
        return child

    def stop(self, child):
        code = child.stop()
        self.children.remove(child)
        # On SIGTERM, the product exits with 0. The bare route does not handle signals.
        if code not in (0, -15):
            say(f"  {child.name} ended with code {code}")

    def product_settings(self, role):
        """Returns the product's variables, without its ports: every feature is on."""
        return {
            "POSTRIDER_ROLE": role,
            "POSTRIDER_KAFKA__BROKERS": self.env["KAFKA_BROKERS"],
            "POSTRIDER_REDIS__URL": self.env["REDIS_URL"],
            "POSTRIDER_POSTGRES__URL": self.env["DATABASE_URL"],
            "POSTRIDER_GATEWAY__AUTO_CREATE_TOPICS": "true",
            "POSTRIDER_TELEMETRY__LOG_FORMAT": "json",
            "POSTRIDER_TELEMETRY__OTLP__ENDPOINT": f"http://127.0.0.1:{self.sink_port}",
            "POSTRIDER_TELEMETRY__OTLP__PROTOCOL": "http",
            "POSTRIDER_TELEMETRY__OTLP__SAMPLE_RATIO": SAMPLE_RATIO,
        }

    def product_env(self, role, port, management):
        # Variables of the developer's shell must not change the measurement.
        env = {name: value for name, value in os.environ.items() if not name.startswith("POSTRIDER_")}
        ports = {"POSTRIDER_HTTP__LISTEN": f"127.0.0.1:{port}", "POSTRIDER_MANAGEMENT__LISTEN": f"127.0.0.1:{management}"}
        return env | self.product_settings(role) | ports

    def start_product(self, role, name=None, await_ready=True, **settings):
        """Starts a role of the product and waits until it is ready. `settings` are further variables, such as
        POSTRIDER_KV__AUDIT."""
        port, management = free_port(), free_port()
        env = self.product_env(role, port, management) | settings
        child = self.start(name or role, [self.binary, "run", *self.changes], env)
        child.url, child.management = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{management}"
        if await_ready:
            child.ready_seconds = self.await_ready(child)
        return child

    @staticmethod
    def await_ready(child, seconds=60):
        """Waits until the process is ready; returns the seconds from its start to the first 200 of /readyz."""
        def ready():
            child.check()
            return get(f"{child.management}/readyz")[0] == 200
        await_true(f"{child.name} is ready", seconds, ready, every=0.002)
        return time.monotonic() - child.began

    def start_bare(self):
        port = free_port()
        child = self.start("bare", [str(self.examples / "bare"), f"127.0.0.1:{port}"])
        child.url = f"http://127.0.0.1:{port}"
        await_true("start of the bare route", 10, lambda: get(child.url)[0] == 200)
        return child

    def fill(self, topic, records, keys, plain=False, seconds=300):
        """Writes records with bench/fill.rs; returns its command and its output."""
        argv = [short(self.examples / "fill"), self.env["KAFKA_BROKERS"], topic, str(records), str(keys), "100"]
        argv += ["plain"] if plain else []
        return shlex.join(argv), shell(argv, seconds).strip()

    def create_topic(self, topic, setting):
        """Creates a topic of one partition with a setting, by Kafka's own tool."""
        libraries = shell(["bash", "-c", ". dev/lib/common.sh && . dev/lib/kafka.sh && kafka_classpath"], 10, cwd=REPO).strip()
        shell(["java", "-cp", libraries, "org.apache.kafka.tools.TopicCommand", "--bootstrap-server",
               self.env["KAFKA_BROKERS"], "--create", "--topic", topic, "--partitions", "1", "--config", setting], 60)

    def partitions(self, topic):
        listed = json.loads(shell(["kcat", "-L", "-J", "-b", self.env["KAFKA_BROKERS"], "-t", topic], 20))
        return len(listed["topics"][0]["partitions"])

    def end_offsets(self, topic):
        """Returns the number of records that were ever written to a topic, over all partitions."""
        asked = [word for number in range(self.partitions(topic)) for word in ("-t", f"{topic}:{number}:-1")]
        text = shell(["kcat", "-Q", "-b", self.env["KAFKA_BROKERS"], *asked], 20)
        return sum(int(offset) for offset in re.findall(r"offset (-?\d+)", text))

    def metric(self, child, name):
        """Returns the sum of a metric over its labels; 0 if it does not exist yet."""
        _, text = get(f"{child.management}/metrics", 5)
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        return sum(float(value) for value in values)

    def traces(self):
        """Returns the number of exports and of bytes that the collector received."""
        exports, size = get(f"http://127.0.0.1:{self.sink_port}/")[1].split()
        return {"exports": int(exports), "bytes": int(size)}
