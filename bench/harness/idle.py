"""Scenario `idle`: the idle api role. Measures the time from exec to ready, and memory."""

import time
from statistics import median

from .procs import Meter, memory_mib, say

STARTS = 5
SETTLE_SECONDS = 10


def run(stack, _settings):
    # The first start also creates the topics.
    first = stack.start_product("api", "api-first")
    stack.stop(first)
    starts = []
    for number in range(STARTS):
        api = stack.start_product("api", "api-idle")
        starts.append(round(api.ready_seconds, 3))
        if number < STARTS - 1:
            stack.stop(api)
    meter = Meter({"postrider": api.pid})
    time.sleep(SETTLE_SECONDS)
    spent = meter.read()["postrider"]
    result = {
        "first_start_seconds": round(first.ready_seconds, 3),
        "ready_seconds": median(starts),
        "ready_seconds_each": starts,
        "rss_mib": memory_mib(api.pid),
        "cpu_percent_of_one": round(100 * spent / SETTLE_SECONDS, 1),
    }
    stack.stop(api)
    say(f"idle: ready after {result['ready_seconds']} s (first start {result['first_start_seconds']} s), "
        f"RSS {result['rss_mib']} MiB, CPU {result['cpu_percent_of_one']} %")
    return result
