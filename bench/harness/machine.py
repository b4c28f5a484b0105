"""The commit, the machine and the versions of a measurement."""

import os
import platform
import re
import shutil
import subprocess

from .stack import REPO


def first_line(*argv):
    """Returns the first line of a command's output, or nothing if the command does not exist. The exit code does not
    matter, because some tools print their version and fail."""
    if not shutil.which(argv[0]):
        return ""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=30, check=False, cwd=REPO)
    return done.stdout.strip().partition("\n")[0].strip()


def commit():
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
                             cwd=REPO, stdout=subprocess.PIPE, text=True, timeout=30, check=False).stdout.split("\n")
    changed = [line[3:] for line in changed if line]
    return {"commit": first_line("git", "rev-parse", "--short=12", "HEAD"), "uncommitted": changed}


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search(r"^model name\s*: (.*)$", file.read(), re.M)
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = re.search(r"^MemTotal: +(\d+)", file.read(), re.M)
    return {
        "processors": len(os.sched_getaffinity(0)),
        "model": model[1] if model else platform.machine(),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def kafka_version():
    text = (REPO / "dev/lib/kafka.sh").read_text(encoding="utf-8")
    found = re.search(r"^KAFKA_VERSION=(\S+)", text, re.M)
    return found[1] if found else ""


def librdkafka_version():
    text = (REPO / "Cargo.lock").read_text(encoding="utf-8")
    found = re.search(r'^name = "rdkafka-sys"\nversion = "([^"]+)"', text, re.M)
    return found[1] if found else ""


def versions():
    redis = re.search(r"v=(\S+)", first_line("redis-server", "--version"))
    wrk = first_line("wrk", "--version").partition(" Copyright")[0]
    return {
        "rustc": first_line("rustc", "--version").removeprefix("rustc "),
        "rdkafka-sys": librdkafka_version(),
        "kafka": kafka_version(),
        "java": first_line("java", "-version"),
        "redis": redis[1] if redis else "",
        "wrk": wrk.removeprefix("wrk "),
        "oha": first_line("oha", "--version").removeprefix("oha "),
        "perf": first_line("perf", "--version").removeprefix("perf version "),
    }
