"""
Measure one experiment, whether the profile runs it or not: python -m tools.bench NAME

What BUDGET ended, or what stood as not asked for, is gone on with. A whole experiment is measured again when what it
depends on has changed, as DVC has it.
"""

import os
import subprocess
import sys

from lib.analysis.machine_limit import tensor_parallel_gpus
from lib.bench.experiments import ASKED_FOR, Bench, check_lengths, unfinished, with_experiment
from lib.core.gpu import gpus
from lib.core.stage import UserError, read_params, results, run
from lib.serving.servers import OURS


def repro(name, *options):
    """`dvc repro` of the experiment's stage; ends with its exit code where that is none of success."""
    command = [sys.executable, "-m", "dvc", "repro", *options, f"bench@{name}"]
    done = subprocess.run(command, env=os.environ | {ASKED_FOR: name})
    if done.returncode:
        sys.exit(done.returncode)


def written(folder):
    """When each points.json of an experiment was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/points.json")}


def check_gpus(name, asked):
    """UserError where a server of the experiment wants more GPUs than there are."""
    if asked.model in OURS:
        return
    there = len(gpus())
    if not there:
        raise UserError(f"EXPERIMENT is {name}, which serves {asked.model}; nvidia-smi finds no GPU for that")
    for server in asked.servers:
        if (wanted := tensor_parallel_gpus(asked.options(server))) > there:
            raise UserError(
                f"params.yaml: bench.definitions.{name}.servers has {server}, which wants {wanted} GPUs; there are "
                f"{there}: leave it out"
            )


def main():
    p = read_params(Bench)
    if len(sys.argv) != 2:
        raise UserError(f"EXPERIMENT is missing; use one of {', '.join(p.definitions)}")
    name = sys.argv[1]
    asked = with_experiment(p, name)
    check_lengths(asked, name)
    check_gpus(name, asked)
    folder = results("bench") / name
    before = written(folder)
    repro(name)
    # DVC takes what is not finished for done, since nothing has changed.
    if unfinished(folder) and written(folder) == before:
        repro(name, "--single-item", "--force")
    print(f"results: {folder}; `make report` shows them")


if __name__ == "__main__":
    run(main)
