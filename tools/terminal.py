"""The common code of interactive tools: the terminal, and the environment that they run in."""

import contextlib
import os
import re
import signal
import sys

NO_PICTURE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but tab and line feed


def enter(image, terminal, module):
    """Become this very command in the environment `image`; returns where that has happened already."""
    if os.environ.get("REPO_IMAGE") != image:
        words = ["containers/run", *(["--terminal"] if terminal else []), image]
        os.execv(words[0], [*words, "python", "-m", module, *sys.argv[1:]])


def pictured(text):
    """The text without the terminal's own codes, which an answer may hold."""
    return NO_PICTURE.sub("\ufffd", text)


def show(piece):
    print(piece, end="", flush=True)


def say(text):
    print(text, file=sys.stderr, flush=True)


def say_dim(text):
    say(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text)


@contextlib.contextmanager
def in_front():
    """Inside, Ctrl-C reaches this process alone. `make` in the same group would take it as its own end, and say so."""
    group = os.getpgrp()
    try:
        others = os.tcgetpgrp(0) == group != os.getpid()
    except OSError:  # no terminal
        others = False
    if not others:
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else giving the terminal back would stop this process
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z: the shell knows `make` only, and could not wake this one
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    try:
        yield
    finally:
        os.tcsetpgrp(0, group)


def talk(reply):
    """Read questions until Ctrl-D or Ctrl-C and hand each to `reply`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines, wide characters too
    person = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        while True:
            question = input("> " if person else "")
            if question.strip():
                reply(question)
    except (EOFError, KeyboardInterrupt):
        if person:
            print()
