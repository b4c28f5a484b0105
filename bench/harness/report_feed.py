"""The sections of the scenarios `feed` and `feed-growth`."""

from .markdown import code, number, rounds, spent, table
from .report_aims import aims


def feed(found):
    accepted = table(("posts, 100 connections", "accepted/s (median)", "each round", "p50 ms", "p99 ms", "errors",
                      "backlog", "backlog into feeds, posts/s", "CPU µs per request by process"),
                     [(name, number(one["rps"]), rounds(one), one["p50_ms"], one["p99_ms"], one["errors"], number(one["left"]),
                       number(one["drained_per_s"]), spent(one["cpu_us_per_request"]))
                      for name, one in (("relay and processor paused", found["accepted_alone"]), ("both running", found["accepted"]))])
    reads = found["reads"]
    read = table(("first pages, 50 connections", "reads/s (median)", "each round", "p50 ms", "p99 ms", "CPU µs per request by process"),
                 [(name, number(reads[name]["rps"]), rounds(reads[name]), reads[name]["p50_ms"], reads[name]["p99_ms"],
                   spent(reads[name]["cpu_us_per_request"])) for name in ("bare", "api")])
    half = reads["half"]
    constant = table(("reads at a constant rate", "reached/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"),
                     [(number(half["wanted_rps"]), number(half["rps"]), *(half[f"{name}_ms"] for name in ("p50", "p90", "p99", "p99.9")))])
    rates = table(("posts/s", "reached/s", "accepted p50, p99 ms", "visible p50, p99, max ms", "probes",
                   "backlog at the end, posts", "growing by, /s", "feed rows", "CPU µs per post by process"),
                  [(number(one["wanted_rps"]), number(one["rps"]), f"{one['p50_ms']}, {one['p99_ms']}",
                    ", ".join(str(one["visible"][name]) for name in ("p50_ms", "p99_ms", "max_ms")), one["visible"]["probes"],
                    number(one["backlog"]["behind"]), one["backlog"]["grows_per_s"], number(round(one["feed_rows"])),
                    spent(one["cpu_us_per_request"])) for one in found["to_feeds"]])
    many, cold = found["one_to_many"], found["cold"]
    said = (f"One post to {number(many['followers'])} feeds took, in ms: {' '.join(map(str, many['ms']))}, until the last follower saw it, with "
            f"500 other posts a second beside it. A cold feed was read {cold['reads']} times with all timelines "
            "deleted from Redis before each: "
            f"{cold['p50_ms']} ms p50, {cold['max_ms']} ms max. Check: {found['check']['errors']} errors, and "
            f"{found['check']['drift']} wrong rows or timelines in the feeds of 500 users.")
    return "\n\n".join([f"## Feeds, {number(found['users'])} users, {found['follows']} follows of each", aims(found), accepted, read, constant, rates,
                        said, code(found["accepted"]["command"], reads["api"]["command"], half["command"],
                                   *(one["command"] for one in found["to_feeds"]))])


def growth(found):
    rows = [(number(one["users"]), one["follows"], " ".join(number(count) for count in one["counts"].values()), number(one["alone"]["rps"]),
             f"{number(one['alone']['drained_per_s'])} ({number(one['alone']['drained_per_s'] * one['follows'])} rows)",
             f"{one['steady']['visible']['p50_ms']}, {one['steady']['visible']['p99_ms']}", one["steady"]["backlog"]["behind"],
             number(one["reads"]["rps"]), f"{one['reads_ratio']:.1%}", one["cold_ms"],
             f"{sum(one['bytes'].values()) / 2 ** 30:.1f}", one["seeded_s"], one["verify_s"]) for one in found["sizes"]]
    head = ("users", "follows of each", "posts, follows, rows of feeds at the end", "posts accepted/s, alone",
            "posts/s from a backlog into feeds",
            f"visible at {number(found['sizes'][0]['steady']['wanted_rps'])}/s: p50, p99 ms", "backlog at the end",
            "cached reads/s", "of bare",
            "a page from Postgres, ms", "tables, GiB", "seeded in, s", "1,000 feeds verified in, s")
    check, largest = found["check"], max(found["sizes"], key=lambda one: one["counts"]["feed_rows"])
    said = (f"Check: {check['errors']} errors, {check['drift']} wrong rows or timelines. No hot statement scans a "
            f"whole large table at any size. With {number(largest['counts']['feed_rows'])} rows of feeds "
            "the plans are:")
    plans = [line for one in largest["plans"] for line in (f"-- {one['statement']}", *one["plan"].split("\n"))]
    return "\n\n".join(["## Growing feeds", table(head, rows), said, "\n".join(["```", *plans, "```"])])
