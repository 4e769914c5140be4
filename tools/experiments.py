"""
Every experiment of the benchmark with what it measures, what it takes, and what runs it: python -m tools.experiments

Minutes: starts x seconds of a start + points x repeats x seconds of a point. Both are what this checkout measured,
where an experiment has run here; else what stages/experiments.py has for a GPU and for CPUs, and where that is from.
"""

from stages.experiments import COST, Bench, Clock, visits, with_experiment
from stages.servers import OURS
from stages.stage import gpus, load_yaml, read_params, run, work_folder

HEADER = ("experiment", "points", "repeats", "starts", "minutes", "run it with", "model", "servers")


def row(p, name, kind):
    """The cells of one experiment on a machine of this kind, gpu or cpu."""
    asked = with_experiment(p, name)
    asked.servers = [server for server in asked.servers if server.partition("-")[0] in p.servers]
    plan = list(visits(asked))
    count = sum(len(group) for _, group in plan)
    here = Clock(work_folder(f"bench-{name}.seconds.json")).left(plan)
    start, point = COST[kind]
    seconds = here if here is not None else len(plan) * start + count * point
    minutes = f"{seconds / 60:.0f}{' (measured here)' if here is not None else ''}"
    command = f"make bench EXPERIMENT={name}" if kind == "gpu" or asked.model in OURS else "(needs a GPU)"
    points = len(asked.servers) * len(asked.lengths) * len(asked.concurrency) * len(asked.arms)
    servers = ", ".join(asked.servers) or "none of bench.servers"
    mark = " *" if name in p.experiments else ""
    return [name + mark, str(points), str(asked.repeats), str(len(plan)), minutes, command, asked.model, servers]


def table(rows):
    """The rows as text in columns."""
    widths = [max(len(cells[n]) for cells in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def main():
    p = read_params(Bench)
    kind = "gpu" if gpus() else "cpu"
    lines = table([HEADER, *(row(p, name, kind) for name in p.definitions)])
    start, point = COST[kind]
    print(f"profile {load_yaml('params.yaml')['profile']}; * runs in `make reproduce`")
    print(*lines, sep="\n")
    print("With BUDGET=30m it stops after that time, and goes on where it was the next time.")
    print(f"minutes = starts x {start} s + points x repeats x {point} s, unless measured here")


if __name__ == "__main__":
    run(main)
