"""
Work that survives a kill: a folder outside DVC's outputs, held by one process at a time.
"""

import fcntl
import os
import re
import shutil
import time

from lib.core.stage import UserError, work_folder

LOCK_SECONDS = 15  # to wait for a stage of a killed run to leave
LOOK_SECONDS = 0.5
HELD = {}  # locks of this process, by path; they go with it


def work_dir(name, key):
    """The folder .work/<profile>/<name>-<key>/, for what a stage makes on its way.

    Deletes work directories of other parameters or inputs (another key); they cannot be resumed. UserError where
    another process works there.
    """
    hold_work(name)
    folder = work_folder(f"{name}-{key}")
    for old in folder.parent.glob(f"{name}-*"):
        if old.name != folder.name and re.fullmatch(r"[0-9a-f]{16}", old.name.removeprefix(f"{name}-")):
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hold_work(name):
    """Hold .work/<profile>/<name> for this process, so that two stages never write the same work.

    UserError names a holder that does not leave within LOCK_SECONDS.
    """
    path = work_folder(f"{name}.lock")
    if path in HELD or "RANK" in os.environ:  # the workers of a training on several GPUs share their parent's
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, deadline = path.open("a+"), time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(f"{path}: {lock.read() or 'another process'} works there; stop it first") from None
            time.sleep(LOOK_SECONDS)
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    HELD[path] = lock
