"""
The runs that claims are judged by, this checkout's and the published ones, and what their files say. Every file is
optional: a run may hold one stage only.
"""

import re
from pathlib import Path

from lib.core.stage import read_json

OWN_RUN = "this checkout"
# Folders that come from references alone: they make no run.
RENDERED = ("bench_vllm_vs_trtllm", "claims", "estimate", "report", "serving_summary")


def runs(own):
    """{name: folder}: this checkout's run where a stage has left anything, and every reference run."""
    mine = {OWN_RUN: own} if any(p.name not in RENDERED for p in own.glob("*/")) else {}
    return mine | {folder.name: folder for folder in sorted(Path("results/reference").glob("*/"))}


def optional(path):
    """A result file, or {} if it is missing; UserError names a file that is cut short."""
    return read_json(path) if path.exists() else {}


def lookup(data, key):
    """The value at `memory.peak`, at `points[concurrency=16,variant=corrected].itl_ms_p50` or, whichever of two names
    is there, at `proof.float32|batch-invariant.requests`; None where there is none.

    Raises ValueError with the reasons when the way leads through a point that is marked invalid.
    """
    for name, where in re.findall(r"([^.\[\]]+)(?:\[([^\]]+)\])?", key):
        data = next((data[key] for key in name.split("|") if key in data), None) if isinstance(data, dict) else None
        if where:
            wanted = [condition.split("=") for condition in where.split(",")]
            matching = (entry for entry in data or [] if all(str(entry.get(key)) == value for key, value in wanted))
            data = next(matching, None)
        if isinstance(data, dict) and data.get("valid") is False:
            raise ValueError("; ".join(data.get("invalid_reasons") or ["no reason given"]))
    return data


def facts_of(data):
    """The facts in a result file: its plain values, those of its sections, and the GPUs it ran on."""
    flat = {key: value for part in data.values() if isinstance(part, dict) for key, value in part.items()} | data
    facts = {key: value for key, value in flat.items() if isinstance(value, str | int | float)}
    if "name" in flat:
        facts["model"] = flat["name"]
    if "model" in facts:
        facts.setdefault("shape", facts["model"])  # a model from a hub names its shape: ...-Llama-2-7b-instruct
    if gpus := data.get("gpus", data.get("made_by", {}).get("gpus")):
        facts["gpu"] = [gpu["name"] for gpu in gpus]
    return facts


def run_facts(folder):
    """The facts of a whole run, out of its machine and its base model."""
    return {"gpu": "none"} | facts_of(optional(folder / "base_model/metrics.json")) | facts_of(
        optional(folder / "machine/machine.json")
    )  # fmt: skip


def variants(folder):
    """The endings of a run's fine-tuning folders: first "" for lora and qlora, "-published" for lora-published."""
    ranks = {path.name.partition("lora")[2] for path in folder.glob("finetune/*lora*/")} | {""}
    return sorted(ranks, key=lambda variant: (variant not in ("", "-published"), variant))


def as_list(value):
    return value if isinstance(value, list) else [value]


def matches(want, have):
    """Text matches where it is contained, whatever the case: "H100" is met by "NVIDIA H100 80GB HBM3"."""
    return want.lower() in str(have).lower() if isinstance(want, str) else want == have
