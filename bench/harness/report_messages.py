"""The section of the scenario `messages`."""

import json

from .markdown import code, number, spent, table
from .report_aims import aim_rows, aims


def rest_rows(name, held):
    rows = []
    for what in ("one", "all") if held["all"] is not held["one"] and len(held["all"]["servers"]) > 1 else ("one",):
        servers = held[what]["servers"]
        columns = ("connections", "rss_before_mib", "rss_mib", "kib_per_connection", "cpu_percent_of_one")
        rows.append((name, *(" ".join(number(one[column]) for one in servers) for column in columns)))
    return rows


def messages(found):
    idle, delivery = found["idle"], found["delivery"]
    resting = table(("at rest, pings every 20 s", "connections", "RSS before, MiB", "RSS, MiB", "KiB per connection",
                     "CPU, % of one processor"), [row for name, held in idle.items() for row in rest_rows(name, held)])
    opening = table(("opening", "connections", "per second", "handshake p50 ms", "p99 ms", "refused"),
                    [(name, number(one["connected"]), number(round(one["per_second"])), one["handshake_p50_ms"],
                      one["handshake_p99_ms"], one["refused"]) for name, held in idle.items() for one in held["opened"]])
    steady = table((f"{number(found['rate'])}/s to {number(found['receivers'])} receivers", "arrived/s", "p50 ms", "p90 ms",
                    "p99 ms", "p99.9 ms", "max ms", "response p50 ms", "lost", "CPU µs per message by process"),
                   [(name, number(one["rps"]), one["p50_ms"], one["p90_ms"], one["p99_ms"], one["p99.9_ms"], one["max_ms"],
                     one["posting_p50_ms"], one["lost"], spent(one["cpu_us_per_message"]))
                    for name, side in delivery.items() for one in side["steady"]])
    saturated = table((f"{number(found['window'])} in flight", "messages/s", "p50 ms", "p99 ms", "lost",
                       "CPU µs per message by process"),
                      [(name, number(one["rps"]), one["p50_ms"], one["p99_ms"], one["lost"], spent(one["cpu_us_per_message"]))
                       for name, side in delivery.items() for one in side["saturated"]])
    said = ("Latencies count from the time at which a message was due to its frame at the receiver. Every message of "
            "the product arrived once, at its receiver and at no other; otherwise the run would have failed.")
    if found["peer_skipped"]:
        peer = f"Without Centrifugo: {found['peer_skipped']}"
    else:
        peer = ("Centrifugo gets its messages through the same HTTP server, as commands in a topic with as many partitions, "
                "and keeps history only in Redis. The product stores each message in Postgres before delivery. "
                "Centrifugo's configuration:")
        peer += "\n\n" + code(json.dumps(found["peer_config"]))
    commands = [line for held in idle.values() for line in held["commands"]]
    commands += [line for side in delivery.values() for line in side["commands"]]
    return "\n\n".join(["## Messages to WebSockets", aims(found), resting, opening, steady, saturated, said, peer, code(*commands)])


def newest_rows(found):
    """Returns rows for the table of the newest results."""
    rates = [(f"Messages at saturation, {name}", f"{side['saturation_rps']:,}/s; CPU µs per message: "
              f"{spent(side['saturated'][0]['cpu_us_per_message'])}") for name, side in found["delivery"].items()]
    return aim_rows(found) + rates
