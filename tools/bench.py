"""
Measure one experiment, whether the profile runs it or not: python -m tools.bench NAME

An experiment that the profile does not run is added to params.yaml (bench.experiments): what runs is what stands there.
A sweep that was cut short resumes; a whole one is measured again when what it depends on has changed.
"""

import os
import sys

from lib.analysis.machine_limit import tensor_parallel_gpus
from lib.bench.experiments import Bench, adapters_of, check_lengths, seconds_of, with_experiment
from lib.core.gpu import gpus
from lib.core.stage import UserError, read_params, results, run
from lib.serving.servers import OURS
from tools.checkout import only_run
from tools.profile import PARAMS, set_values
from tools.repro import reproduce


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
                f"experiments.yaml: bench.definitions.{name}.servers has {server}, which wants {wanted} GPUs; there "
                f"are {there}: leave it out"
            )


def add_experiment(p, name):
    """Name the experiment in params.yaml, so that it is a stage of the graph."""
    if name not in p.experiments:
        experiments = {**p.experiments, name: adapters_of(p, name)}
        PARAMS.write_text(set_values(PARAMS.read_text(), {("bench", "experiments"): experiments}))
        print(f"params.yaml: bench.experiments has {name} now; take it out to leave it out of `make reproduce`")


def main():
    p = read_params(Bench)
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if not name:
        raise UserError(f"EXPERIMENT is missing; use one of {', '.join(p.definitions)}")
    asked = with_experiment(p, name)
    check_lengths(asked, name)
    check_gpus(name, asked)
    seconds_of(os.environ.get("BUDGET"))
    with only_run(f"make bench EXPERIMENT={name}"):
        add_experiment(p, name)
        reproduce([f"bench@{name}"])
    print(f"results: {results('bench') / name}; `make report` shows them")


if __name__ == "__main__":
    run(main)
