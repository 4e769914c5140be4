"""
The processes of stages/speedups.py, one after the other: their input, progress and results.

in:   the parameters of speedups
out:  .work/<profile>/speedups-<fingerprint>/NAME.task, NAME.json, NAME.answers, NAME.log
"""

import sys
import time
from dataclasses import dataclass

from lib.core.stage import UserError, read_json, write_json
from lib.serving.process import run_client
from lib.speedups.methods import PUBLISHED

TOLD_EVERY = 15  # seconds between two lines of progress


@dataclass
class Task:
    """A process to run: its name, module, image, parameters, and the number of lines of its finished .answers."""

    name: str
    module: str
    image: str
    words: dict
    lines: int


def tasks(p, images):
    """Every task of the parameters, those of one environment together."""
    listed = []
    for variant in p.variants:
        for method in p.methods:
            if variant == "published" and method not in PUBLISHED:
                continue
            words = p.method_task(method, variant)
            image = images["vllm" if method == "vllm" else "pytorch"]
            lines = words["warmup"] + p.answers
            listed.append(Task(f"{method}-{variant}", "stages.workers.generate_one", image, words, lines))
    for system in p.batch_systems:
        image = images["vllm" if system == "vllm" else p.batch_environment]
        listed.append(
            Task(f"batch-{system}", "stages.workers.generate_batches", image, p.batch_task(system), p.batch_repeats)
        )
    return listed


class Progress:
    """Tells now and then how far the process is that runs, and about when all are done."""

    def __init__(self, names):
        self.names, self.done, self.begun, self.told = names, 0, time.monotonic(), time.monotonic()
        self.lines, self.file = 1, None

    def start(self, task, file):
        self.name, self.lines, self.file = task.name, task.lines, file
        print(f"speedups: {self.done + 1} of {len(self.names)}, {task.name} in {task.image}", flush=True)

    def look(self, _):
        """Called by run_client while the process runs."""
        if time.monotonic() - self.told < TOLD_EVERY:
            return
        self.told = time.monotonic()
        answered = len(self.file.read_text().splitlines()) if self.file.exists() else 0
        part = self.done + answered / self.lines
        left = (self.told - self.begun) / part * (len(self.names) - part) if part else None
        about = f"about {left:.0f} s left in all" if left is not None else "time left not known yet"
        print(f"speedups: {self.name}, {answered} of {self.lines} answers; {about}", flush=True)


def run_tasks(p, todo, work):
    """({name: result} of every task that ran, {name: why} of every one that failed); those whose result is there
    already are not run again, and one that fails does not keep the others from being measured."""
    pending = [task for task in todo if not (work / f"{task.name}.json").exists()]
    if kept := len(todo) - len(pending):
        print(f"speedups: {kept} of {len(todo)} are there from a run that was cut off", flush=True)
    progress, failed = Progress([task.name for task in pending]), {}
    for task in pending:
        given, out, log = (work / f"{task.name}.{end}" for end in ("task", "json", "log"))
        write_json(given, task.words)
        log.unlink(missing_ok=True)
        command = ["containers/run", task.image, "python3", "-m", task.module, str(given), str(out)]
        progress.start(task, out.with_suffix(".answers"))
        try:
            run_client(task.name, command, log, None, p.run_seconds, "speedups.run_seconds", progress)
        except UserError as error:
            print(f"speedups: {error}", file=sys.stderr, flush=True)
            # A method that took too long has said nothing of that; one that failed says why.
            failed[task.name] = f"{str(error).partition('; its output')[0]}: {last_line(log)}"
        progress.done += 1
    return {task.name: read_json(work / f"{task.name}.json") for task in todo if task.name not in failed}, failed


def last_line(log):
    """The last line of a program's output; for a Python program that failed, its error."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
