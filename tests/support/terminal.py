"""A terminal of our own, for the tests of what talks with a person."""

import fcntl
import os
import re
import select
import subprocess
import termios
import time

CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"


class Terminal:
    """A command in front of a terminal, as a shell with job control starts it; `with` ends its processes."""

    def __init__(self, *command, **options):
        self.ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own, **options
        )
        os.close(theirs)
        self.unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        # Its processes get SIGHUP, as when a window is closed.
        os.close(self.ours)
        if problem[0]:
            self.process.kill()
        self.process.wait(20)

    def type(self, text):
        os.write(self.ours, text.encode())

    def until(self, pattern, seconds=90):
        """What came up to and with the first match of the pattern, lines ended by \\n; the rest stays."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self.unread)):
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            try:
                piece = os.read(self.ours, 65536) if ready else b""
            except OSError:  # the last process on the terminal has ended
                piece = b""
            assert piece, f"{pattern!r} did not come; there was ...{self.unread[-500:].decode(errors='replace')!r}"
            self.unread = (self.unread + piece).replace(b"\r\n", b"\n")
        read, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return read.decode(errors="replace")  # a pattern may end within a character


def own():
    """Make stdin the terminal that Ctrl-C belongs to; runs in the new process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
