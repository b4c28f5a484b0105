"""Tables of targets, and the sections of the scenarios `isolation`, `consumer` and `relay`."""

from .markdown import code, number, rounds, spent, table


def verdict(aim):
    return "reached" if aim["reached"] else "**missed**"


def aims(found):
    return table(("target", "measured", "wanted", "verdict"),
                 [(one["what"], one["measured"], one["aim"], verdict(one)) for one in found["aims"]])


def aim_rows(found):
    """Returns rows for the table of the newest results."""
    return [(one["what"][0].upper() + one["what"][1:], f"{one['measured']}; {one['aim']}: "
             f"{verdict(one)}") for one in found["aims"]]


def isolation(found):
    rows = [(name, one["p50_ms"], one["p99_ms"], one["p99.9_ms"], " ".join(str(ms) for ms in one["p99_ms_rounds"]), one["ratio"],
             number(one["others_rps"]), one["errors"]) for name, one in found["cases"].items()]
    said = (f"Records of 1,000 bytes at {number(found['rate'])}/s on {found['connections']} connections; at the same "
            "time, two connections send up to 1,500 requests/s.")
    return "\n\n".join(["## POST /produce while others send records that Kafka refuses", aims(found), said,
                        table(("the other two send", "p50 ms", "p99 ms (median)", "p99.9 ms", "p99 ms of each round", "p99 : alone",
                               "others' requests/s", "errors"), rows)])


def consumer(found):
    shapes = found["shapes"]
    speeds = table(("loop", "records/s (median)", "each round", "longest lag of the commits, ms",
                    "CPU µs per record by process"),
                   [(name, number(one["rps"]), rounds(one), one["commit_lag_ms"] or "", spent(one["cpu_us_per_record"]))
                    for name, one in shapes.items()])
    sleep = shapes["sleep"]["rounds"][0]
    said = (f"{number(found['records'])} records of 100 bytes with {number(found['keys'])} keys and no headers, in "
            f"{found['partitions']} partitions. In the last row, handlers took {sleep['handler_ms']:.2f} ms as "
            f"measured, which allows {number(round(sleep['allowed_rps']))}/s. The consumers commit once a second, so "
            "the lag of the commits includes that second.")
    return "\n\n".join(["## The consumer runtime", aims(found), speeds, said,
                        code(found["fill"]["command"], *(one["command"] for one in shapes.values()))])


def relay(found):
    at_once, slow, hanging, moving = (found[name] for name in ("at_once", "slow", "hanging", "moving"))
    constant = [("half of saturation", found["steady"])]
    constant += [(f"{name} a key that hangs", one) for name in ("without", "with") for one in hanging[name]["rounds"]]
    speeds = [(f"{name}, {one['workers']} workers", number(one["rps"]), " ".join(number(each["rps"]) for each in one["rounds"]),
               one["rounds"][0]["answer_ms"], one["rounds"][-1]["rss_mib"], spent(one["rounds"][0]["cpu_us_per_delivery"]))
              for name, one in (("at once", at_once), ("10 ms", slow))]
    limit = found["limited"]
    gaps = [(what, " ".join(f"{partition}: {ms:.0f}" for partition, ms in moving[name].items()))
            for what, name in (("stayed", "stayed_gap_ms"), ("moved", "moved_gap_ms"))]
    commands = [line for one in (at_once["rounds"][0], slow["rounds"][0], limit, found["steady"], hanging["with"]["rounds"][0],
                                 moving) for line in one["commands"]]
    return "\n\n".join([
        "## Relay", aims(found),
        f"A backlog of {number(found['records'])} records of 100 bytes with {number(found['keys'])} keys in {found['partitions']} "
        "partitions. Every record arrived once, and after the earlier ones of its key were answered; otherwise the run "
        "would have failed.",
        table(("target, relay", "deliveries/s (median)", "each round", "responses took, ms", "RSS of the relay, MiB",
               "CPU µs per delivery by process"), speeds),
        table(("constant rate", "wanted/s", "arrived/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms",
               "CPU µs per delivery by process"),
              [(name, number(one["wanted_rps"]), number(one["rps"]), one["p50_ms"], one["p90_ms"], one["p99_ms"], one["p99.9_ms"],
                one["max_ms"], spent(one["cpu_us_per_delivery"])) for name, one in constant]),
        table(("--rate", "deliveries/s", "seconds", "CPU µs per delivery by process"),
              [(number(limit["wanted_rps"]), number(limit["rps"]), limit["seconds"], spent(limit["cpu_us_per_delivery"]))]),
        table((f"partitions while a member joins and leaves at {number(moving['wanted_rps'])}/s", "longest gap, ms"),
              gaps),
        f"{moving['again']} records arrived again after the moves, and none is missing.",
        code(found["fill"], *commands)])
