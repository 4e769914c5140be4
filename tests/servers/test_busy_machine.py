"""A machine that does something else meanwhile: hundreds of short processes a second beside a start, a load and a
stop."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import psutil
import pytest

from lib.serving import process as processes
from lib.serving.monitor import Monitor
from lib.serving.process import run_client, session, started

SECONDS = 30
RATE = 200  # processes a second, at least
SERVER = ["sh", "-c", "sleep 300 & sleep 300 & wait"]
CHURN = """
import os
while True:
    pids = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(50)]
    for pid in pids:
        os.waitpid(pid, 0)
    os.write(1, b"." * len(pids))
"""


class Silent:
    """A server that tells nothing of itself."""

    metrics, counters, gauges = "http://127.0.0.1:9/metrics", {}, {"running": "x"}


@contextmanager
def churn(log):
    """Short processes, a hundred at a time, until the block ends; yields a function that counts them."""
    with open(log, "ab") as sink:
        makers = [subprocess.Popen([sys.executable, "-c", CHURN], stdout=sink) for _ in range(2)]
        try:
            yield lambda: os.path.getsize(log)
        finally:
            for maker in makers:
                maker.kill()
                maker.wait()


def alive(leader):
    """Living processes whose session `leader` led."""
    members = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == leader and each.status() != psutil.STATUS_ZOMBIE:
                members.append(each.pid)
        except (psutil.Error, OSError):
            continue
    return members


def test_short_processes_beside_it_hurt_no_measurement(tmp_path):
    begun, rounds = time.monotonic(), 0
    with churn(tmp_path / "churn") as count:
        while (spent := time.monotonic() - begun) < SECONDS:
            with started(SERVER, tmp_path / "server.log") as server:
                monitor = Monitor(Silent, partial(session, server))
                run_client("client", ["sleep", "1.5"], tmp_path / "client.log", server, 20, "a.key", monitor)
                until = time.monotonic() + 4  # a stat of a process just when it is reaped is rare
                while time.monotonic() < until:
                    assert len(session(server)) == 3
            assert alive(server.pid) == []
            assert monitor.samples and all(sample["server_cpu_seconds"] is not None for sample in monitor.samples)
            rounds += 1
        assert count() / spent > RATE
    assert rounds > 3


def test_a_stop_whose_first_look_fails_leaves_nothing_alive(tmp_path, monkeypatch):
    looks = []

    def fails_at_first(process):
        looks.append(process)
        if len(looks) < 3:
            raise ProcessLookupError(3, "No such process", "/proc/32045/stat")
        return session(process)

    with started(["sh", "-c", "trap '' TERM; sleep 300 & sleep 300"], tmp_path / "log") as server:
        time.sleep(0.3)
        monkeypatch.setattr(processes, "session", fails_at_first)
        monkeypatch.setattr(processes, "STOP_SECONDS", 0.5)
    assert len(looks) > 2 and alive(server.pid) == []


@pytest.mark.parametrize("broken", ["cpu_seconds", "read_metrics", "busy_seconds"])
def test_what_an_observer_cannot_tell_is_unknown(tmp_path, monkeypatch, broken):
    def fails(*_):
        raise RuntimeError("malformed")

    monkeypatch.setattr(f"lib.serving.monitor.{broken}", fails)
    with started(["sleep", "300"], tmp_path / "server.log") as server:
        monitor = Monitor(Silent, partial(session, server))
        run_client("client", ["sleep", "1.5"], tmp_path / "client.log", server, 20, "a.key", monitor)
    assert len(monitor.samples) > 1
    summary = monitor.summary()
    assert summary["batch_mean"] is None
    assert (summary["client_cores"] is None) == (broken != "read_metrics")


def test_a_signal_that_comes_while_a_server_stops_waits(tmp_path):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), started(SERVER, tmp_path / "log") as server:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert alive(server.pid) == []
