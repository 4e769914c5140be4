"""
The writeup's served points beside what was measured and what is estimated on an H100 for the same shape: for the first
page (lib/report/findings.py) and the chapters on serving and on estimates.
"""

from lib.analysis.metrics import RATE
from lib.report import plots
from lib.report.result_files import found_in

USERS = 16
# vLLM on our H100: label, run, experiment, server.
GPTQ = (
    ("the same command, measured here", "h100-gptq", "gptq-fast", "vllm-gptq-act"),
    ("without --quantization gptq", "h100-gptq", "gptq-fast", "vllm-auto"),
    ("and in vLLM 0.25.0", "h100-gptq-newer", "gptq-newer", "vllm-auto"),
)
# Entries of data/estimates.yaml in words; a bound is the range of a format that has no kernels.
ESTIMATED = {"trtllm-bf16": "TensorRT-LLM bf16, estimated", "trtllm-int4": "TensorRT-LLM int4, estimated range"}


def read_estimates(ledger):
    """The first run's estimates; None where no run has any."""
    return next((data for _, data in found_in(ledger, "estimate/estimates.json")), None)


def published(summary):
    """{"Triton" | "vLLM": {users: tokens/s}} as the writeup prints them."""
    rates = {"Triton": {}, "vLLM": {}}
    for point in summary["published"]["points"]:
        if point["numbers"][0]:
            rates["Triton" if point["server"].startswith("Triton") else "vLLM"][point["concurrency"]] = point[
                "numbers"
            ][0]
    return rates


def measured(summary):
    """{label: {value, low, high}} of vLLM's tokens/s on our H100, in the order of GPTQ; without what is missing."""
    return {label: number for label, *where in GPTQ if (number := number_of(summary, *where))}


def number_of(summary, run, experiment, server):
    """{value, low, high} of output tokens/s of the one valid point of a server; None where there is none."""
    points = summary["runs"].get(run, {"experiments": {}})["experiments"].get(experiment, {"points": []})["points"]
    return next((point["numbers"][RATE] for point in points if point["server"] == server and point["valid"]), None)


def curve(data, name):
    """The banded points of one entry of data/estimates.yaml."""
    return [
        {"concurrency": point["concurrency"], "tokens_per_second": point[RATE], **point["band"][RATE]}
        for point in data["points"]
        if point["id"].rpartition("-c")[0] == name and RATE in point["band"]
    ]


def estimate_at(data, users=USERS, name="trtllm-bf16"):
    """The banded point of one entry for a number of users; None without estimates."""
    return next((point for point in curve(data, name) if point["concurrency"] == users), None) if data else None


def figure(data, summary):
    """Published and measured points (filled) and the estimates (hollow, with their band) in one figure."""
    series = [
        {"label": words, "kind": "estimated", "points": curve(data, name)} for name, words in ESTIMATED.items()
    ] + [
        {"label": f"{who}, published", "kind": "published", "points": list(map(as_point, of.items()))}
        for who, of in published(summary).items()
    ]
    points = [as_point((USERS, number["value"])) for number in measured(summary).values()]
    series.append({"label": "vLLM, measured here", "kind": "measured", "points": points})
    caption = (
        "Output tokens/s on an H100, Llama-2-7B shape, 512 tokens in, 256 out. Hollow: estimated for TensorRT-LLM, not "
        "measured; the shaded band is the estimate's calibrated error, for int4 a range. Filled: the writeup's points "
        "in 4 bits, and vLLM measured here with and without its flag and in version 0.25.0 (finding 3)."
    )
    return (
        "figure",
        "estimates",
        plots.estimates("estimates", [entry for entry in series if entry["points"]]),
        caption,
    )


def as_point(pair):
    return {"concurrency": pair[0], "tokens_per_second": pair[1]}
