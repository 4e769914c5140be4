"""
One command at a time runs stages in a checkout or writes the parameters and images that stages read.
"""

import fcntl
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from lib.core.stage import UserError

RWLOCK = Path(".dvc/tmp/rwlock")  # where DVC keeps who reads and writes what


@contextmanager
def only_run(command):
    """Hold this checkout; UserError names who holds it. The lock goes with its process, however that ends."""
    path = Path(".work/reproduce.lock")
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{lock.read() or 'another run'} holds this checkout; wait for it or stop it") from None
        if holder := dvc_holder():
            raise UserError(f"{holder} holds this checkout; wait for it or stop it")
        # Its entries are of runs that were killed: DVC would warn, or take another program for them.
        RWLOCK.unlink(missing_ok=True)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} ({command}) of {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield


def dvc_holder():
    """The living DVC process that holds DVC's lock, as "process 12 (dvc repro) of TIME"; None without one."""
    try:
        modes = json.loads(RWLOCK.read_text() or "{}")
    except (OSError, ValueError):
        return None
    # {"write": {path: process}, "read": {path: [process, ...]}}
    holders = [*modes.get("write", {}).values(), *(each for many in modes.get("read", {}).values() for each in many)]
    for holder in holders:
        try:
            process = psutil.Process(holder["pid"])
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.create_time()))
            if process.pid != os.getpid() and "dvc" in " ".join(process.cmdline()):
                return f"process {process.pid} ({holder['cmd']}) of {since}"
        except psutil.Error:
            continue  # left by a run that was killed
    return None
