"""Scenario `flame`: samples postrider's CPU time with perf while /produce saturates it."""

import shlex
import shutil
import threading

from .load import produce_body, wrk
from .procs import Failed, say
from .stack import shell, short

LINES = 45


def run(stack, settings):
    if not shutil.which("perf"):
        say("flame: perf is not installed (Debian: linux-perf): skipped")
        return {"skipped": "perf is not installed"}
    api = stack.start_product("api", "api-flame")
    body = stack.work / "body-flame.json"
    body.write_text(produce_body(settings.payloads[0]), encoding="ascii")
    connections, mode = max(settings.connections), ["post", short(body)]
    url = f"{api.url}/produce"
    wrk(url, mode, settings, connections, stack.work, settings.warm_up)
    data = stack.work / "perf.data"
    argv = ["perf", "record", "-q", "-F", "499", "-p", str(api.pid), "-o", short(data), "--", "sleep", str(settings.seconds)]
    failures = []

    def record():
        try:
            shell(argv, settings.seconds + 30)
        except (Failed, OSError) as error:
            failures.append(error)

    recorder = threading.Thread(target=record)
    recorder.start()
    load = wrk(url, mode, settings, connections, stack.work, settings.seconds + 2)
    recorder.join()
    stack.stop(api)
    if failures:
        say(f"flame: {failures[0]}: skipped")
        return {"skipped": str(failures[0])}
    say(f"flame: sampled at {load['rps']}/s")
    return {
        "command": shlex.join(argv),
        "rps": load["rps"],
        "connections": connections,
        "threads": report(data, "comm"),
        "objects": report(data, "dso"),
        "functions": report(data, "comm,symbol"),
    }


def report(data, sort):
    """Returns the first lines of `perf report`."""
    text = shell(["perf", "report", "-i", str(data), "--stdio", "--no-inline", "--percent-limit", "0.4", "--sort", sort], 180)
    lines = [line[:110].rstrip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[:LINES]
