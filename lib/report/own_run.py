"""
The fifth finding, as blocks (lib/report/page.py): this checkout's servers beside those of the committed run of the same
model, lengths and engines.
"""

from lib.analysis.metrics import RATE, panel_title
from lib.claims.runs import OWN_RUN
from lib.report import answer_plots


def beside_published(summary):
    """This checkout's serving beside the committed run of the same model and lengths."""
    yield "Does your machine show the same?"
    mine = summary["runs"].get(OWN_RUN, {"experiments": {}})["experiments"].get("base")
    counterpart = mine and next(same_work(summary, mine), None)
    if not counterpart:
        yield ("text", "No committed run served what this checkout did." if mine else
               "Not measured yet. `make reproduce` runs the pipeline.")  # fmt: skip
    else:
        name, pairs = counterpart
        ratios = "; ".join(ratios_beside(mine, summary["runs"][name]["experiments"]["base"], name))
        yield (
            "text",
            f"Output tokens/s: {ratios}. How fast both are is the processor's. A stand-in for TensorRT-LLM ran behind "
            "Triton: neither run says anything about TensorRT-LLM.",
        )
        drawn = answer_plots.beside("answer-runs", pairs, [OWN_RUN, name], panel_title(RATE))
        yield ("figure", "answer-runs", drawn, f"This checkout's servers beside those of {name}: {heading(mine)}.")
    yield ("link", "Runs: machines, models, packages", "runs.html")


def heading(experiment):
    """Model and lengths of an experiment in words."""
    lengths = " and ".join(f"{i} tokens in, {o} out" for i, o in experiment["settings"]["lengths"])
    return f"{experiment['base_model']['name']}, {lengths}"


def engines(experiment):
    """{server: its engine, or None where it was not measured}."""
    return {server["label"]: server["engine"] for server in experiment["servers"]}


def same_work(summary, mine):
    """(run, [(server and load, this checkout's tokens/s, the run's)]) of every run of the same work and engines."""
    for name, run in summary["runs"].items():
        theirs = run["experiments"].get("base")
        if name == OWN_RUN or not theirs or (heading(theirs), engines(theirs)) != (heading(mine), engines(mine)):
            continue
        own, other = rates_by_load(mine), rates_by_load(theirs)
        if pairs := [(f"{what[0]}, {what[1]}", own[what], other[what]) for what in own if what in other]:
            yield name, pairs


def rates_by_load(experiment):
    """{(server, load): tokens/s} of the valid points."""
    return {(p["server"], p["load"]): p["numbers"][RATE]["value"] for p in experiment["points"] if p["valid"]}


def ratios_beside(mine, theirs, name):
    """A sentence for each load of both runs: one server over the other, here and in the run `name`, with verdicts."""
    here, there = ratios_by_load(mine), ratios_by_load(theirs)
    for server, other, load in sorted(here.keys() & there.keys()):
        ours, committed = here[server, other, load], there[server, other, load]
        yield (
            f"{server} / {other} at {load} is {ours['ratio']:.2f} here ({ours['verdict']}), "
            f"{committed['ratio']:.2f} in {name} ({committed['verdict']})"
        )


def ratios_by_load(experiment):
    """{(server, divided by, load): its ratio of tokens/s} of the loads that both servers have a valid point of."""
    rows = [row for row in experiment["comparisons"] if (row["numbers"] or {}).get(RATE)]
    return {(row["server"], row["divided_by"], row["load"]): row["numbers"][RATE] for row in rows}
