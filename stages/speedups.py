"""
Five ways to speed up a local model, held against doing nothing, and Transformers against vLLM on a list of prompts:
python -m stages.speedups pytorch=IMAGE triton=IMAGE vllm=IMAGE

One process for each method and arm (stages/speedup_methods.py) and for each system (stages/batches.py), one after the
other, in the environment that has it. A run that is killed goes on with the next.

in:   results/<profile>/machine/machine.json, limits/limits.json, base_model, dataset (prompts and answer lengths)
out:  results/<profile>/speedups/speedups.json   rows: a method in an arm; systems: many prompts at once
      results/<profile>/speedups/raw             every answer of every row, and what the processes printed
"""

import dataclasses
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stages.batches import SYSTEMS
from stages.comparison import ratio
from stages.points import REPEATS_NEEDED, interval
from stages.random_model import INDEX
from stages.roofline import closed_loop, rates
from stages.servers import OURS, served_model, shape_file
from stages.serving import run_client
from stages.speedup_methods import METHODS, PUBLISHED
from stages.stage import (
    UserError,
    fingerprint,
    read_json,
    read_params,
    results,
    run,
    work_dir,
    write_json,
    write_metrics,
)

ARMS = ("published", "corrected")
# Files whose change makes a finished row another measurement.
MEASURING = ("batches.py", "memory.py", "speedup_methods.py")
TOLD_EVERY = 15  # seconds between two lines of progress


@dataclass
class Speedups:
    model: str
    methods: list
    arms: list
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
        known = (("methods", METHODS), ("arms", ARMS), ("batch_systems", SYSTEMS))
        for key, names in known:
            if unknown := [one for one in getattr(self, key) if one not in names]:
                raise UserError(f"params.yaml: speedups.{key} has {unknown[0]!r}; use {', '.join(names)}")
        if self.batch_environment not in ("pytorch", "triton"):
            raise UserError(
                f"params.yaml: speedups.batch_environment is {self.batch_environment!r}; use pytorch, triton"
            )
        for key in ("answers", "max_new_tokens", "batch_prompts", "batch_size", "batch_repeats"):
            if getattr(self, key) < 1:
                raise UserError(f"params.yaml: speedups.{key} is {getattr(self, key)}; use 1 or more")

    def common(self):
        """What every task holds."""
        model = str(served_model(self.model))
        return {
            "model": model,
            # The ids of the base model's tokenizer are ids of a random shape too, where that has no real one.
            "tokenizer": str(results("base_model") / "model"),
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "vllm_enforce_eager": self.vllm_enforce_eager,
            "vllm_kv_cache_mib": self.vllm_kv_cache_mib,
        }

    def method_task(self, method, arm):
        sampling = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
        return self.common() | {
            "method": method,
            "arm": arm,
            "prompt": self.prompt,
            "answers": self.answers,
            "max_new_tokens": self.max_new_tokens,
            "sampling": sampling,
            "lookup_tokens": self.lookup_tokens,
            "warmup": self.warmup if arm == "corrected" else 0,
        }

    def batch_task(self, system):
        return self.common() | {
            "system": system,
            "rows": str(results("dataset") / "corrected" / "validation.jsonl"),
            "batch_prompts": self.batch_prompts,
            "batch_size": self.batch_size,
            "batch_repeats": self.batch_repeats,
        }


@dataclass
class Task:
    """A process to run: what it is called, what it does, where, and how many lines its .answers file ends with."""

    name: str
    module: str
    image: str
    words: dict
    lines: int


def tasks(p, images):
    """Every task of the parameters, those of one environment together."""
    found = []
    for arm in p.arms:
        for method in p.methods:
            if arm == "published" and method not in PUBLISHED:
                continue
            words = p.method_task(method, arm)
            image = images["vllm" if method == "vllm" else "pytorch"]
            lines = words["warmup"] + p.answers
            found.append(Task(f"{method}-{arm}", "stages.speedup_methods", image, words, lines))
    for system in p.batch_systems:
        image = images["vllm" if system == "vllm" else p.batch_environment]
        found.append(Task(f"batch-{system}", "stages.batches", image, p.batch_task(system), p.batch_repeats))
    return found


