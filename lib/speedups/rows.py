"""
The rows of stages/speedups.py: one a method and variant, one a system of many prompts, measured or with the reason why
not.
"""

import shutil
import statistics

from lib.analysis.roofline import closed_loop
from lib.core.stage import UserError
from lib.speedups.methods import METHODS, PUBLISHED, SYSTEMS
from lib.stats import REPEATS_NEEDED, interval, ratio


def not_run(machine, task):
    """Why a task, given by its words, cannot be had on this machine; None where it can."""
    method = METHODS.get(task.get("method"))
    if machine["gpus"] or not method:
        return None
    if method.weights != "bf16":
        return "on a CPU bitsandbytes unpacks every weight at every step, minutes an answer: measured on a GPU only"
    if method.compile and task["variant"] == "corrected" and not shutil.which("g++"):
        return "torch.compile on a CPU needs the C++ compiler g++"
    return None


def published_seconds(listed):
    """The seconds of all rows of the variant published; None if one was not measured, or none was asked for."""
    took = [row.get("wall_seconds") for row in listed if row["variant"] == "published"]
    return sum(took) if took and None not in took else None


def rates_of(answers):
    """Tokens a second of each answer."""
    return [answer["tokens"] / answer["seconds"] for answer in answers]


def mean_speed(answers):
    """{tokens_per_second, interval}: the mean over answers, as the writeup takes it, with its 95 % interval."""
    rates = rates_of(answers)
    known = len(rates) >= REPEATS_NEEDED
    return {"tokens_per_second": statistics.mean(rates), "interval": interval(rates, "mean") if known else None}


def cpu_per_token(answers):
    """CPU seconds a token, of all threads: other programs on the machine hardly change it."""
    return sum(answer["cpu_seconds"] for answer in answers) / sum(answer["tokens"] for answer in answers)


def row(result, config, machine_rates):
    """One method in one variant: its speed, and what share of the machine's limit for one answer after another that is.

    The limit: every weight read once a token (lib/analysis/roofline.py), prefill and decoding one after the other.
    """
    answers = result["answers"]
    firsts = [answer["ttft_seconds"] for answer in answers if answer["ttft_seconds"] is not None]
    tokens = statistics.mean(answer["tokens"] for answer in answers)
    weights = METHODS[result["method"]].weights
    limit = closed_loop(config, weights, "bf16", machine_rates, 1, result["prompt_tokens"], max(2, round(tokens)))
    best, speed = limit["apart_tokens_per_second"], mean_speed(answers)
    return {
        **speed,
        "answers": len(answers),
        "prompt_tokens": result["prompt_tokens"],
        "output_tokens": tokens,
        "ttft_seconds": statistics.median(firsts) if firsts else None,
        "cpu_seconds_per_token": cpu_per_token(answers),
        "peak_mib": result["memory"]["process_peak_mib"],
        "memory": result["memory"]["device"],
        "wall_seconds": result["wall_seconds"],
        "warmup_seconds": sum(warmup["seconds"] for warmup in result["warmups"]),
        "dtype": result["dtype"],
        "compiled_graphs": result["compiled_graphs"],
        "limit_tokens_per_second": best,
        "share_of_limit": speed["tokens_per_second"] / best if best else None,
        "image": result["made_by"]["image"],
        "versions": result["made_by"]["versions"],
    }


def rows(p, machine, results, failed, config, machine_rates):
    """Every method in each of its variants, measured or not, with its speed over that of `none` in the same variant.

    results: {task: its result}; failed: {task: why it has none}.
    """
    listed = []
    for variant in p.variants:
        plain = results.get(f"none-{variant}")
        for method, entry in METHODS.items():
            if variant == "published" and method not in PUBLISHED:
                continue
            name = f"{method}-{variant}"
            listed.append({"id": name, "method": method, "variant": variant, "says": entry.says, "not_measured": None})
            if name not in results:
                left_out = failed.get(name, f"params.yaml: speedups.methods has no {method}")
                listed[-1]["not_measured"] = not_run(machine, {"method": method, "variant": variant}) or left_out
                continue
            listed[-1] |= row(results[name], config, machine_rates)
            listed[-1]["over_none"] = plain and ratio(
                rates_of(results[name]["answers"]), rates_of(plain["answers"]), "mean"
            )
    return listed


def systems(results, failed):
    """Every system's throughput on the same prompts, and how many times that of Transformers' static batches it is;
    results and failed as in rows()."""
    entries = {name: results.get(f"batch-{name}") for name in SYSTEMS}
    measured = {name: entry for name, entry in entries.items() if entry}
    if len({entry["prompts_sha256"] for entry in measured.values()}) > 1:
        raise UserError("the systems were not given the same prompts: do their tokenizers differ?")
    static, listed = entries["static"], []
    for name, entry in entries.items():
        listed.append({"system": name, "not_measured": None})
        if not entry:
            left_out = f"params.yaml: speedups.batch_systems has no {name}"
            listed[-1]["not_measured"] = failed.get(f"batch-{name}", left_out)
            continue
        found_rates = rates_of(entry["repeats"])
        known = len(found_rates) >= REPEATS_NEEDED
        listed[-1] |= {
            "tokens_per_second": statistics.median(found_rates),
            "interval": interval(found_rates) if known else None,
            "over_static": static and ratio(found_rates, rates_of(static["repeats"])),
            "cpu_seconds_per_token": cpu_per_token(entry["repeats"]),
            "tokens": entry["repeats"][0]["tokens"],
            "computed_tokens": entry["repeats"][0]["computed_tokens"],
            "prompt_tokens": entry["prompt_tokens"],
            "output_tokens": entry["output_tokens"],
            "peak_mib": entry["memory"]["process_peak_mib"],
            "wall_seconds": entry["wall_seconds"],
            "image": entry["made_by"]["image"],
            "versions": entry["made_by"]["versions"],
        }
    return listed
