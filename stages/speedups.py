"""
Five ways to speed up a local model, held against doing nothing, and Transformers against vLLM on a list of prompts:
python -m stages.speedups pytorch=IMAGE vllm=IMAGE

One process a method and variant (stages/workers/generate_one.py) and one a system (stages/workers/generate_batches.py),
one after the other, each in its environment. A run that was killed resumes with the next.

in:   results/<profile>/machine/machine.json, limits/limits.json, base_model, dataset (prompts and answer lengths)
out:  results/<profile>/speedups/speedups.json   rows: a method in a variant; systems: many prompts at once
      results/<profile>/speedups/raw             every answer of every row, and what the processes printed
"""

import dataclasses
import os
import shutil
import sys
import time
from dataclasses import dataclass

from lib.analysis.roofline import rates
from lib.core.graph import dependencies
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, fingerprint, read_json, read_params, results, run
from lib.core.work import work_dir
from lib.model.shapes import INDEX, shape_file
from lib.serving.process import run_client
from lib.serving.servers import OURS, Inputs
from lib.speedups.methods import METHODS, SYSTEMS
from lib.speedups.rows import not_run, published_seconds, rows, systems
from lib.speedups.tasks import run_tasks, tasks

VARIANTS = ("published", "corrected")


@dataclass
class Speedups:
    model: str
    methods: list
    variants: list
    prompt: str
    answers: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    warmup: int
    lookup_tokens: int
    batch_systems: list
    batch_environment: str
    batch_prompts: int
    batch_size: int
    batch_repeats: int
    vllm_enforce_eager: bool
    vllm_kv_cache_mib: int
    max_model_len: int
    seed: int
    run_seconds: int

    def __post_init__(self):
        known = (("methods", METHODS), ("variants", VARIANTS), ("batch_systems", SYSTEMS))
        for key, names in known:
            if unknown := [name for name in getattr(self, key) if name not in names]:
                raise UserError(f"params.yaml: speedups.{key} has {unknown[0]!r}; use {', '.join(names)}")
        if self.batch_environment not in ("pytorch", "vllm"):
            raise UserError(f"params.yaml: speedups.batch_environment is {self.batch_environment!r}; use pytorch, vllm")
        ones = ("answers", "max_new_tokens", "lookup_tokens", "batch_prompts", "batch_size", "batch_repeats",
                "max_model_len", "run_seconds")  # fmt: skip
        zeros = ("top_k", "warmup", "vllm_kv_cache_mib", "seed")
        check_bounds("speedups", self, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
        for key in ("temperature", "repetition_penalty"):
            if getattr(self, key) <= 0:
                raise UserError(f"params.yaml: speedups.{key} is {getattr(self, key)}; use a number above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"params.yaml: speedups.top_p is {self.top_p}; use a share above 0, at most 1")

    def common(self):
        """The settings that every task holds."""
        model = str(inputs().served_model(self.model))
        return {
            "model": model,
            # The ids of the base model's tokenizer are ids of a random shape too, where that has no real one.
            "tokenizer": str(results("base_model") / "model"),
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "vllm_enforce_eager": self.vllm_enforce_eager,
            "vllm_kv_cache_mib": self.vllm_kv_cache_mib,
        }

    def method_task(self, method, variant):
        sampling = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
        return self.common() | {
            "method": method,
            "variant": variant,
            "prompt": self.prompt,
            "answers": self.answers,
            "max_new_tokens": self.max_new_tokens,
            "sampling": sampling,
            "lookup_tokens": self.lookup_tokens,
            "warmup": self.warmup if variant == "corrected" else 0,
        }

    def batch_task(self, system):
        return self.common() | {
            "system": system,
            "rows": str(results("dataset") / "corrected" / "validation.jsonl"),
            "batch_prompts": self.batch_prompts,
            "batch_size": self.batch_size,
            "batch_repeats": self.batch_repeats,
        }


def inputs():
    return Inputs(results("base_model"))


def given_images():
    """{role: image} of the command line."""
    images = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if images.keys() != {"pytorch", "vllm"}:
        raise UserError("usage: python -m stages.speedups pytorch=IMAGE vllm=IMAGE")
    return images


def make_weights(p, images, work):
    """The random weights of a shape, made once; nothing for the base model."""
    folder = inputs().served_model(p.model)
    if p.model in OURS or (folder / INDEX).exists():
        return
    print(f"speedups: making random weights of {p.model}", flush=True)
    words = [*p.model.split(":"), str(folder), str(p.seed)]
    command = ["containers/run", images["pytorch"], "python3", "-m", "stages.workers.random_weights", *words]
    run_client("random_model", command, work / "random_model.log", None, p.run_seconds, "speedups.run_seconds")


def described(p, base):
    """{model, weights, shape} of what answers."""
    if p.model in OURS:
        return {"model": base["name"], "weights": base["weights"], "shape": base["shape"]}
    shape = p.model.split(":")[0]
    return {"model": f"{shape} shape", "weights": "random", "shape": shape}


def keep_raw(work, out):
    """Every answer of every process, and its log, beside the result."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "raw").mkdir(parents=True)
    for path in [*work.glob("*.json"), *work.glob("*.log")]:
        shutil.copy2(path, out / "raw")


def main():
    images, p = given_images(), read_params(Speedups)
    base = read_json(results("base_model") / "metrics.json")
    machine = read_json(results("machine") / "machine.json")
    limits = read_json(results("limits") / "limits.json")
    work = work_dir("speedups", fingerprint([dataclasses.asdict(p), images], dependencies("speedups")))
    make_weights(p, images, work)
    config = read_json(inputs().served_model(p.model) / "config.json" if p.model in OURS else shape_file(p.model))

    begun, busy = time.strftime("%Y-%m-%d %H:%M:%S"), os.getloadavg()[0]
    todo = [task for task in tasks(p, images) if not not_run(machine, task.words)]
    finished, failed = run_tasks(p, todo, work)
    listed = rows(p, machine, finished, failed, config, rates(limits))
    cache = next((entry["kv_cache"] for entry in finished.values() if entry.get("kv_cache")), None)
    out = results("speedups")
    keep_raw(work, out)
    write_metrics(
        out / "speedups.json",
        {
            "begun": begun,
            "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
            # Processes that wanted a core in the minute before: more than 0 means that others were at work.
            "load_average_before": busy,
            "machine": machine,
            **described(p, base),
            **{key: getattr(p, key) for key in ("prompt", "answers", "max_new_tokens", "warmup", "batch_size")},
            "sampling": p.method_task("none", "published")["sampling"],
            "limits": {"device": limits["device"], **rates(limits)},
            "published_seconds": published_seconds(listed),
            "vllm_kv_cache": cache,
            "rows": listed,
            "systems": systems(finished, failed),
        },
    )
    for row in listed:
        outcome = row["not_measured"] or f"{row['tokens_per_second']:.2f} tokens/s"
        print(f"speedups: {row['id']}: {outcome}")
    print(f"speedups: {out / 'speedups.json'}")
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} failed: {', '.join(failed)}; see {out / 'raw'}/*.log; the same "
                        "command tries these again and keeps the others")  # fmt: skip
    shutil.rmtree(work)  # a run that is asked for again measures again


if __name__ == "__main__":
    run(main)