def not_run(p, machine, task):
    """Why a task cannot be had on this machine; None where it can."""
    method = METHODS.get(task.words.get("method"))
    if machine["gpus"] or not method:
        return None
    if method.weights != "bf16":
        return "on a CPU bitsandbytes unpacks every weight at every step, minutes an answer: measured on a GPU only"
    if method.compile and task.words["arm"] == "corrected" and not shutil.which("g++"):
        return "torch.compile on a CPU needs the C++ compiler g++"
    return None


class Progress:
    """Tells now and then how far the process is that runs, and about when all are done."""

    def __init__(self, names):
        self.names, self.done, self.begun, self.told = names, 0, time.monotonic(), time.monotonic()
        self.lines, self.file = 1, None

    def start(self, task, file):
        self.name, self.lines, self.file = task.name, task.lines, file
        print(f"speedups: {self.done + 1} of {len(self.names)}, {task.name} in {task.image}", flush=True)

    def look(self, _):
        """Called by run_client while the process runs."""
        if time.monotonic() - self.told < TOLD_EVERY:
            return
        self.told = time.monotonic()
        answered = len(self.file.read_text().splitlines()) if self.file.exists() else 0
        part = self.done + answered / self.lines
        left = (self.told - self.begun) / part * (len(self.names) - part) if part else None
        about = f"about {left:.0f} s left in all" if left is not None else "time left not known yet"
        print(f"speedups: {self.name}, {answered} of {self.lines} answers; {about}", flush=True)


def run_tasks(p, todo, work):
    """{name: result} of every task; those whose result is there already are not run again."""
    pending = [task for task in todo if not (work / f"{task.name}.json").exists()]
    if kept := len(todo) - len(pending):
        print(f"speedups: {kept} of {len(todo)} are there from a run that was cut off", flush=True)
    progress = Progress([task.name for task in pending])
    for task in pending:
        given, out, log = (work / f"{task.name}.{end}" for end in ("task", "json", "log"))
        write_json(given, task.words)
        log.unlink(missing_ok=True)
        command = ["containers/run", task.image, "python3", "-m", task.module, str(given), str(out)]
        progress.start(task, out.with_suffix(".answers"))
        run_client(task.name, command, log, None, p.run_seconds, progress)
        progress.done += 1
    return {task.name: read_json(work / f"{task.name}.json") for task in todo}


def rates_of(answers):
    """Tokens a second of each answer."""
    return [one["tokens"] / one["seconds"] for one in answers]


def summed(answers):
    """{tokens_per_second, interval}: the mean over answers, as the writeup takes it, with its 95 % interval."""
    found = rates_of(answers)
    known = len(found) >= REPEATS_NEEDED
    return {"tokens_per_second": statistics.mean(found), "interval": interval(found, "mean") if known else None}


def cpu_per_token(answers):
    """CPU seconds a token, of all threads: what hardly changes when others are at work on the machine."""
    return sum(one["cpu_seconds"] for one in answers) / sum(one["tokens"] for one in answers)


def row(result, config, machine_rates):
    """One method in one arm: its speed, and what share of the machine's limit for one answer after another that is.

    The limit: every weight read once a token (stages/roofline.py), prefill and decoding one after the other.
    """
    answers = result["answers"]
    firsts = [one["ttft_seconds"] for one in answers if one["ttft_seconds"] is not None]
    tokens = statistics.mean(one["tokens"] for one in answers)
    weights = METHODS[result["method"]].weights
    limit = closed_loop(config, weights, "bf16", machine_rates, 1, result["prompt_tokens"], max(2, round(tokens)))
    best, made = limit["apart_tokens_per_second"], summed(answers)
    return {
        **made,
        "answers": len(answers),
        "prompt_tokens": result["prompt_tokens"],
        "output_tokens": tokens,
        "ttft_seconds": statistics.median(firsts) if firsts else None,
        "cpu_seconds_per_token": cpu_per_token(answers),
        "peak_mib": result["memory"]["process_peak_mib"],
        "memory": result["memory"]["device"],
        "wall_seconds": result["wall_seconds"],
        "warmup_seconds": sum(one["seconds"] for one in result["warmups"]),
        "dtype": result["dtype"],
        "compiled_graphs": result["compiled_graphs"],
        "limit_tokens_per_second": best,
        "share_of_limit": made["tokens_per_second"] / best if best else None,
        "image": result["made_by"]["image"],
        "versions": result["made_by"]["versions"],
    }


