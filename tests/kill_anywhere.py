"""
kill -9 at random moments of the smallest whole run:
containers/run venv:tools python tests/kill_anywhere.py FOLDER [KILLS]

A series of `make reproduce` in a copy of this tree in FOLDER, in a network of its own where the machine allows one.
After 2 to 50 seconds SIGKILL ends the whole process group, DVC alone, a stage, a server or a client, whichever of them
run then. Four checks follow each kill:

  nothing_left   15 seconds later no process works in the copy
  resumes        the same command goes on by itself
  points_kept    every finished point of the benchmark is still there, unchanged, when the next kill comes
  same_files     the run that completes leaves the files of one that nobody disturbed

A completed run is removed and starts anew. The same FOLDER continues a series that was stopped: FOLDER/kills.json is
its state, FOLDER/summary.json what is published (results/reference/kills.json). About an hour for 50, on 2 cores; not
part of `make test`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "support")]

from conftest import OWN_NETWORK, copy_tree, run_in, set_params, variables  # noqa: E402
from smallest import SMALLEST  # noqa: E402

from lib.bench.validity import never_valid  # noqa: E402
from lib.core.provenance import made_by  # noqa: E402
from lib.core.stage import read_json, write_json  # noqa: E402
from stages.machine import cpu_name  # noqa: E402

KINDS = ("group", "dvc", "stage", "server", "client")
# Words of the command lines of each kind; the group is make's own.
WORDS = {"dvc": ["tools.reproduce"], "stage": ["-m stages."], "server": ["bin/tritonserver", "api_server"],
         "client": ["bin/genai-perf"]}  # fmt: skip
RARE = {"server": 2, "client": 4}  # how much rather these are chosen where they run, which is seldom
PAUSE = (2, 50)  # seconds of a run before it is killed
LEFT_SECONDS = 15
CHECKS = ("nothing_left", "resumes", "points_kept", "same_files")
# One experiment with both servers and two points each; a checkpoint a step.
SHORTER = {
    "bench": {"experiments": {"lora": "lora"}, "concurrency": [1, 2]},
    "dataset": {"validation_rows": 1},
    "finetune": {"eval_steps": 1},
    "style": {"prompts": 1, "bootstrap_samples": 100},
    "vram": {"shapes": []},
}


class Series:
    """The copy of the tree, its running `make reproduce`, and what each kill showed."""

    def __init__(self, folder):
        self.folder, self.tree, self.log = folder, folder / "tree", folder / "reproduce.log"
        self.record, self.run, self.begun = folder / "kills.json", None, 0.0
        self.state = read_json(self.record) if self.record.exists() else {"files": None, "kills": []}
        if not self.tree.exists():
            self.make_tree()

    def make_tree(self):
        copy_tree(self.tree)
        sections = SMALLEST.keys() | SHORTER.keys()
        set_params(self.tree, **{name: SMALLEST.get(name, {}) | SHORTER.get(name, {}) for name in sections})
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
            run_in(self.tree, *git, *words, check=True)

    def start(self):
        """`make reproduce` in a process group of its own."""
        with self.log.open("ab") as sink:
            self.run = subprocess.Popen(
                [*OWN_NETWORK, "make", "reproduce"],
                cwd=self.tree,
                env=variables(),
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.begun = time.monotonic()

    def processes(self):
        """{pid: command line} of all that work in the copy."""
        found = {}
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                is_ours = str(self.tree) in words or process.cwd().startswith(str(self.tree))
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = words
            except (psutil.Error, OSError):
                continue
        return found

    def targets(self):
        """{kind: id of a process} of the kinds that run now."""
        running = self.processes().items()
        found = {
            kind: [pid for pid, line in running if any(word in line for word in words)] for kind, words in WORDS.items()
        }
        return {"group": self.run.pid} | {kind: pids[0] for kind, pids in found.items() if pids}

    def kill(self, chance):
        """Kill one of the kinds that run now; what was killed and when, None where it was gone by then."""
        running = sorted(word for words in self.processes().values() for word in words.split() if "stages." in word)
        targets = self.targets()
        (kind,) = chance.choices(list(targets), [RARE.get(kind, 1) for kind in targets])
        seconds = round(time.monotonic() - self.begun, 1)
        try:
            (os.killpg if kind == "group" else os.kill)(targets[kind], signal.SIGKILL)
        except ProcessLookupError:
            return None
        return {"kind": kind, "seconds": seconds, "stage": running[0] if running else None}

    def points(self):
        """{name: data} of the finished points of the sweep that goes on; one that its validity checks refused, on a
        busy machine for instance, is measured again."""
        points = {path.name: read_json(path) for path in self.tree.glob(".work/embedded/bench-*/points/*.json")}
        return {name: point for name, point in points.items() if point["valid"] or never_valid(point["checks"])}

    def published(self):
        """Names of the points in the results, which are complete."""
        return {"*"} if list(self.tree.glob("results/embedded/bench/lora/*/points.json")) else set()

    def files(self):
        results = self.tree / "results" / "embedded"
        return sorted(str(path.relative_to(results)) for path in results.rglob("*") if path.is_file())

    def reset(self):
        """Remove the results, so that the next run is a whole one."""
        for name in ("results/embedded", ".work", ".dvc/cache", ".dvc/tmp"):
            shutil.rmtree(self.tree / name, ignore_errors=True)
        run_in(self.tree, "git", "checkout", "--quiet", "--", "dvc.lock", check=True)

    def last_error(self):
        lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])

    def note(self, check, is_good, why=""):
        """Add a check to the last kill; an earlier failure stays."""
        if self.state["kills"]:
            last = self.state["kills"][-1]
            last[check] = last.get(check, True) and is_good
            if not is_good:
                last.setdefault("why", []).append(f"{check}: {why}")
        write_json(self.record, self.state)


def kill_at_a_moment(series, chance):
    """Kill after a random pause; what was killed and when, None where the run ended before."""
    pause = chance.uniform(*PAUSE)
    while series.run.poll() is None:
        if time.monotonic() - series.begun > pause and (kill := series.kill(chance)):
            return kill
        time.sleep(0.05)
    return None


def end_run(series):
    """Judge a run that ended by itself, and remove it."""
    if series.run.returncode:
        series.note("resumes", False, series.last_error())
        series.reset()
        return
    files = series.files()
    if series.state["files"] is None:
        series.state["files"] = files
    series.note("resumes", True)
    different = sorted(set(files) ^ set(series.state["files"]))
    series.note("same_files", not different, ", ".join(different[:5]))
    series.reset()


def check_points(series, before):
    """Points that were finished before the last kill are there unchanged, or their experiment is whole."""
    after = series.points()
    lost = [name for name, point in before.items() if after.get(name) != point] if not series.published() else []
    series.note("points_kept", not lost, ", ".join(lost))


def kill_once(series, chance):
    """Run until a process is killed; False where the run ended before."""
    before = series.points()
    series.start()
    kill = kill_at_a_moment(series, chance)
    killed = time.monotonic()
    if series.state["kills"]:
        check_points(series, before)
    if kill is None:
        end_run(series)
        return False
    series.note("resumes", True)
    series.state["kills"].append(kill | {"points": len(series.points())})
    while series.processes() and time.monotonic() - killed < LEFT_SECONDS:
        series.run.poll()
        time.sleep(0.1)
    left = series.processes()
    series.run.poll()
    series.state["kills"][-1]["ended_after_seconds"] = round(time.monotonic() - killed, 1)
    series.note("nothing_left", not left, "; ".join(words[:100] for words in left.values()))
    for orphan in left:
        os.kill(orphan, signal.SIGKILL)
    return True


def is_good(kill):
    return all(kill.get(check, True) for check in CHECKS)


def summarise(kills):
    """What is published: how many of how many, by kind and by check; the last kill counts once the next run began."""
    kills = [kill for kill in kills if "resumes" in kill]
    by_kind = {kind: [kill for kill in kills if kill["kind"] == kind] for kind in KINDS}
    return {
        "made_by": made_by(),
        "machine": {"cpu": cpu_name(Path("/proc/cpuinfo").read_text()), "cores": len(os.sched_getaffinity(0))},
        "kills": len(kills),
        "good": sum(map(is_good, kills)),
        "by_kind": {kind: f"{sum(map(is_good, each))} of {len(each)}" for kind, each in by_kind.items()},
        "failed_checks": dict(Counter(check for kill in kills for check in CHECKS if not kill.get(check, True))),
        "ended_after_seconds_max": max((kill["ended_after_seconds"] for kill in kills), default=None),
        "completed_runs": sum("same_files" in kill for kill in kills),
        "each": kills,
    }


def main():
    folder, wanted = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 50
    folder.mkdir(parents=True, exist_ok=True)
    series = Series(folder)
    chance = random.Random(len(series.state["kills"]))
    if series.state["files"] is None:
        series.start()  # one that nobody disturbs
        if series.run.wait():
            sys.exit(f"error: the undisturbed run failed: {series.last_error()}; see {series.log}")
        print(f"the undisturbed run took {time.monotonic() - series.begun:.0f} s", flush=True)
        end_run(series)
    kills, done = series.state["kills"], len(series.state["kills"])
    while len(kills) < done + wanted:
        if kill_once(series, chance):
            print(kills[-1], flush=True)
            write_json(folder / "summary.json", summarise(kills))
    # The last kill's run is completed.
    before = series.points()
    series.start()
    series.run.wait()
    check_points(series, before)
    end_run(series)
    write_json(folder / "summary.json", summarise(kills))
    print(f"{sum(map(is_good, kills))} of {len(kills)} kills passed all checks; {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
