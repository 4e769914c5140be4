"""
The whole pipeline, one line a stage: python -m tools.reproduce [PROFILE]

It is `dvc repro` with the estimate before it, each stage's output in .work/<profile>/logs/STAGE.log, and the verdicts
after it; VERBOSE=1 shows all output instead. A run that is killed resumes. A profile is written into params.yaml only
after this machine was found fit for it.
"""

import logging
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from lib.bench.experiments import CUT_SHORT, seconds_of
from lib.core.parent import exit_words
from lib.core.stage import UserError, load_yaml, parse_yaml, read_json, results, run, write_json
from tools import preflight
from tools.checkout import only_run
from tools.dvc_command import mend_dvc
from tools.profile import check_name, plan_profile, write_profile

LOG_LINES = 15  # of a failed stage, shown on stderr
STAGE_SECONDS = Path("data/stage_seconds.yaml")
LEAST_SECONDS = 30  # of the table that must have run before the pace counts
RUNNING, UNCHANGED = re.compile(r"Running stage '(.+)'"), re.compile(r"Stage '(.+)' didn't change")


class Progress(logging.Handler):
    """Follows DVC's own messages: a line when a stage has ended, its output in a log of its own."""

    def __init__(self, profile, names, minutes, verbose):
        super().__init__()
        self.table = load_yaml(STAGE_SECONDS).get(profile, {})
        self.total, self.minutes, self.verbose = len(names), minutes, verbose
        self.logs, self.times = Path(".work") / profile / "logs", Path(".work") / profile / "stage_seconds.json"
        self.seconds = read_json(self.times) if self.times.exists() else {}
        self.terminal, self.errors = os.fdopen(os.dup(1), "w"), os.dup(2)
        self.begun, self.place, self.unchanged = time.monotonic(), 0, 0
        self.names, self.stage, self.stage_begun, self.log = names, None, 0.0, None
        self.logs.mkdir(parents=True, exist_ok=True)

    def emit(self, record):
        message = record.getMessage()
        if match := UNCHANGED.match(message):
            self.end_stage()
            self.place += 1
            self.unchanged += 1
            self.done(match[1])
        elif match := RUNNING.match(message):
            self.end_stage()
            self.begin_stage(match[1])

    def done(self, name):
        if name in self.names:
            self.names.remove(name)

    def begin_stage(self, name):
        self.place += 1
        self.stage, self.stage_begun, self.log = name, time.monotonic(), self.logs / f"{name}.log"
        if not self.verbose:
            self.redirect(self.log)

    def redirect(self, path):
        """Send what this process and its stages print to a file, anew."""
        sys.stdout.flush()
        sys.stderr.flush()
        sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)

    def show_output(self):
        """Send what this process prints to where it went before redirect()."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self.terminal.fileno(), 1)
        os.dup2(self.errors, 2)

    def end_stage(self):
        """One line of the stage that has just ended."""
        if self.stage is None:
            return
        seconds = time.monotonic() - self.stage_begun
        self.seconds[self.stage] = round(seconds, 1)
        write_json(self.times, self.seconds)
        self.done(self.stage)
        self.say(f"[{self.place:2} of {self.total}] {self.stage:22} {seconds:4.0f} s{self.left()}")
        self.stage = None

    def left(self):
        """The time left if all stages run, rounded up to minutes.

        A profile without a table counts its estimate down; empty once that is used up.
        """
        seconds = seconds_left(self.names, self.seconds, self.table, self.minutes)
        if seconds is None:
            seconds = 60 * self.minutes - (time.monotonic() - self.begun)
        return f", about {int(seconds // 60) + 1} min left" if seconds > 0 else ""

    def say(self, line):
        clear = "\r\033[K" if self.terminal.isatty() else ""
        print(f"{clear}{line}", file=self.terminal, flush=True)

    def show_last_line(self, stop):
        """On a terminal, the last line of the running stage's log, once a second."""
        while not stop.wait(1):
            if self.stage and self.log.exists():
                lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
                width = os.get_terminal_size(self.terminal.fileno()).columns - 1
                words = f"[{self.place:2} of {self.total}] {self.stage}: {lines[-1]}"[:width]
                print(f"\r\033[K{words}", end="", file=self.terminal, flush=True)


