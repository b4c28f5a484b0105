"""Scenario `produce`: POST /produce in turns with the bare route. Measures saturation, single requests and a constant
rate, and checks the records in Kafka at the end."""

from .load import interleave, measured_wrk, oha, one_at_a_time, produce_body, wrk
from .procs import Failed, memory_mib, say
from .stack import TOPIC, short

KEYS = 4096


def write_bodies(stack, sizes):
    files = {}
    for size in sizes:
        for keyed in (False, True):
            files[size, keyed] = stack.work / f"body-{size}{'-keyed' if keyed else ''}.json"
            files[size, keyed].write_text(produce_body(size, keyed), encoding="ascii")
    return files


def cases(settings):
    """Returns the cases as (payload bytes, keyed, connections); only the first payload has keyed cases."""
    plain = [(size, False, count) for size in settings.payloads for count in settings.connections]
    if settings.unkeyed:
        return plain
    return plain + [(settings.payloads[0], True, count) for count in settings.connections]


class Produce:
    """The scenario. It counts all answered requests, to compare them with the topic at the end."""

    def __init__(self, stack, settings):
        self.stack, self.settings, self.answered, self.errors, self.unanswered = stack, settings, 0, 0, 0
        self.files = write_bodies(stack, settings.payloads)

    def count(self, result, in_flight=0):
        self.answered += result["ok"]
        self.errors += result["errors"]
        # wrk ends without waiting for the responses to its last requests.
        self.unanswered += in_flight
        return result

    def run(self):
        stack, settings = self.stack, self.settings
        bare, api = stack.start_bare(), stack.start_product("api")
        pids = stack.pids | {"postrider": api.pid, "bare": bare.pid}
        say(f"produce: warming up for {settings.warm_up} s")
        warm = wrk(f"{api.url}/produce", ["post", short(self.files[settings.payloads[0], False])], settings, 100,
                   stack.work, settings.warm_up)
        self.count(warm, 100)
        result = {"cases": [self.case(bare, api, pids, *case) for case in cases(settings)]}
        result["idle_request"] = self.idle_request(bare, api)
        result["constant_rate"] = [self.constant_rate(api, pids, count, result["cases"]) for count in settings.connections]
        result["rss_mib"] = {"postrider": memory_mib(api.pid), "postrider at its peak": memory_mib(api.pid, "VmHWM")}
        result["rss_mib"] |= {name: memory_mib(stack.pids[name]) for name in ("kafka", "redis")}
        result["body"] = self.files[settings.payloads[0], True].read_text(encoding="ascii")
        stack.stop(api)
        stack.stop(bare)
        result["check"] = self.check()
        result["traces"] = stack.traces()
        return result

    def case(self, bare, api, pids, size, keyed, connections):
        stack, settings = self.stack, self.settings
        name = f"{size} bytes{', keyed' if keyed else ''}, {connections} connections"
        mode = ["keyed", short(self.files[size, keyed]), str(KEYS)] if keyed else ["post", short(self.files[size, keyed])]

        def target(process):
            url = f"{process.url}/produce"
            return lambda: measured_wrk(pids, url, mode, settings, connections, stack.work)

        def produce():
            return self.count(target(api)(), connections)

        found = interleave({"bare": target(bare), "produce": produce}, settings.rounds)
        ratio = found["produce"]["rps"] / max(found["bare"]["rps"], 1)
        say(f"produce: {name}: {found['produce']['rps']}/s, bare {found['bare']['rps']}/s, ratio {ratio:.1%}, "
            f"errors {found['produce']['errors']}")
        return {"name": name, "bytes": size, "keyed": keyed, "connections": connections, "ratio": round(ratio, 4), **found}

    def idle_request(self, bare, api):
        say(f"produce: {self.settings.idle_requests} single requests")
        body = self.files[self.settings.payloads[0], False].read_text(encoding="ascii")
        found = {name: one_at_a_time(f"{process.url}/produce", body, self.settings.idle_requests)
                 for name, process in (("bare", bare), ("produce", api))}
        self.answered += found["produce"]["requests"]
        say(f"produce: a single request takes {found['produce']['p50_ms']} ms (p50), {found['produce']['p99_ms']} ms (p99); "
            f"bare {found['bare']['p50_ms']} ms")
        return found

    def constant_rate(self, api, pids, connections, measured):
        """Measures half of the saturation rate that was measured with the same number of connections."""
        size = self.settings.payloads[0]
        wanted = (size, False, connections)
        same = next(case for case in measured if (case["bytes"], case["keyed"], case["connections"]) == wanted)
        rate = same["produce"]["rps"] // 2
        result = self.count(oha(f"{api.url}/produce", self.files[size, False], rate, connections, self.settings.rate_seconds,
                                pids, self.stack.work))
        say(f"produce: {rate}/s on {connections} connections: p50 {result['p50_ms']} ms, p99 {result['p99_ms']} ms, "
            f"errors {result['errors']}")
        return {"name": f"{size} bytes, {connections} connections", "connections": connections, **result}

    def check(self):
        """Checks that Kafka has every acknowledged record, and no record that was not sent."""
        records = self.stack.end_offsets(TOPIC)
        found = {"answered_2xx": self.answered, "records": records, "unanswered_at_most": self.unanswered,
                 "errors": self.errors, "partitions": self.stack.partitions(TOPIC)}
        say(f"produce: {self.answered} successful responses, {records} records in the topic, {self.errors} errors")
        if records < self.answered:
            raise Failed(f"{self.answered} requests were successful, but the topic has only {records} records")
        found["passed"] = self.errors == 0 and records <= self.answered + self.unanswered
        return found
