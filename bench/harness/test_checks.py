"""Tests of the checks. Run them with: python3 -m unittest discover -s bench -t bench"""

import contextlib
import io
import threading
import unittest
from types import SimpleNamespace
from unittest import mock

from . import consumer, messages, projection, pull, relay
from .feed_tools import Backlog
from .load import payload, produce_body, summary
from .procs import Failed
from .produce import Produce
from .report import quiet


class Stack:
    """A fake stack whose topics have a given number of records."""

    def __init__(self, records):
        self.records = records

    def end_offsets(self, _topic):
        return self.records

    def partitions(self, _topic):
        return 6

    def start_product(self, *_):
        return SimpleNamespace(url="http://view")

    def stop(self, _child):
        pass


def produced(records, answered, unanswered=0, errors=0):
    scenario = Produce.__new__(Produce)
    scenario.stack, scenario.answered, scenario.unanswered, scenario.errors = Stack(records), answered, unanswered, errors
    return scenario.check()


class Checks(unittest.TestCase):
    def setUp(self):
        silence = contextlib.redirect_stderr(io.StringIO())
        silence.__enter__()
        self.addCleanup(silence.__exit__, None, None, None)

    def test_a_backlog_that_grows_is_told_from_one_that_swings(self):
        backlog = Backlog.__new__(Backlog)
        threading.Thread.__init__(backlog)
        backlog.over, backlog.run = threading.Event(), lambda: None
        backlog.start()
        backlog.seen = [0, 0, *range(0, 1000, 100)]
        self.assertEqual(backlog.growth()["grows_per_s"], 100.0)
        backlog.seen = [500, 0] * 10
        self.assertLess(abs(backlog.growth()["grows_per_s"]), 20)

    def test_an_acknowledged_record_that_is_missing_ends_the_run(self):
        with self.assertRaises(Failed):
            produced(records=99, answered=100)

    def test_records_that_nobody_sent_and_errors_fail(self):
        self.assertTrue(produced(records=110, answered=100, unanswered=10)["passed"])
        self.assertFalse(produced(records=111, answered=100, unanswered=10)["passed"])
        self.assertFalse(produced(records=100, answered=100, errors=1)["passed"])

    def test_a_read_without_its_event_ends_the_run(self):
        case = {"ratio": {"audit async": 1}, "audit async": {"ok": 100, "errors": 0}}
        self.assertTrue(pull.check(Stack(105), [case], before=5, dropped=0)["passed"])
        self.assertTrue(pull.check(Stack(95), [case], before=5, dropped=10)["passed"])
        with self.assertRaises(Failed):
            pull.check(Stack(104), [case], before=5, dropped=0)

    def test_a_key_with_an_older_value_ends_the_run(self):
        newest = {f"key-{number * projection.STRIDE % 10}": number for number in range(25)}

        def view(lag):
            def get(url):
                number = newest[url.rpartition("/")[2]] - lag
                return 200, f'{{"key":"k","value":"{number:010d}abc"}}'
            return mock.patch.object(projection, "get", get)

        with view(lag=0):
            self.assertTrue(projection.check(Stack(25), 25, 10)["passed"])
        with view(lag=10), self.assertRaises(Failed):
            projection.check(Stack(25), 25, 10)

    def test_a_record_that_comes_twice_or_beside_its_key_ends_the_run(self):
        relay.strict({"again": 0, "overlapping": 0})
        for name in ("again", "overlapping"):
            with self.assertRaises(Failed):
                relay.strict({"again": 0, "overlapping": 0} | {name: 1})

    def test_a_message_that_is_lost_doubled_or_led_astray_ends_the_run(self):
        fine = {"lost": 0, "twice": 0, "foreign": 0, "errors": 0, "posted": 9, "first_error": ""}
        messages.strict(fine)
        for name in ("lost", "twice", "foreign", "errors"):
            with self.assertRaises(Failed):
                messages.strict(fine | {name: 1})

    def test_a_consumer_that_ends_early_ends_the_run(self):
        def found(batch):
            return {name: {"rounds": [{"records": records}]} for name, records in (("bare", 9), ("batch", batch), ("keyed", 9))}

        self.assertTrue(consumer.check(found(9), 9)["passed"])
        with self.assertRaises(Failed):
            consumer.check(found(8), 9)

    def test_an_aim_that_is_missed_is_called_so(self):
        def reached(**changes):
            result = {
                "at_once": {"workers": 64, "rps": 25_000}, "slow": {"workers": 256, "rps": 20_000},
                "limited": {"rps": 990.0, "off": 0.01}, "steady": {"wanted_rps": 1, "p99_ms": 49.9},
                "hanging": {"ratio": 1.19}, "moving": {"stayed_gap_ms": {0: 10.0, 1: 999.0}},
            } | changes
            return [one["reached"] for one in relay.aims(result)]

        self.assertEqual(reached(), [True] * 6)
        self.assertEqual(reached(hanging={"ratio": 1.2}), [True] * 4 + [False, True])
        self.assertEqual(reached(moving={"stayed_gap_ms": {0: 10.0, 1: 1_000.0}}), [True] * 5 + [False])

    def test_an_idle_connection_that_costs_too_much_is_called_so(self):
        def reached(kib=14.9, cpu=4.9, refused=0, rate=1_990.0, theirs=20.0, p50=5.9):
            one = {"connections": 18_000, "kib_per_connection": kib, "cpu_percent_of_one": cpu}
            held = {"servers": [one]}
            ours = {"one": held, "all": held, "opened": [{"per_second": rate, "refused": refused}]}
            peer = {"one": {"servers": [{"kib_per_connection": theirs}]}}
            side = {"steady_median": {"p50_ms": p50, "p99_ms": 19.9}, "saturation_rps": 9_000}
            other = {"steady_median": {"p99_ms": 20.0}, "saturation_rps": 8_999}
            found = {"idle": {"postrider": ours, "centrifugo": peer}, "receivers": 10_000,
                     "delivery": {"postrider": side, "centrifugo": other}}
            return [one["reached"] for one in messages.aims(found)]

        self.assertEqual(reached(), [True] * 10)
        for change, missed in (({"kib": 15.0}, 2), ({"cpu": 5.0}, 2), ({"refused": 1}, 1), ({"rate": 1_800.0}, 1),
                               ({"theirs": 14.9}, 1), ({"p50": 6.0}, 1)):
            self.assertEqual(reached(**change).count(False), missed, change)

    def test_a_machine_in_other_hands_is_called_so(self):
        def result(others):
            return {"scenarios": {"produce": [{"cpu_seconds": {"postrider": 1.0, "others": others}}]}}

        self.assertIn("was quiet", quiet(result(0.01)))
        self.assertIn("NOT", quiet(result(1.0)))


class Arithmetic(unittest.TestCase):
    def test_payloads_have_the_size_that_is_asked_for(self):
        for size in (60, 1024):
            self.assertEqual(len(payload(size)), size)
        self.assertIn('"key":"@KEY@"', produce_body(60, keyed=True))

    def test_a_slow_tenth_and_growing_memory_show(self):
        # Nine tenths at 100/s; the last tenth is ten times slower.
        samples = [(0.0, 0, 10.0), *((tenth / 10, tenth * 10, 10.0 + tenth) for tenth in range(1, 10)), (1.9, 100, 50.0)]
        figures = projection.figures(samples, 100)
        self.assertEqual((figures["seconds"], figures["slowest_tenth_rps"], figures["rss_mib"]["end"]), (1.9, 10, 50.0))

    def test_cpu_is_divided_by_all_requests(self):
        one = {"command": "wrk", "requests": 1_000, "ok": 1_000, "errors": 0, "rps": 1, "p50_ms": 1, "p99_ms": 1,
               "cpu": {"postrider": 0.02}}
        self.assertEqual(summary([one, one])["cpu_us_per_request"]["postrider"], 20.0)


if __name__ == "__main__":
    unittest.main()