def rows(p, machine, found, config, machine_rates):
    """Every method in every arm it has, measured or not, with what it is worth over doing nothing in the same arm."""
    listed = []
    for arm in p.arms:
        plain = found.get(f"none-{arm}")
        for method, entry in METHODS.items():
            if arm == "published" and method not in PUBLISHED:
                continue
            name = f"{method}-{arm}"
            listed.append({"id": name, "method": method, "arm": arm, "says": entry.says, "not_measured": None})
            if name not in found:
                task = Task(name, "", "", {"method": method, "arm": arm}, 0)
                left_out = f"params.yaml: speedups.methods has no {method}"
                listed[-1]["not_measured"] = not_run(p, machine, task) or left_out
                continue
            listed[-1] |= row(found[name], config, machine_rates)
            listed[-1]["over_none"] = plain and ratio(
                rates_of(found[name]["answers"]), rates_of(plain["answers"]), "mean"
            )
    return listed


def systems(p, found):
    """Every system's throughput on the same prompts, and how many times that of Transformers' static batches it is."""
    entries = {name: found.get(f"batch-{name}") for name in SYSTEMS}
    measured = {name: one for name, one in entries.items() if one}
    if len({one["prompts_sha256"] for one in measured.values()}) > 1:
        raise UserError("the systems were not given the same prompts: do their tokenizers differ?")
    static, listed = entries["static"], []
    for name, one in entries.items():
        listed.append({"system": name, "not_measured": None})
        if not one:
            listed[-1]["not_measured"] = f"params.yaml: speedups.batch_systems has no {name}"
            continue
        found_rates = rates_of(one["repeats"])
        known = len(found_rates) >= REPEATS_NEEDED
        listed[-1] |= {
            "tokens_per_second": statistics.median(found_rates),
            "interval": interval(found_rates) if known else None,
            "over_static": static and ratio(found_rates, rates_of(static["repeats"])),
            "cpu_seconds_per_token": cpu_per_token(one["repeats"]),
            "tokens": one["repeats"][0]["tokens"],
            "computed_tokens": one["repeats"][0]["computed_tokens"],
            "prompt_tokens": one["prompt_tokens"],
            "output_tokens": one["output_tokens"],
            "peak_mib": one["memory"]["process_peak_mib"],
            "wall_seconds": one["wall_seconds"],
            "image": one["made_by"]["image"],
            "versions": one["made_by"]["versions"],
        }
    return listed


def given_images():
    """{role: image} of the command line."""
    images = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if images.keys() != {"pytorch", "triton", "vllm"}:
        raise UserError("usage: python -m stages.speedups pytorch=IMAGE triton=IMAGE vllm=IMAGE")
    return images


def make_weights(p, images, work):
    """The random weights of a shape, made once; nothing for the base model."""
    folder = served_model(p.model)
    if p.model in OURS or (folder / INDEX).exists():
        return
    print(f"speedups: making random weights of {p.model}", flush=True)
    words = [*p.model.split(":"), str(folder), str(p.seed)]
    command = ["containers/run", images["pytorch"], "python3", "-m", "stages.random_model", *words]
    run_client("random_model", command, work / "random_model.log", None, p.run_seconds)


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
    settings = [dataclasses.asdict(p), images, machine, base]
    work = work_dir("speedups", fingerprint(settings, [Path(__file__).parent / one for one in MEASURING]))
    make_weights(p, images, work)
    config = read_json(served_model(p.model) / "config.json" if p.model in OURS else shape_file(p.model))

    begun, busy = time.strftime("%Y-%m-%d %H:%M:%S"), os.getloadavg()[0]
    todo = [task for task in tasks(p, images) if not not_run(p, machine, task)]
    found = run_tasks(p, todo, work)
    listed = rows(p, machine, found, config, rates(limits))
    cache = next((one["kv_cache"] for one in found.values() if one.get("kv_cache")), None)
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
            "published_seconds": sum(one.get("wall_seconds", 0) for one in listed if one["arm"] == "published"),
            "vllm_kv_cache": cache,
            "rows": listed,
            "systems": systems(p, found),
        },
    )
    shutil.rmtree(work)  # a run that is asked for again measures again
    for one in listed:
        said = one["not_measured"] or f"{one['tokens_per_second']:.2f} tokens/s"
        print(f"speedups: {one['id']}: {said}")
    print(f"speedups: {out / 'speedups.json'}")


if __name__ == "__main__":
    run(main)
