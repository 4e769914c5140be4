"""
A stage ends with the DVC that runs it, and a program with the stage that starts it: nothing goes on as an orphan when
one of them is killed.
"""

import ctypes
import os
import signal
import sys
import threading
import time

LOOK_SECONDS = 0.5
LEAVE_SECONDS = 10  # for a stage to leave by itself, before it is killed
STARTERS = {"tools.reproduce", "tools.dvc_command"}  # modules that run DVC
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None)


def end_with_dvc():
    """Watch the DVC process above this stage, if there is one; when it is gone, end: SIGTERM, then SIGKILL.

    containers/run says who started it (REPO_PARENT): DVC may have been killed while this stage was being imported.
    """
    parent = os.environ.pop("REPO_PARENT", None)
    if parent and "DVC_STAGE" in os.environ and os.getppid() != int(parent):
        sys.exit("error: the DVC that started this stage has ended; run the same command again")
    if dvc := find_dvc():
        threading.Thread(target=wait_and_end, args=[dvc], daemon=True).start()


def find_dvc():
    """The nearest ancestor that is DVC or make reproduce; None without one, or without psutil (in an image)."""
    try:
        import psutil
    except ImportError:
        return None
    try:
        for ancestor in psutil.Process().parents():
            words = ancestor.cmdline()
            if STARTERS & set(words) or any(os.path.basename(word) == "dvc" for word in words[:3]):
                return ancestor
    except psutil.Error:
        return None
    return None


def wait_and_end(dvc):
    while dvc.is_running() and dvc.status() != "zombie":
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent():
    """A function for Popen's preexec_fn: the program gets SIGTERM when the thread that starts it ends. Not SIGKILL: the
    program may be Docker's client, which hands SIGTERM on to its container."""
    parent = os.getpid()

    def prepare():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return prepare


def exit_words(code):
    """An exit code in words; SIGKILL is explained, for no log explains it."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return f"exit code {code}: killed; the kernel does that where memory runs out, see `make doctor`"
    return f"exit code {code}"
