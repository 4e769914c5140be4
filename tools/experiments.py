"""
Every experiment of the benchmark with what it measures, what it takes, and what runs it: python -m tools.experiments

Minutes: the starts and the measurements. Both take what this checkout measured, where an experiment has run here; else
what COSTS has for a GPU and for CPUs.
"""

from dataclasses import dataclass
from math import ceil

from tabulate import tabulate

from lib.bench.experiments import Bench, Clock, visits, with_experiment
from lib.core.gpu import gpus
from lib.core.stage import load_yaml, read_params, run, work_folder
from lib.serving.servers import OURS

HEADER = ("experiment", "points", "repeats", "starts", "minutes", "run it with", "model", "servers")


@dataclass(frozen=True)
class Cost:
    """Seconds of a server's start, of the client's, of a token, and what each user adds to that; prompt tokens read a
    second."""

    start: float
    client: float
    token: float
    user: float
    read: float


# vLLM on one H200 and on two CPU cores. Of 111 loads in results/reference these give 0.45 to 2 times what each took,
# in the median 1.05 times on CPUs and 1.09 on the GPU.
COSTS = {"gpu": Cost(120, 10, 0.005, 0.00004, 40_000), "cpu": Cost(60, 10, 0.04, 0.002, 700)}


def point_seconds(p, point, cost):
    """About how long one measurement takes, the client's start and the warm-up included: each stream's requests are
    answered one after the other."""
    p, users = p.with_variant(point.variant), point.concurrency
    rounds = ceil(p.requests(users) / users) + p.warmup_requests
    prompts = p.requests(users) + p.warmup(users)
    answers = rounds * point.output_tokens * (cost.token + cost.user * users)
    return cost.client + answers + prompts * point.input_tokens / cost.read


def row(p, name, kind):
    """The cells of one experiment on a machine of this kind, gpu or cpu."""
    asked = with_experiment(p, name)
    asked.servers = [server for server in asked.servers if server.partition("-")[0] in p.servers]
    plan = list(visits(asked))
    here = Clock(work_folder(f"bench-{name}.seconds.json")).left(plan)
    runs_here = kind == "gpu" or asked.model in OURS
    cost = COSTS[kind if runs_here else "gpu"]
    measuring = sum(point_seconds(asked, point, cost) for _, group in plan for point in group)
    seconds = here if here is not None else len(plan) * cost.start + measuring
    minutes = f"{seconds / 60:.0f}{' (measured here)' if here is not None else ''}"
    command = f"make bench EXPERIMENT={name}" if runs_here else "(needs a GPU)"
    points = len(asked.servers) * len(asked.lengths) * len(asked.concurrency) * len(asked.variants)
    servers = ", ".join(asked.servers) or "none of bench.servers"
    mark = " *" if name in p.experiments else ""
    return [name + mark, str(points), str(asked.repeats), str(len(plan)), minutes, command, asked.model, servers]


def main():
    p = read_params(Bench)
    kind = "gpu" if gpus() else "cpu"
    rows = [row(p, name, kind) for name in p.definitions]
    print(f"profile {load_yaml('params.yaml')['profile']}; * runs in `make reproduce`")
    print(tabulate(rows, HEADER, tablefmt="plain", disable_numparse=True))
    print("BUDGET=30m stops it after 30 minutes; run it again to resume.")
    machine = "one H200" if kind == "gpu" else "two CPU cores (what needs a GPU: of one H200)"
    print(f"minutes: about those of {machine}, unless measured here")


if __name__ == "__main__":
    run(main)
