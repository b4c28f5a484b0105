"""Scenario `pull`: GET /pull/{key} of random keys, in turns with the bare route, with the audit off and on."""

from .load import interleave, measured_wrk
from .procs import Failed, await_true, memory_mib, say

KEYS = 10_000


def run(stack, settings):
    bare = stack.start_bare()
    apis = {mode: stack.start_product("api", f"api-audit-{mode}", POSTRIDER_KV__AUDIT=mode) for mode in ("off", "async")}
    fill_view(stack)
    before = stack.end_offsets("audit")
    pids = stack.pids | {"bare": bare.pid} | {f"postrider ({mode})": api.pid for mode, api in apis.items()}
    result = {"keys": KEYS, "cases": []}
    for connections in settings.connections:
        def target(url, connections=connections):
            return lambda: measured_wrk(pids, url, ["pull", str(KEYS)], settings, connections, stack.work)

        targets = {"bare": target(bare.url)} | {f"audit {mode}": target(api.url) for mode, api in apis.items()}
        found = interleave(targets, settings.rounds)
        case = {"name": f"{connections} connections", "connections": connections, **found}
        case["ratio"] = {name: round(found[name]["rps"] / max(found["bare"]["rps"], 1), 4) for name in found}
        result["cases"].append(case)
        for name in found:
            say(f"pull: {connections} connections, {name}: {found[name]['rps']}/s, {case['ratio'][name]:.1%} of bare, "
                f"errors {found[name]['errors']}")
    result["rss_mib"] = {f"postrider (audit {mode})": memory_mib(api.pid) for mode, api in apis.items()}
    dropped = stack.metric(apis["async"], "postrider_kv_audit_dropped_total")
    for child in (*apis.values(), bare):
        stack.stop(child)
    result["check"] = check(stack, result["cases"], before, dropped)
    return result


def fill_view(stack):
    """Fills the view with every key, and stops the processor, so that the scenario measures only reads."""
    stack.fill("messages", KEYS, KEYS)
    processor = stack.start_product("processor", "processor-pull", await_ready=False)
    await_true("a view with all keys", 60,
               lambda: stack.metric(processor, "postrider_kv_projected_records_total") >= KEYS)
    stack.await_ready(processor)
    stack.stop(processor)


def check(stack, cases, before, dropped):
    """Checks that each successful read has an audit event, or was counted as dropped."""
    reads = sum(case["audit async"]["ok"] for case in cases)
    events = stack.end_offsets("audit") - before
    errors = sum(case[name]["errors"] for case in cases for name in case["ratio"])
    say(f"pull: {reads} reads with audit, {events} events, {dropped:.0f} dropped, {errors} errors")
    if events + dropped < reads:
        raise Failed(f"{reads} reads were successful, but the audit has {events} events and dropped {dropped:.0f}")
    return {"audited_reads": reads, "events": events, "dropped": dropped, "errors": errors, "passed": errors == 0}
