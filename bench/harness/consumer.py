"""Scenario `consumer`: the consumer runtime (bench/consumer.rs), in turns with a bare loop of the client library."""

import json
import shlex

from .load import summary
from .procs import Failed, Meter, run_measured, say, say_aims
from .stack import short

TOPIC, KEYS = "bench-consumer", 10_000
HANDLER_MS, CONCURRENCY = 10, 256
# Targets of the shapes: their share of the bare loop, and for `sleep` the share of what its handlers allow.
AIMS = {"batch": 0.8, "keyed": 0.4, "sleep": 0.9}
# bench/consumer.rs samples the group's commits every LOOK_MS.
LOOK_MS, COMMIT_INTERVAL_MS = 250, 1_000


def run(stack, settings):
    records = settings.consumer_records
    say(f"consumer: writing {records} records with {KEYS} keys")
    command, said = stack.fill(TOPIC, records, KEYS, plain=True)
    say(f"consumer: {said}")
    result = {"records": records, "keys": KEYS, "partitions": stack.partitions(TOPIC), "fill": {"command": command, "said": said}}
    targets = {what: (lambda what=what: once(stack, what, records)) for what in ("bare", "batch", "keyed")}
    found = in_turn(targets, settings.rounds)
    # Enough records for about eight seconds.
    wanted = min(records, 8 * CONCURRENCY * 1000 // (HANDLER_MS + 1))
    found["sleep"] = summarize([once(stack, "sleep", wanted, HANDLER_MS, CONCURRENCY)])
    result["shapes"] = found
    result["ratio"] = {what: round(found[what]["rps"] / found["bare"]["rps"], 4) for what in ("batch", "keyed")}
    result["ratio"]["sleep"] = round(found["sleep"]["rps"] / found["sleep"]["rounds"][0]["allowed_rps"], 4)
    result["aims"] = aims(result)
    say_aims("consumer", result["aims"])
    result["check"] = check(found, records)
    return result


def in_turn(targets, rounds):
    """Runs each shape once per round. The bare loop runs first, and once more at the end, to show drift."""
    names = list(targets)
    order, results = names * rounds + names[:1], {name: [] for name in names}
    for number, name in enumerate(order, 1):
        results[name].append(targets[name]())
        say(f"  {number} of {len(order)}: {name} {results[name][-1]['rps']}/s")
    return {name: summarize(found) for name, found in results.items()}


def once(stack, what, records, *more):
    argv = [short(stack.examples / "consumer"), stack.env["KAFKA_BROKERS"], TOPIC, str(records), what, *map(str, more)]
    meter = Meter({"kafka": stack.pids["kafka"]})
    text, cpu = run_measured(argv, stack.work / f"consumer-{what}.out", 120)
    used = meter.read({what: cpu})
    try:
        raw = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise Failed(f"{shlex.join(argv)} printed no result:\n{text[-2000:]}") from error
    latency = {"p50_ms": 0, "p99_ms": 0, "errors": 0, "requests": raw["records"], "ok": raw["records"]}
    return {"command": shlex.join(argv), **latency, **raw, "rps": round(raw["rps"]), "cpu": used}


def summarize(rounds):
    """Summarizes rounds as for requests, without latencies, and with the longest lag of the commits."""
    found = summary(rounds)
    for name in ("p50_ms", "p99_ms", "errors", "ok"):
        del found[name]
    found["cpu_us_per_record"] = found.pop("cpu_us_per_request")
    found["commit_lag_ms"] = max((one["commit_lag_ms"] for one in rounds if "commit_lag_ms" in one), default=None)
    found["rounds"] = [{name: value for name, value in one.items() if name != "command"} for one in rounds]
    return found


def aims(result):
    found, ratio = result["shapes"], result["ratio"]
    rows = [{"what": f"{what} : bare loop", "measured": f"{ratio[what]:.1%}", "aim": f"at least {AIMS[what]:.0%}",
             "reached": ratio[what] >= AIMS[what]} for what in ("batch", "keyed")]
    rows.append({"what": f"keyed, handlers of {HANDLER_MS} ms, {CONCURRENCY} at a time, {KEYS:,} keys: "
                         "share of what concurrency and handlers allow",
                 "measured": f"{ratio['sleep']:.1%}", "aim": f"at least {AIMS['sleep']:.0%}",
                 "reached": ratio["sleep"] >= AIMS["sleep"]})
    for what in ("batch", "keyed", "sleep"):
        slowest = found[what]["rounds"][0].get("slowest_ms", 0)
        allowed = COMMIT_INTERVAL_MS + LOOK_MS + slowest
        rows.append({"what": f"lag of the commits, {what}", "measured": f"{found[what]['commit_lag_ms']} ms",
                     "aim": f"at most {allowed:.0f} ms: the commit interval of {COMMIT_INTERVAL_MS} ms, {LOOK_MS} ms between "
                            f"two samples, and the slowest record ({slowest:.0f} ms)",
                     "reached": found[what]["commit_lag_ms"] <= allowed})
    return rows


def check(found, records):
    """Fails if a run ended before it had all records."""
    short_of = [name for name in ("bare", "batch", "keyed") for one in found[name]["rounds"] if one["records"] < records]
    if short_of:
        raise Failed(f"consumer: {short_of[0]} ended before it had {records} records")
    return {"passed": True}