def seconds_left(names, seconds, table, minutes):
    """
    Seconds that the stages `names` will take, or None if a stage has no time.

    seconds: {stage: seconds} of this checkout, its last times; they count first
    table: {stage: seconds} of the reference machine, scaled by this machine's pace
    minutes: the profile's estimate of a whole run, which gives the pace until LEAST_SECONDS of the table have run
    """
    if any(name not in seconds and name not in table for name in names):
        return None
    done = seconds.keys() & table.keys()
    reference = sum(table[name] for name in done)
    if reference >= LEAST_SECONDS:
        pace = sum(seconds[name] for name in done) / reference
    else:
        pace = 60 * minutes / max(sum(table.values()), 1)
    return sum(seconds[name] if name in seconds else pace * table[name] for name in names)


def run_stages(profile, minutes):
    """Run what changed; UserError with the end of the log of a stage that fails."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    mend_dvc()
    try:
        with Repo() as repo:
            progress = Progress(profile, planned(repo), minutes, bool(os.environ.get("VERBOSE")))
            with followed(progress):
                repo.reproduce()
                progress.end_stage()
    except DvcException as error:  # outside of any stage
        raise UserError(describe_error(error)) from None
    seconds = time.monotonic() - progress.begun
    print(f"{progress.total - progress.unchanged} of {progress.total} stages ran in {seconds:.0f} s", flush=True)


def planned(repo):
    """Names of the stages of dvc.yaml, in the order in which DVC runs them."""
    from dvc.repo.reproduce import get_active_graph, plan_repro

    stages = [stage for stage in repo.index.stages if Path(stage.path) == Path(repo.root_dir) / "dvc.yaml"]
    return [step.addressing for step in plan_repro(get_active_graph(repo.index.graph), stages)]


@contextmanager
def followed(progress):
    """DVC's messages go to `progress` and its output to a log; UserError with the end of the log of a failed stage."""
    from dvc.exceptions import DvcException

    logger, stop = logging.getLogger("dvc"), threading.Event()
    logger.setLevel(logging.INFO)
    logger.addHandler(progress)
    if not progress.verbose:
        progress.redirect(progress.logs / "dvc.log")
        if progress.terminal.isatty():
            threading.Thread(target=progress.show_last_line, args=[stop], daemon=True).start()
    try:
        yield
    except DvcException as error:
        progress.show_output()  # before anything is said of the failure
        words = describe_failure(progress.stage, progress.log, error) if progress.stage else describe_error(error)
        raise UserError(words) from None
    finally:
        stop.set()
        logger.removeHandler(progress)
        progress.show_output()


def describe_error(error):
    """DVC's own error, if no stage failed, in one line."""
    words = f"DVC: {' '.join(str(error).split())}"
    if "dvc.lock" in words:
        words += "; `git checkout dvc.lock` and run the same again, what is finished comes back from DVC's cache"
    return words


def describe_failure(stage, log, error):
    """The stage that failed and its log; the end of the log goes to stderr first."""
    lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:] if log.exists() else []
    print(f"the last lines of {log}:", *lines, sep="\n| ", file=sys.stderr)
    # DVC says "exited with -9" where the kernel ended the stage.
    match = re.search(r"exited with (-?\d+)\b", full_message(error))
    code = int(match[1]) if match else None
    if code == CUT_SHORT:
        return f"stage {stage}: BUDGET ended; run the same again to resume, what is finished is kept"
    killed = f" ({exit_words(code)})" if code in (-signal.SIGKILL, 128 + signal.SIGKILL) else ""
    return f"stage {stage} failed{killed}; its log: {log}; mend it and run the same again, what is finished is kept"


def full_message(error):
    """The messages of an error and of what caused it."""
    return f"{error} {full_message(error.__cause__)}" if error.__cause__ else str(error)


def summary_lines():
    """The results in three lines."""
    claims = read_json(results("claims") / "claims.json")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in claims["counts"].items() if count)
    yield f"verdicts: {counts}"
    yield f"report: {results('report') / 'index.html'}"
    yield "next: make chat ADAPTER=lora, or change a number: containers/run venv:tools dvc exp run -S lora.r=8"


def main():
    if len(sys.argv) > 2:
        raise UserError("usage: make reproduce [PROFILE=embedded|weightless|writeup]")
    profile = sys.argv[1] if len(sys.argv) == 2 else None
    seconds_of(os.environ.get("BUDGET"))
    with only_run("make reproduce"):
        if profile:
            check_name(profile)
            params, images, _ = plan_profile(profile)
            preflight.check(parse_yaml(params, "params.yaml"), parse_yaml(images, "containers/images.yaml")["images"])
            write_profile(profile)
        params = preflight.checked()
        preflight.check(params, load_yaml("containers/images.yaml")["images"], tell=True)
        run_stages(params["profile"], params["estimate"]["minutes"])
        for line in summary_lines():
            print(line)


if __name__ == "__main__":
    run(main)
