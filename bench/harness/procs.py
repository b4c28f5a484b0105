"""Child processes, and the CPU time and memory that they and the machine use, from /proc."""

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """An error that ends the run, with a message for the user."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def say_aims(scenario, aims):
    for one in aims:
        say(f"{scenario}: {one['what']}: {one['measured']}, target {one['aim']}: "
            f"{'reached' if one['reached'] else 'MISSED'}")


def get(url, seconds=2):
    """Returns status and body of a GET; the status is 0 if there is no response."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def await_true(what, seconds, condition, every=0.05):
    """Waits until the condition is true and returns its value; raises Failed after the time limit."""
    until = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > until:
            raise Failed(f"timed out after {seconds} s, waiting for: {what}")
        time.sleep(every)


class Process:
    """A child process with its log in a file. It ends when this script ends, however that happens."""

    def __init__(self, name, argv, log, env=None, cwd=None):
        self.name, self.argv, self.log = name, argv, log
        with open(log, "ab") as out:
            self.began = time.monotonic()
            self.child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *argv],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=cwd, start_new_session=True)
        self.pid = self.child.pid

    @property
    def command(self):
        return shlex.join(self.argv)

    def check(self):
        if self.child.poll() is not None:
            with open(self.log, "rb") as log:
                end = log.read()[-2000:].decode(errors="replace")
            raise Failed(f"{self.name} ended with code {self.child.returncode}; its log {self.log} ends:\n{end}")

    def stop(self, seconds=20):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                say(f"  {self.name} did not stop within {seconds} s: kill -9")
                self.child.kill()
                self.child.wait(10)
        return self.child.returncode


def stat(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def children(pid):
    """Returns the ids of a process's children. Postgres has one for each connection."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def cpu_seconds(pid):
    """Returns user and system time of a process, including its threads and its children, also those that ended."""
    spent = sum(int(field) for field in stat(pid)[11:15])
    for child in children(pid):
        try:
            spent += sum(int(field) for field in stat(child)[11:13])
        except OSError:
            # The child has just ended; from now on its time is included in its parent's.
            continue
    return spent / TICKS


def memory_mib(pid, field="VmRSS"):
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(field + ":"):
                return round(int(line.split()[1]) / 1024, 1)
    return None


def machine_seconds():
    """Returns the machine's CPU seconds since boot: spent on interrupts, stolen by the host, and idle."""
    with open("/proc/stat", encoding="ascii") as file:
        _user, _nice, _system, idle, wait, irq, soft, steal = (int(word) / TICKS for word in file.readline().split()[1:9])
    return {"interrupts": irq + soft, "stolen": steal, "idle": idle + wait}


def strangers(ours):
    """Returns the CPU seconds, by id, of processes that are not part of the measurement, without kernel threads."""
    found = {}
    ours = ours | {child for pid in ours if pid != os.getpid() for child in children(pid)}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = stat(pid)
        except OSError:
            continue
        if int(pid) not in ours and pid != "2" and fields[1] != "2":
            found[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


class Meter:
    """Measures the CPU seconds of processes over a span. `names` maps names to process ids."""

    def __init__(self, names):
        self.names, self.ours = names, {*names.values(), os.getpid()}
        self.strangers = strangers(self.ours)
        self.machine = machine_seconds()
        self.before = {name: cpu_seconds(pid) for name, pid in names.items()}

    def read(self, extra=None):
        """Returns the CPU seconds since the start. `extra` has those of children that have ended, such as wrk.

        `others` is the time of processes that are not part of the measurement, near 0 on a quiet machine. `idle` is
        unused time, near 0 if the processors are the limit. On most kernels, the time of `interrupts` is included in
        the processes' time as well."""
        used = {name: cpu_seconds(pid) - self.before[name] for name, pid in self.names.items()} | (extra or {})
        used["others"] = sum(max(0.0, seconds - self.strangers.get(pid, 0.0)) for pid, seconds in strangers(self.ours).items())
        used |= {name: seconds - self.machine[name] for name, seconds in machine_seconds().items()}
        return {name: round(seconds, 2) for name, seconds in used.items()}


def run_measured(argv, out_file, seconds):
    """Runs a command to its end, for at most `seconds`. Returns its output and its CPU seconds."""
    with open(out_file, "w+b") as out:
        child = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *argv],
                                 stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + seconds
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                child.kill()
                os.wait4(child.pid, 0)
                child.returncode = -9
                raise Failed(f"{shlex.join(argv)}: did not end within {seconds} s")
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if child.returncode != 0:
        raise Failed(f"{shlex.join(argv)}: exit code {child.returncode}\n{text[-2000:]}")
    return text, usage.ru_utime + usage.ru_stime
