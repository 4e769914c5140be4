"""
A stage ends with the DVC that runs it: nothing goes on as an orphan when that one is killed.
"""

import os
import signal
import threading
import time

LOOK_SECONDS = 0.5
LEAVE_SECONDS = 10  # for a stage to leave by itself, before it is killed


def end_with_dvc():
    """Watch the DVC process above this stage, if there is one; when it is gone, end: SIGTERM, then SIGKILL."""
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
            if "tools.reproduce" in words or any(os.path.basename(word) == "dvc" for word in words[:3]):
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
