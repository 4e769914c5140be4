"""What the committed runs measured, in the words of the pages: readers for tests/unit/test_doc_figures.py."""

import csv
import json
import re
from functools import cache
from statistics import fmean

from conftest import REPO

from lib.analysis.metrics import RATE
from lib.analysis.summary import summarise
from lib.claims.claims import load_claims
from lib.core.stage import read_json
from tools.pages import BLOCK

REFERENCES = REPO / "results/reference"
MIB = 2**20


@cache
def data(path):
    return read_json(REFERENCES / path)


@cache
def page(name):
    """A page's prose and hand-written tables as one line."""
    text = BLOCK.sub("", (REPO / name).read_text())
    return re.sub(r"\s+", " ", text)


@cache
def summary():
    runs = {folder.name: folder for folder in sorted(REFERENCES.glob("*/"))}
    claims = {claim.id: claim.value for claim in load_claims(REPO / "data/claims")[1]}
    return summarise(runs, claims)


def point(run, experiment, server, load):
    """A point of the serving summary: load is c=16, or "c=16 pinned" and "128/128 c=1" where there are several."""
    (found,) = [
        point
        for point in summary()["runs"][run]["experiments"][experiment]["points"]
        if (point["server"], point["load"]) == (server, load)
    ]
    return found


def rate(*where):
    return point(*where)["numbers"][RATE]["value"]


def number(value):
    return f"{value:,.0f}"


def percent(share):
    return f"{100 * share:.0f} %"


def cell(*where, share=True):
    """Tokens/s and the share of the limit as the tables print them: 216, 66 %."""
    return number(rate(*where)) + (f", {percent(point(*where)['share'])}" if share else "")


def training(variant, run="h200-weightless"):
    return data(f"{run}/finetune/{variant}/metrics.json")


def step(variant):
    return training(variant)["seconds_per_step_median"]


def speedup(run, method, variant="corrected"):
    (row,) = [row for row in data(f"{run}/speedups/speedups.json")["rows"] if row["id"] == f"{method}-{variant}"]
    return row


def times(run, method, variant="corrected"):
    """How many times plain Transformers a method makes."""
    return speedup(run, method, variant)["over_none"]["ratio"]


def batches(run, system):
    (row,) = [row for row in data(f"{run}/speedups/speedups.json")["systems"] if row["system"] == system]
    return row["tokens_per_second"]


def adapters(run, rank, count, popularity=None, variant="adapters"):
    (row,) = [
        row
        for row in data(f"{run}/multilora/vllm/multilora.json")["points"]
        if (row["rank"], row["adapters"], row["popularity"], row["variant"]) == (rank, count, popularity, variant)
    ]
    return row


H200, TP = "h200-vllm", ("h200-tensor-parallel", "tensor-parallel")
SERVED = {
    "Llama-2-7B, bf16": ("bf16", "vllm"),
    "the same in FP8": ("fp8", "vllm-fp8"),
    "the same in int4 (GPTQ, Marlin)": ("int4", "vllm"),
    "gpt-oss-20b, MXFP4": ("gpt-oss", "vllm-gpt-oss"),
}
WITH_SHARE = {"bf16": (1, 64), "fp8": (1, 64), "int4": (1, 64), "gpt-oss": (1, 64, 256)}


def served_row(name, users, last):
    """A row of the table of served points; cells beyond the experiment's loads are empty."""
    experiment, server = SERVED[name]
    cells = [
        cell(H200, experiment, server, f"c={n}", share=n in WITH_SHARE[experiment]) if n <= last else "" for n in users
    ]
    return re.sub(r"\s+", " ", f"| {name} | {' | '.join(cells)} |")


def gptq(server, experiment="gptq-fast", run="h100-gptq"):
    return rate(run, experiment, server, "c=16")


def newer(server):
    return gptq(server, "gptq-newer", "h100-gptq-newer")


def explained():
    """The shares of the gap from the published 813.81 to vLLM 0.25.0, change by change."""
    steps = [813.81, gptq("vllm-gptq-act"), gptq("vllm-gptq"), gptq("vllm-auto"), gptq("vllm-auto", "gptq"),
             newer("vllm-auto")]  # fmt: skip
    return [100 * (after - before) / (steps[-1] - steps[0]) for before, after in zip(steps, steps[1:], strict=False)]


def of_gpus(server, load):
    """322: 1.47x (73 %)."""
    gpus, alone, value = int(server[-1]), rate(*TP, "vllm", load), rate(*TP, server, load)
    return f"{number(value)}: {value / alone:.2f}x ({percent(value / alone / gpus)})"


def rank_cell(run, rank, *which):
    value = adapters(run, rank, *which)[RATE]
    return f"{number(value)} ({percent(value / adapters(run, None, 0, None, 'none')[RATE])})"


RANKS = (("h200-studies-100", 8), ("h200-published", 16), ("h200-published", 32), ("h200-studies-100", 64))


def rank_row(name, *which):
    return f"| {name} | {' | '.join(rank_cell(run, rank, *which) for run, rank in RANKS)} |"


def limits(run):
    return data(f"{run}/limits/limits.json")


COLUMNS = ("h200-published", "published"), ("h200-speedups-100", "corrected"), ("h200-studies-100", "corrected")


