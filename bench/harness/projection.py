"""Scenario `projection`: writes a backlog of pushes while no processor runs, and measures how fast a processor projects
it from Kafka to Redis."""

import random
import time
import urllib.parse

from .procs import Failed, Meter, get, memory_mib, say

TOPIC = "messages"
COUNTER = "postrider_kv_projected_records_total"
STRIDE = 7919
CHECKED = 500
# The run fails if the projection is slower.
LEAST_RPS = 10_000


def run(stack, settings):
    records, keys = settings.records, settings.keys
    # The api creates the topic with the product's settings.
    stack.stop(stack.start_product("api", "api-projection"))
    say(f"projection: writing {records} records with {keys} keys")
    command, said = stack.fill(TOPIC, records, keys, settings.plain_records)
    say(f"projection: {said}")
    result = {"records": records, "keys": keys, "headers": not settings.plain_records, "fill": {"command": command, "said": said}}
    redis_before = memory_mib(stack.pids["redis"])
    processor = stack.start_product("processor", await_ready=False)
    meter = Meter({name: pid for name, pid in stack.pids.items() if name != "trace sink"} | {"postrider": processor.pid})
    samples = watch(stack, processor, records)
    result["cpu_seconds"] = meter.read()
    result["cpu_us_per_record"] = {name: round(spent * 1e6 / records, 2) for name, spent in result["cpu_seconds"].items()}
    result |= figures(samples, records)
    result["ready_seconds"] = round(stack.await_ready(processor), 2)
    result["rss_mib"] |= {"peak": memory_mib(processor.pid, "VmHWM")}
    result["redis_rss_mib"] = {"before": redis_before, "after": memory_mib(stack.pids["redis"])}
    stack.stop(processor)
    result["check"] = check(stack, records, keys)
    say(f"projection: {result['rps']}/s, slowest tenth {result['slowest_tenth_rps']}/s, RSS {result['rss_mib']}")
    return result


def watch(stack, processor, records):
    """Samples (seconds since the start, records projected, RSS in MiB) until all records are projected."""
    samples, began = [], time.monotonic()
    until = began + 30 + records / LEAST_RPS
    told = began
    while True:
        processor.check()
        done = int(stack.metric(processor, COUNTER))
        samples.append((time.monotonic() - processor.began, done, memory_mib(processor.pid)))
        if done >= records:
            return samples
        if time.monotonic() > until:
            raise Failed(f"projection: {done} of {records} records within {until - began:.0f} s")
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"projection: {done} of {records} after {told - began:.0f} s")
        time.sleep(0.1)


def figures(samples, records):
    """Computes the rates between the first and the last record, and the memory meanwhile."""
    first = max(index for index, (_, done, _) in enumerate(samples) if done == 0) if samples[0][1] == 0 else 0
    work = samples[first:]

    def reached(share):
        return next(sample for sample in work if sample[1] >= records * share)

    marks = [work[0]] + [reached(tenth / 10) for tenth in range(1, 11)]
    tenths = [round((after[1] - before[1]) / (after[0] - before[0])) for before, after in zip(marks, marks[1:])
              if after[0] > before[0]]
    # The start is at 5 %, when the client has begun to fetch; before that, the process is idle.
    rss = {"start": reached(0.05)[2], "middle": reached(0.5)[2], "end": work[-1][2]}
    seconds = work[-1][0] - work[0][0]
    return {
        "seconds": round(seconds, 2),
        "seconds_from_exec": round(work[-1][0], 2),
        "rps": round((work[-1][1] - work[0][1]) / seconds),
        "tenths_rps": tenths,
        "slowest_tenth_rps": min(tenths),
        "rss_mib": rss,
        "tenths_rss_mib": [sample[2] for sample in marks[1:]],
    }


def check(stack, records, keys):
    """Fails if one of several random keys does not have the value of its newest record."""
    api = stack.start_product("api", "api-projection")
    wrong, chosen = [], random.Random(records)
    for _ in range(CHECKED):
        first = chosen.randrange(min(keys, records))
        key = first * STRIDE % keys
        newest = first + (records - 1 - first) // keys * keys
        status, body = get(f"{api.url}/pull/{urllib.parse.quote(f'key-{key}')}")
        if status != 200 or f'"value":"{newest:010d}' not in body:
            wrong.append(f"key-{key}: expected record {newest}, got {status} {body[:80]}")
    stack.stop(api)
    if wrong:
        raise Failed(f"projection: {len(wrong)} of {CHECKED} keys are wrong: {wrong[0]}")
    say(f"projection: {CHECKED} random keys have their newest value")
    return {"keys_checked": CHECKED, "wrong": 0, "passed": True}
