"""Scenario `isolation`: POST /produce at a constant rate while two other callers send records that Kafka refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from .load import oha, produce_body
from .procs import say, say_aims
from .stack import TOPIC

CONNECTIONS, RATE = 20, 2_000
# The maximum rate of the other two: as many as are stored when their records are good.
OTHERS, OTHERS_RATE = 2, 1_500
COMPACTED, SMALL = "bench-compacted", "bench-small"
# Milliseconds since 1970, in the year 2099. Topics accept timestamps of at most one hour in the future.
FUTURE_MS = 4_102_444_800_000
ALONE, EQUALS = "alone", "the same records"
AIM = 1.5


def others():
    """Returns the bodies that the other two send, by name."""
    return {
        EQUALS: produce_body(1_000),
        "dated in 2099": json.dumps({"topic": TOPIC, "payload": 1, "timestamp": FUTURE_MS}),
        "without the key that a compacted topic needs": json.dumps({"topic": COMPACTED, "payload": 1}),
        "larger than max.message.bytes": produce_body(20_000).replace(f'"{TOPIC}"', f'"{SMALL}"', 1),
    }


def run(stack, settings):
    stack.create_topic(COMPACTED, "cleanup.policy=compact")
    stack.create_topic(SMALL, "max.message.bytes=10000")
    api = stack.start_product("api")
    pids = stack.pids | {"postrider": api.pid}
    good = stack.work / "body-good.json"
    good.write_text(produce_body(1_000), encoding="ascii")
    files = {ALONE: None}
    for number, (name, body) in enumerate(others().items()):
        files[name] = stack.work / f"body-other-{number}.json"
        files[name].write_text(body, encoding="ascii")
    rounds = {name: [] for name in files}
    for number in range(settings.rounds + 1):
        for name, file in files.items():
            found = measure(api, pids, stack, settings, good, file)
            # The first round is the warm-up.
            if number:
                rounds[name].append(found)
                say(f"  {number} of {settings.rounds}: {name}: p99 {found['p99_ms']} ms, errors {found['errors']}, "
                    f"others {found['others_rps']}/s")
    resets = stack.metric(api, 'postrider_kafka_client_epochs_total')
    stack.stop(api)
    result = {"rate": RATE, "connections": CONNECTIONS, "cases": {name: summary(found) for name, found in rounds.items()},
              "epochs": resets}
    alone = result["cases"][ALONE]["p99_ms"]
    for case in result["cases"].values():
        case["ratio"] = round(case["p99_ms"] / max(alone, 0.01), 2)
    result["aims"] = aims(result)
    say_aims("isolation", result["aims"])
    errors = sum(case["errors"] for case in result["cases"].values())
    result["check"] = {"errors": errors, "passed": errors == 0}
    return result


def measure(api, pids, stack, settings, good, other):
    """Measures one run of the good callers, with or without the others."""
    url = f"{api.url}/produce"
    with ThreadPoolExecutor(1) as pool:
        beside = other and pool.submit(oha, url, other, OTHERS_RATE, OTHERS, settings.rate_seconds, pids, stack.work,
                                       name="oha-others")
        found = oha(url, good, RATE, CONNECTIONS, settings.rate_seconds, pids, stack.work)
        others = beside.result() if beside else None
        return found | {"others_rps": round((others["ok"] + others["errors"]) / settings.rate_seconds) if others else 0}


def summary(rounds):
    middle = {name: round(median(one[name] for one in rounds), 2) for name in ("p50_ms", "p99_ms", "p99.9_ms", "others_rps")}
    return middle | {"p99_ms_rounds": [one["p99_ms"] for one in rounds], "errors": sum(one["errors"] for one in rounds),
                     "rounds": rounds}


def aims(result):
    rows = [(f"p99 beside two callers whose records are {name} : alone", f"{case['ratio']}", f"at most {AIM}", case["ratio"] <= AIM)
            for name, case in result["cases"].items() if name not in (ALONE, EQUALS)]
    return [dict(zip(("what", "measured", "aim", "reached"), row)) for row in rows]
