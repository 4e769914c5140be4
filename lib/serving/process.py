"""
Start a server or a client, watch it, and stop everything it started.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from lib.core.attempt import attempt
from lib.core.parent import die_with_parent, exit_words
from lib.core.stage import UserError
from lib.core.web import UNANSWERED, open_url
from lib.serving.servers import SHARED_MEMORY

LOG_LINES = 15  # of a log, shown when its program fails
STOP_SECONDS = 30  # for a program to leave by itself, before it is killed
ORPHAN_SECONDS = 2  # for what it started, after that
PREPARED = set()  # images whose environments are there
KILL_SECONDS = 10  # in which SIGKILL is sent again and again
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def is_ready(url):
    try:
        with open_url(url, timeout=2) as response:
            return response.status == 200
    except UNANSWERED:
        return False


def check_ports(ports):
    """UserError naming the program behind the first port that is taken: we would measure that one."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise UserError(f"port {port} is taken by {holder(port)}; stop it first") from None


def holder(port):
    """The program that listens on a port, as far as this user may know."""
    with suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == "LISTEN" and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (process {each.pid})"
    return "another program"


@contextmanager
def started(command, log):
    """A running program in a session of its own, so that all its processes can be stopped; its output goes to `log`."""
    process = guard = None
    try:
        with open(log, "ab") as sink:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # until its guard is there
            )
        guard = guarding(process)
        yield process
    finally:
        if process:
            stop(process)
        if guard:
            guard.kill()
            guard.communicate()


def guarding(process):
    """A shell that ends the program when this stage is gone without having done so, killed by SIGKILL for instance:
    its standard input ends then."""
    script = f"read -r _; kill -TERM -- -{process.pid}; sleep {ORPHAN_SECONDS}; kill -KILL -- -{process.pid}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, start_new_session=True, **quiet)


def stop(process):
    """End every process of the session: SIGTERM first, then SIGKILL. A second Ctrl-C does not cut this short.

    A look that fails counts as "still alive": the session's process group is signalled and looked at again.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        end(process, signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, STOP_SECONDS)
        # Children that outlive their leader: Triton's Python processes, when it left with requests in flight.
        wait_until(lambda: attempt(session, process) == [], ORPHAN_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS
        while attempt(session, process) != [] and time.monotonic() < deadline:
            end(process, signal.SIGKILL)
            time.sleep(0.1)
        process.poll()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def wait_until(done, seconds):
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def end(process, sign):
    """Signal the session's own process group, and each process of the session that a look finds."""
    with suppress(OSError):
        os.killpg(process.pid, sign)
    for pid in attempt(session, process) or []:
        with suppress(OSError):
            os.kill(pid, sign)


def session(process):
    """Process ids of the living members of the session that `process` leads, itself among them."""
    process.poll()  # reaps it
    members = []
    for each in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone meanwhile
            if os.getsid(each.pid) == process.pid and each.status() not in ENDED:
                members.append(each.pid)
    return members


@contextmanager
def leaving_no_trace(server):
    """Remove what a server leaves behind: shared memory when it was killed, compiled files beside Triton's model.py
    (DVC would see another result)."""
    try:
        yield
    finally:
        for folder in attempt(lambda: server.served) or []:
            for compiled in attempt(list, folder.rglob("__pycache__")) or []:
                shutil.rmtree(compiled, ignore_errors=True)
        for region in attempt(list, Path("/dev/shm").glob(f"{SHARED_MEMORY}*")) or []:
            attempt(region.unlink)


def prepare(command):
    """Make a program's environment before its time is taken: its first use may download gigabytes."""
    if command[0] != "containers/run" or command[1] in PREPARED:
        return
    reference, _, packages = command[1].removeprefix("docker://").partition("+")
    fetch = ["containers/run", command[1], "true"]
    if command[1].startswith("docker://"):
        fetch = ["bash", "-c", 'docker image inspect "$0" >/dev/null 2>&1 || docker pull --quiet "$0"', reference]
    done = subprocess.run(fetch, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if packages and not done.returncode:
        fetch = ["containers/venv", packages.partition("@")[0]]
        done = subprocess.run(fetch, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{command[1]} cannot be started: {last}")
    PREPARED.add(command[1])


@contextmanager
def serving(server, command, log, seconds, key):
    """A server that is ready, and how many seconds that took; on a UserError its last log lines go to stderr. seconds:
    the most that it may take, which params.yaml has under `key`."""
    with launched(server, command, log) as process:
        yield process, wait_until_ready(server, process, seconds, key)


@contextmanager
def launched(server, command, log):
    """A server that has been started and need not be ready; on a UserError its last log lines go to stderr."""
    check_ports(server.ports)
    prepare(command)
    with leaving_no_trace(server), started(command, log) as process:
        try:
            yield process
        except UserError:
            show_end(log)
            raise


def wait_until_ready(server, process, seconds, key):
    """Seconds until the server was ready; UserError where it stops before, or takes longer than `seconds` (`key`)."""
    begun, name = time.monotonic(), type(server).__name__
    while not is_ready(server.ready):
        if process.poll() is not None:
            raise UserError(f"{name} stopped ({exit_words(process.returncode)}) before it was ready")
        if time.monotonic() - begun > seconds:
            raise UserError(f"{name} was not ready after {seconds} s ({key})")
        time.sleep(0.5)
    return time.monotonic() - begun


def run_client(name, command, log, server_process, seconds, key, monitor=None):
    """Run a client to its end while its server lives, watched (lib/serving/monitor.py); UserError when either fails, or
    when the client takes longer than `seconds`, which params.yaml has under `key`. server_process: None without one."""
    prepare(command)
    deadline = time.monotonic() + seconds
    with started(command, log) as client:
        while client.poll() is None:
            if server_process and server_process.poll() is not None:
                words = exit_words(server_process.returncode)
                raise UserError(f"the server stopped ({words}) while it was measured")
            if time.monotonic() > deadline:
                raise UserError(f"{name} took longer than {seconds} s ({key}); its output: {log}")
            if monitor:
                attempt(monitor.look, partial(session, client))
            with suppress(subprocess.TimeoutExpired):
                client.wait(0.2)
    if client.returncode:
        show_end(log)
        raise UserError(f"{name} failed ({exit_words(client.returncode)}); its output: {log}")


def show_end(log):
    lines = (attempt(Path(log).read_text, "utf-8", "replace") or "").splitlines()[-LOG_LINES:]
    print(f"the last lines of {log}:", *lines, sep="\n| ", file=sys.stderr)
