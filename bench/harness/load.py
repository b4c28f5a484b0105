"""Load: wrk for saturation, oha for a constant rate, and single requests on one connection."""

import http.client
import json
import random
import re
import shlex
import string
import time
import urllib.parse
from statistics import median

from .procs import Failed, Meter, run_measured, say
from .stack import TOPIC, short

SCRIPT = "bench/load.lua"


def payload(size):
    """Returns a JSON object of exactly `size` bytes. Its text hardly compresses and is the same in every run."""
    head, tail = '{"user":"u-10293","event":"page_view","text":"', '"}'
    letters = random.Random(size).choices(string.ascii_letters + string.digits, k=size - len(head) - len(tail))
    return head + "".join(letters) + tail


def produce_body(size, keyed=False):
    key = '"key":"@KEY@",' if keyed else ""
    return f'{{"topic":"{TOPIC}",{key}"payload":{payload(size)}}}'


def wrk(url, mode, settings, connections, work, seconds=None):
    """Runs wrk once with bench/load.lua. `mode` has the arguments after `--`."""
    seconds = seconds or settings.seconds
    argv = ["wrk", f"-t{settings.wrk_threads}", f"-c{connections}", f"-d{seconds}s", "-s", SCRIPT, url, "--", *mode]
    text, cpu = run_measured(argv, work / "wrk.out", seconds + 20)
    found = re.search(r"^RESULT (.*)$", text, re.M)
    if not found:
        raise Failed(f"wrk printed no result:\n{text}")
    raw = json.loads(found[1])
    errors = sum(raw[name] for name in ("bad_status", "connect", "read", "write", "timeout"))
    return {
        "command": shlex.join(argv),
        "requests": raw["requests"],
        "errors": errors,
        "ok": raw["requests"] - raw["bad_status"],
        "rps": round(raw["requests"] * 1e6 / raw["microseconds"]),
        "p50_ms": round(raw["p50_us"] / 1000, 2),
        "p99_ms": round(raw["p99_us"] / 1000, 2),
        "wrk_cpu": cpu,
    }


def measured_wrk(pids, *arguments, **more):
    """Runs wrk, and measures the CPU seconds that each process uses meanwhile."""
    meter = Meter(pids)
    result = wrk(*arguments, **more)
    result["cpu"] = meter.read({"wrk": result.pop("wrk_cpu")})
    return result


def summary(rounds):
    """Returns medians over the rounds, and CPU microseconds per request by process over all rounds."""
    requests = sum(result["requests"] for result in rounds)
    spent = {}
    for result in rounds:
        for name, seconds in result["cpu"].items():
            spent[name] = spent.get(name, 0) + seconds
    return {
        "command": rounds[0]["command"],
        "rps": round(median(result["rps"] for result in rounds)),
        "rps_rounds": [result["rps"] for result in rounds],
        "p50_ms": round(median(result["p50_ms"] for result in rounds), 2),
        "p99_ms": round(median(result["p99_ms"] for result in rounds), 2),
        "requests": requests,
        "ok": sum(result["ok"] for result in rounds),
        "errors": sum(result["errors"] for result in rounds),
        "cpu_seconds": {name: round(seconds, 2) for name, seconds in spent.items()},
        "cpu_us_per_request": {name: round(seconds * 1e6 / max(requests, 1), 1) for name, seconds in spent.items()},
    }


def interleave(targets, rounds):
    """Runs each target once per round, in turn, and the first once more at the end, to show drift.

    `targets` maps names to functions that measure once. Returns a summary for each name."""
    names = list(targets)
    order = names * rounds + names[:1]
    results = {name: [] for name in names}
    for number, name in enumerate(order, 1):
        results[name].append(targets[name]())
        say(f"  {number} of {len(order)}: {name} {results[name][-1]['rps']}/s")
    return {name: summary(found) for name, found in results.items()}


def oha(url, body_file, rate, connections, seconds, pids, work, each_line=False, name="oha"):
    """Runs oha at a constant rate. Latencies count from the time at which a request was due. With `each_line`, each
    body is a random line of the file. Without `body_file`, `url` is a file, and each request goes to a random line of
    it. Two runs at the same time need different names."""
    argv = ["oha", "--no-tui", "--output-format", "json", "--latency-correction", "-z", f"{seconds}s", "-q", str(rate),
            "-c", str(connections), "-w"]
    if body_file:
        argv += ["-m", "POST", "-T", "application/json", "-Z" if each_line else "-D", short(body_file), url]
    else:
        argv += ["--urls-from-file", short(url)]
    meter = Meter(pids)
    text, cpu = run_measured(argv, work / f"{name}.out", seconds + 30)
    used = meter.read({"oha": cpu})
    raw = json.loads(text)
    statuses, latency = raw["statusCodeDistribution"], raw["latencyPercentiles"]
    good = sum(count for status, count in statuses.items() if status.startswith("2"))
    answered = sum(statuses.values())
    return {
        "command": shlex.join(argv),
        "wanted_rps": rate,
        "rps": round(good / raw["summary"]["total"]),
        "ok": good,
        "errors": answered - good + sum(raw["errorDistribution"].values()),
        "error_kinds": raw["errorDistribution"],
        **{f"{name}_ms": round(latency[name] * 1000, 2) for name in ("p50", "p90", "p99", "p99.9")},
        "cpu_seconds": used,
        "cpu_us_per_request": {name: round(spent * 1e6 / max(answered, 1), 1) for name, spent in used.items()},
    }


def one_at_a_time(url, body, count, pause=0.02):
    """Measures the latency, in milliseconds, of single requests on one connection that is idle in between."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    headers = {"content-type": "application/json"}
    took = []
    for number in range(count + 20):
        time.sleep(pause)
        began = time.perf_counter()
        connection.request("POST", address.path, body, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status // 100 != 2:
            raise Failed(f"POST {url}: status {answer.status}")
        # The first requests open the connection and look up the topic.
        if number >= 20:
            took.append((time.perf_counter() - began) * 1000)
    connection.close()
    took.sort()
    return {"count": count, "p50_ms": round(took[count // 2], 2), "p99_ms": round(took[count * 99 // 100], 2),
            "max_ms": round(took[-1], 2), "requests": count + 20}