def method_row(name, method):
    """A row of the table of speed-ups: three columns, empty where not measured."""
    rows = [speedup(run, method, variant) for run, variant in COLUMNS]
    cells = [
        "" if not row.get("tokens_per_second") else number(row["tokens_per_second"])
        + ("" if method == "none" else f", {row['over_none']['ratio']:.2f}x")
        for row in rows
    ]  # fmt: skip
    return re.sub(r"\s+", " ", f"| {name} | {' | '.join(cells)} |")


def allocated_after_loading(variant):
    phases = training(variant)["memory"]["phases"]
    return max(phase["torch_allocated_peak_mib"] for name, phase in phases.items() if name != "load")


def vram(variant):
    return data("h200-weightless/vram/vram.json")["finetune"]["variants"][variant]


def search_cpu(server, users=1):
    run = "embedded-2-cores-search", "search-cpu"
    return rate(*run, server, f"c={users}") / rate(*run, "vllm", f"c={users}")


def searched(server, users=1):
    return rate("h200-search", "search", server, f"c={users}")


def guesses_right():
    points = [p for server in ("vllm-ngram", "vllm-compiled-ngram")
              for p in bench("embedded-2-cores-search", "search-cpu", server)]  # fmt: skip
    return "{:.0f} to {:.0f} % of the guesses are right".format(
        *(100 * f(p["guessed_right"] for p in points) for f in (min, max))
    )


def batch(size):
    return rate("embedded-2-cores-sweeps", "batch", f"vllm-batch-{size}", "c=16")


def context(size):
    return rate("embedded-2-cores-sweeps", "context", f"vllm-context-{size}", "c=16")


def walk(variant):
    return rate("embedded-2-cores", "walk", "vllm", f"c=16 {variant}")


def streamed():
    return data("h200-studies-100/streaming/vllm/streaming.json")["vllm"]


def of_cores(method):
    run = training(method, "embedded-persona")
    return run["tokens_per_second_median"] * run["flops_per_token"] / limits("embedded-persona")["flops_per_second"]


def note(run):
    return json.loads((REFERENCES / run / "run.json").read_text())["note"]


def bench(run, experiment, server):
    return data(f"{run}/bench/{experiment}/{server}/points.json")["points"]


def repeats(run, experiment, server):
    """1,213 and 1,294 of the first point, or 1,228 to 1,272, three."""
    rates = sorted(repeat[RATE] for repeat in bench(run, experiment, server)[0]["repeats"])
    ends = number(rates[0]), number(rates[-1])
    return " and ".join(ends) if len(rates) == 2 else f"{ends[0]} to {ends[1]}, three"


def token_error(*experiments):
    """The least and the most that genai-perf's token count was off, in per cent."""
    errors = [
        100 * abs(end)
        for run, experiment in experiments
        for end in summary()["runs"][run]["experiments"][experiment]["client_token_error"]
    ]
    return min(errors), max(errors)


def memory_errors(part, of_variant):
    """How far predictions are from the measured memory, in per cent, of the variants that are asked for."""
    keys = {"allocated": ("peak_allocated_bytes", "torch_allocated_peak_mib"),
            "process": ("process_bytes", "process_peak_mib")}  # fmt: skip
    predicted, measured = keys[part]
    names = [name for name in data("h200-weightless/vram/vram.json")["finetune"]["variants"] if of_variant(name)]
    known = [name for name in names if (REFERENCES / f"h200-weightless/finetune/{name}/metrics.json").exists()]
    return [100 * (vram(name)[predicted] / MIB / training(name)["memory"][measured] - 1) for name in known]


def client_errors():
    """Milliseconds by which each client reports a first token too late, at 16 streams against the mock."""
    runs = [row for row in data("h200-search/client_accuracy/client_accuracy.json")["mock"] if row["valid"]]
    return [
        fmean(row["error"]["ttft_ms_avg"] for row in runs if (row["client"], row["concurrency"]) == (client, 16))
        for client in ("genai-perf", "vllm bench serve", "AIPerf")
    ]


def steps(variant):
    path = REFERENCES / f"h200-weightless/finetune/{variant}/steps.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reported(users):
    """{client: [first token, time a token, latency, tokens/s]} that each client says of the same vLLM."""
    keys = "ttft_ms_avg", "tpot_ms_avg", "request_latency_ms_avg", RATE
    runs = [row for row in data("h200-search/client_accuracy/client_accuracy.json")["server"] if row["valid"]]
    return {
        client: [
            fmean(row["said"][key] for row in runs if (row["client"], row["concurrency"]) == (client, users))
            for key in keys
        ]
        for client in ("genai-perf", "vllm bench serve", "AIPerf")
    }


def streaming_table(users):
    """{row: mean} of the writeup's genai-perf table for one user or two."""
    prefix = f"stream-c{users}-"
    return {claim.removeprefix(prefix): value for claim, value in printed().items() if claim.startswith(prefix)}


def seed_spread(step_number):
    losses = [
        float(row["eval_loss"])
        for variant in ("lora-tuned", "lora-tuned-seed-43", "lora-tuned-seed-44")
        for row in steps(variant)
        if row["step"] == str(step_number)
    ]
    return max(losses) - min(losses)


def printed():
    """{claim: value} of everything that the writeups print."""
    return {claim.id: claim.value for claim in load_claims(REPO / "data/claims")[1]}


EMBEDDED = (("embedded-2-cores", "base"), ("embedded-2-cores", "lora"), ("embedded-persona", "base"))
RANDOM = (("h200-lengths", "lengths"), ("h200-search", "search"), ("h200-walk-adapters", "walk"))
