"""Writes a result as Markdown and JSON, and updates the newest results in bench/README.md."""

import json

from . import report_aims, report_feed, report_messages
from .markdown import code, number, rounds, spent, table

# Above this share of the processors for other processes, the report marks the machine as not quiet.
NOISY = 0.05
BEGIN, END = "<!-- newest results: written by bench/run -->", "<!-- end of newest results -->"


def disturbance(result):
    """Yields the share of the processors that other processes took, for each measurement."""
    if isinstance(result, dict):
        if "cpu_seconds" in result:
            spent_by = result["cpu_seconds"]
            # The time of interrupts is included in the time of the processes.
            whole = sum(seconds for name, seconds in spent_by.items() if name != "interrupts")
            yield spent_by["others"] / max(whole, 0.01)
        for value in result.values():
            yield from disturbance(value)
    elif isinstance(result, list):
        for value in result:
            yield from disturbance(value)


def quiet(result):
    """Returns a sentence on whether other processes disturbed the measurements."""
    shares = sorted(disturbance(result["scenarios"]))
    if not shares:
        return ""
    middle, worst = shares[len(shares) // 2], shares[-1]
    word = "The machine was quiet" if middle < NOISY else "**The machine was NOT quiet**"
    return (f"{word}: processes that are not part of the measurement took {middle:.1%} of the processors in the median "
            f"measurement, {worst:.1%} in the worst.")


def load_rows(case, names):
    return [(case["name"], name, number(case[name]["rps"]), rounds(case[name]), case[name]["p50_ms"], case[name]["p99_ms"],
             case[name]["errors"]) for name in names]


LOAD_HEAD = ("case", "target", "requests/s (median)", "each round", "p50 ms", "p99 ms", "errors")
CPU_HEAD = ("case", "target", "CPU µs per request by process", "CPU seconds by process")


def cpu_rows(case, names):
    return [(case["name"], name, spent(case[name]["cpu_us_per_request"]), spent(case[name]["cpu_seconds"])) for name in names]


def bare(found):
    parts = ["## The bare route", table(LOAD_HEAD, [row for case in found["cases"] for row in load_rows(case, ["bare"])]),
             table(CPU_HEAD, [row for case in found["cases"] for row in cpu_rows(case, ["bare"])]),
             code(*(case["bare"]["command"] for case in found["cases"]))]
    return "\n\n".join(parts)


def produce(found):
    names, cases, check = ["bare", "produce"], found["cases"], found["check"]
    ratios = table(("case", "produce/s", "bare/s", "produce : bare"),
                   [(case["name"], number(case["produce"]["rps"]), number(case["bare"]["rps"]), f"{case['ratio']:.1%}")
                    for case in cases])
    idle = table(("one request at a time", "p50 ms", "p99 ms", "max ms", "requests"),
                 [(name, one["p50_ms"], one["p99_ms"], one["max_ms"], one["count"])
                  for name, one in found["idle_request"].items()])
    rate = table(("constant rate", "wanted/s", "reached/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "errors",
                  "CPU µs per request"),
                 [(one["name"], number(one["wanted_rps"]), number(one["rps"]), one["p50_ms"], one["p90_ms"], one["p99_ms"],
                   one["p99.9_ms"], one["errors"], spent(one["cpu_us_per_request"])) for one in found["constant_rate"]])
    verdict = "passed" if check["passed"] else "FAILED"
    checked = (f"Check {verdict}: {number(check['answered_2xx'])} successful responses, "
               f"{number(check['records'])} records in the topic ({check['partitions']} partitions), {check['errors']} errors, "
               f"at most {check['unanswered_at_most']} requests left unanswered by wrk. Traces on: the collector received "
               f"{found['traces']['exports']} exports. RSS in MiB: {spent(found['rss_mib'])}.")
    body = "The body of keyed requests, where `@KEY@` is one of 4,096 keys; the others have the same without the key:"
    commands = code(*(case[name]["command"] for case in cases for name in names),
                    *(one["command"] for one in found["constant_rate"]))
    return "\n\n".join([
        "## POST /produce", ratios, table(LOAD_HEAD, [row for case in cases for row in load_rows(case, names)]),
        table(CPU_HEAD, [row for case in cases for row in cpu_rows(case, names)]), idle, rate, checked,
        body, code(found["body"]), commands])


def pull(found):
    cases, check = found["cases"], found["check"]
    names = list(cases[0]["ratio"])
    ratios = table(("case", *(f"{name}/s" for name in names), *(f"{name} : bare" for name in names[1:])),
                   [(case["name"], *(number(case[name]["rps"]) for name in names),
                     *(f"{case['ratio'][name]:.1%}" for name in names[1:])) for case in cases])
    verdict = "passed" if check["passed"] else "FAILED"
    checked = (f"Check {verdict}: {number(check['audited_reads'])} reads with audit, {number(check['events'])} events in the "
               f"topic, {check['dropped']:.0f} dropped and counted, {check['errors']} errors. RSS in MiB: {spent(found['rss_mib'])}.")
    return "\n\n".join([
        f"## GET /pull/{{key}}, {number(found['keys'])} keys", ratios,
        table(LOAD_HEAD, [row for case in cases for row in load_rows(case, names)]),
        table(CPU_HEAD, [row for case in cases for row in cpu_rows(case, names)]), checked,
        code(*(case[name]["command"] for case in cases for name in names))])


def projection(found):
    rss = found["rss_mib"]
    rows = [
        ("records, keys", f"{number(found['records'])}, {number(found['keys'])}"),
        ("record", "100-byte values, " + ("the headers of a push" if found["headers"] else "no headers")),
        ("records/s from first to last", number(found["rps"])),
        ("each tenth of the backlog", " ".join(number(rps) for rps in found["tenths_rps"])),
        ("seconds from first to last record", found["seconds"]),
        ("seconds from exec to the last record; from exec until ready with a complete view",
         f"{found['seconds_from_exec']}; {found['ready_seconds']}"),
        ("RSS of the processor, MiB", f"start {rss['start']}, middle {rss['middle']}, end {rss['end']}, peak {rss['peak']}"),
        ("RSS of the processor after each tenth", " ".join(str(rss) for rss in found["tenths_rss_mib"])),
        ("RSS of Redis, MiB", f"before {found['redis_rss_mib']['before']}, after {found['redis_rss_mib']['after']}"),
        ("CPU seconds by process", spent(found["cpu_seconds"])),
        ("CPU µs per record by process", spent(found["cpu_us_per_record"])),
        ("check", f"{found['check']['keys_checked']} random keys have the value of their newest record"),
    ]
    return "\n\n".join(["## Projection Kafka → Redis", table(("what", "measured"), rows), code(found["fill"]["command"])])


def idle(found):
    rows = [("exec to ready, s (median)", found["ready_seconds"]),
            ("each start", " ".join(str(seconds) for seconds in found["ready_seconds_each"])),
            ("first start, which creates the topics, s", found["first_start_seconds"]),
            ("RSS 10 s after ready, MiB", found["rss_mib"]), ("CPU, % of one processor", found["cpu_percent_of_one"])]
    return "\n\n".join(["## Idle api role", table(("what", "measured"), rows)])


def flame(found):
    if "skipped" in found:
        return f"## CPU time by thread, object and function\n\nSkipped: {found['skipped']}"
    return "\n\n".join([
        f"## CPU time at {number(found['rps'])}/s on {found['connections']} connections",
        "By thread:", code(*found["threads"]), "By object:", code(*found["objects"]),
        "By thread and function:", code(*found["functions"]), code(found["command"])])


SECTIONS = {"bare": bare, "feed": report_feed.feed, "feed-growth": report_feed.growth, "produce": produce, "isolation": report_aims.isolation, "pull": pull, "projection": projection,
            "consumer": report_aims.consumer,
            "relay": report_aims.relay, "messages": report_messages.messages, "idle": idle, "flame": flame}


def markdown(result):
    machine, git = result["machine"], result["git"]
    dirty = f", with uncommitted changes in {', '.join(git['uncommitted'])}" if git["uncommitted"] else ""
    head = [
        f"# Measured {result['started']}",
        f"Commit {git['commit']}{dirty}. {machine['processors']} × {machine['model']}, {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; load average before the run {machine['load_average']:.2f}; load generator, Kafka, Redis and the "
        f"product share the machine. The run took {result['seconds']} s.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version) + ".",
        quiet(result),
        code(result["command"], *(f"{name}={value}" for name, value in result["product_settings"].items())),
    ]
    if result["quick"]:
        head.insert(1, "**This is a smoke run. It is too short for meaningful figures.**")
    sections = [SECTIONS[name](found) for name, found in result["scenarios"].items()]
    return "\n\n".join([part for part in head if part] + sections) + "\n"


def newest_rows(scenarios):
    rows = []
    for case in scenarios.get("produce", {}).get("cases", []):
        rows.append((f"POST /produce, {case['name']}", f"{number(case['produce']['rps'])}/s, {case['ratio']:.1%} of the bare "
                     f"route's {number(case['bare']['rps'])}/s"))
    if "produce" in scenarios:
        one = scenarios["produce"]["idle_request"]["produce"]
        rows.append(("POST /produce, a single idle request", f"p50 {one['p50_ms']} ms, p99 {one['p99_ms']} ms"))
        rows += [(f"POST /produce at {number(one['wanted_rps'])}/s, {one['name']}",
                  f"p50 {one['p50_ms']} ms, p99 {one['p99_ms']} ms") for one in scenarios["produce"]["constant_rate"]]
    for case in scenarios.get("pull", {}).get("cases", []):
        rows += [(f"GET /pull, {name}, {case['name']}", f"{number(case[name]['rps'])}/s, {ratio:.1%} of the bare route's "
                  f"{number(case['bare']['rps'])}/s") for name, ratio in case["ratio"].items() if name != "bare"]
    if found := scenarios.get("projection"):
        rss = found["rss_mib"]
        rows.append((f"Projection of {number(found['records'])} records", f"{number(found['rps'])}/s; RSS {rss['start']} → "
                     f"{rss['middle']} → {rss['end']} MiB"))
    for name in ("consumer", "relay", "feed"):
        if found := scenarios.get(name):
            rows += report_aims.aim_rows(found)
    if found := scenarios.get("messages"):
        rows += report_messages.newest_rows(found)
    if found := scenarios.get("idle"):
        rows.append(("Idle api role", f"{found['rss_mib']} MiB RSS, ready {found['ready_seconds']} s after exec"))
    return rows


def update_readme(readme, result, name):
    """Writes the figures of a full run between the two marks."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    machine = result["machine"]
    said = (f"From [results/{name}](results/{name}): {result['started']}, commit {result['git']['commit']}, "
            f"{machine['processors']} × {machine['model']}, {machine['memory_gib']} GiB; `{result['command']}`.")
    rows = table(("what", "measured"), newest_rows(result["scenarios"]))
    readme.write_text(f"{before}{BEGIN}\n\n{said}\n\n{rows}\n\n{END}{after}", encoding="utf-8")


def write(folder, name, result):
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"), (".md", markdown(result))):
        unfinished = folder / f"{name}{suffix}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / f"{name}{suffix}")
    return folder / f"{name}.md"
