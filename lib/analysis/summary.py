"""
The table between measuring and showing: every served point of every run, with limit, share, comparison and validity.

summarise() computes it once; the report, the docs and `bench_vllm_vs_trtllm` render it and compute nothing.
"""

import json
import re

from lib.analysis.compare import compare, noise
from lib.analysis.machine_limit import (
    PUBLISHED_CARD,
    limit_share,
    most_bandwidth,
    point_limit,
    published_limit,
    speculates,
)
from lib.analysis.metrics import PER_USER, PERCENTILES, RATE
from lib.claims.runs import optional
from lib.core.stage import read_json
from lib.model.shapes import experts

NUMBERS = (RATE, PER_USER, *(f"{time}_{p}" for time in ("ttft_ms", "itl_ms") for p in PERCENTILES))
CLIENT_SETTINGS = ("endpoint", "prompts", "pinned", "requests_per_stream", "min_requests", "warmup_requests")
# The writeup's serving points: server, concurrency, formats of weights and KV cache, and the claims with throughput,
# tokens/s a user, TTFT and ITL.
AWQ, GPTQ = ("int4-g128-zeros", "int8"), ("int4-g128", "bf16")
STREAMED = ("throughput", "per-user-avg", "ttft-avg", "itl-avg")
PUBLISHED_POINTS = (
    ("Triton, TensorRT-LLM", 1, AWQ, [f"stream-c1-{name}" for name in STREAMED]),
    ("Triton, TensorRT-LLM", 2, AWQ, [f"stream-c2-{name}" for name in STREAMED]),
    ("Triton, TensorRT-LLM", 16, AWQ, ["triton-throughput", None, None, None]),
    ("vLLM 0.11.0", 16, GPTQ, ["triton-vllm-throughput", None, None, None]),
)


def summarise(runs, published):
    """The whole table. runs: {name: folder}; published: {claim id: value}, for the writeup's own points."""
    limits = {name: optional(folder / "limits/limits.json") for name, folder in runs.items()}
    return {
        "runs": {name: summarise_run(folder, limits[name]) for name, folder in runs.items()},
        "published": summarise_published({name: limit for name, limit in limits.items() if limit}, published),
    }


def summarise_run(folder, limits):
    """One run: its note, whether its machine's limits are known, and its experiments."""
    return {
        "note": optional(folder / "run.json").get("note"),
        "has_limits": bool(limits),
        "experiments": {
            name: summarise_experiment(servers, limits) for name, servers in read_experiments(folder).items()
        },
    }


def read_experiments(folder):
    """{experiment: {server: points.json}} of a run in natural order: vllm before vllm-batch-4 before vllm-batch-16, and
    the others are divided by the first."""
    experiments = {}
    for path in sorted(folder.glob("bench/*/*/points.json"), key=natural_order):
        experiment, server = path.parts[-3:-1]
        experiments.setdefault(experiment, {})[server] = read_json(path)
    return experiments


def natural_order(path):
    return [[int(word) if word.isdigit() else word for word in re.split(r"(\d+)", part)] for part in path.parts]


def summarise_experiment(servers, limits):
    """One experiment of one run; servers: {name: points.json}."""
    measured = {label_of(name, data): data for name, data in servers.items() if data["points"]}
    first = next(iter({**servers, **measured}.values()))
    return {
        "base_model": first["base_model"],
        "settings": first["settings"],
        "random_experts": first["base_model"]["weights"] == "random"
        and "config" in first["base_model"]
        and experts(first["base_model"]["config"])[0] > 1,
        "client_token_error": client_token_error(measured),
        "servers": [summarise_server(name, data, first) for name, data in servers.items()],
        "points": [row for label, data in measured.items() for row in point_rows(label, data, limits)],
        "noise": {name: noise(measured.values(), name) for name in NUMBERS},
        "comparisons": compare_with_first(measured),
        "steps": [step for label, data in measured.items() for step in ablation_steps(label, data)],
    }


def label_of(server, data):
    """A server's name wherever its figures stand: a stand-in is never shown under another engine's name."""
    return f"{server} (stand-in)" if data["engine_is_stand_in"] else server


def summarise_server(name, data, first):
    """A server's engine and formats, and whether its answers are those of the first one."""
    keys = ("engine", "engine_is_stand_in", "weights_format", "kv_format", "not_measured", "server_ready_seconds")
    return {
        "name": name,
        "label": label_of(name, data),
        "model": data["model"],
        **{key: data[key] for key in keys},
        "speculates": speculates(data),
        "same_answers": gives_same_answers(first, data),
        "points": len(data["points"]),
    }


def gives_same_answers(first, data):
    """Whether a server computes what the first one computes: the same formats, and no speculation on random weights,
    whose text is easy to guess."""
    formats = ("weights_format", "kv_format")
    random = data["base_model"]["weights"] == "random"
    return all(first[name] == data[name] for name in formats) and not (speculates(data) and random)


def client_token_error(servers):
    """[least, most] of client tokens / server tokens - 1 over all points; None where no point has both counts."""
    errors = [
        point["client_output_tokens"] / point["output_tokens"] - 1
        for data in servers.values()
        for point in data["points"]
        if point["client_output_tokens"] and point["tokens_counted_by"] == "server"
    ]
    return [min(errors), max(errors)] if errors else None


def load_label(data, point):
    """A load in a word: its concurrency, with lengths and client variant where the experiment has several."""
    words = [f"{point['input_tokens_asked']}/{point['output_tokens_asked']}"] * (len(data["settings"]["lengths"]) > 1)
    words += [f"c={point['concurrency']}"]
    return " ".join(words + [point["variant"]] * (len(data["settings"]["variants"]) > 1))


def point_rows(label, data, limits):
    """One row a point: its numbers with intervals, the limit, its share of it, and what the validity checks found."""
    for point in data["points"]:
        limit = point_limit(data, point, limits)
        yield {
            "server": label,
            "load": load_label(data, point),
            **{key: point[key] for key in ("input_tokens_asked", "output_tokens_asked", "concurrency", "variant")},
            "numbers": {name: with_interval(point, name) for name in NUMBERS},
            "requests": point["requests"],
            "output_tokens": point["output_tokens"],
            "limit": limit,
            "share": limit_share(point, limit),
            "tokens_per_joule": point.get("tokens_per_joule"),
            "guessed_tokens": point.get("guessed_tokens"),
            "guessed_right": point.get("guessed_right"),
            "repeats": len(point["repeats"]),
            "valid_repeats": sum(repeat["valid"] for repeat in point["repeats"]),
            "refused_tries": sum(len(repeat.get("refused_tries", [])) for repeat in point["repeats"]),
            "valid": point["valid"],
            "invalid_reasons": point["invalid_reasons"],
            "checks": [
                {**{key: check[key] for key in ("check", "verdict", "reason")}, "repeat": repeat["repeat"]}
                for repeat in point["repeats"]
                for check in repeat["checks"]
            ],
        }


def with_interval(point, name):
    """{value, low, high} of a number; None where it was not measured or has no interval."""
    low, high = point["intervals"].get(name) or (None, None)
    return {"value": point.get(name), "low": low, "high": high}


def compare_with_first(servers):
    """Every other server divided by plain vLLM, or by the first, at each load that both have: {ratio, low, high,
    verdict} a number."""
    if not servers:
        return []
    first = "vllm" if "vllm" in servers else next(iter(servers))
    reference, others = servers[first], [(label, data) for label, data in servers.items() if label != first]
    at = {load_label(reference, point): point for point in reference["points"]}
    rows = []
    for label, data in others:
        floor = {name: noise([reference, data], name) for name in NUMBERS}
        for point in data["points"]:
            load = load_label(data, point)
            if load in at:
                numbers = {n: compare(point, at[load], n, floor[n], (label, first)) for n in NUMBERS}
                rows.append({"server": label, "divided_by": first, "load": load, "numbers": numbers})
    return rows


def ablation_steps(label, data):
    """From the writeup's client to ours, one change a step; empty where an experiment has one client variant only."""
    if len(data["settings"]["variants"]) < 2:
        return
    loads = {}
    for point in data["points"]:
        loads.setdefault(load_label(data, point).rpartition(" ")[0], {})[point["variant"]] = point
    for load, points in loads.items():
        variants = [variant for variant in data["settings"]["variants"] if variant in points]
        floor = {name: noise([{"points": list(points.values())}], name, every=True) for name in NUMBERS}
        for before, variant in zip([None, *variants], variants, strict=False):
            # Invalid points too: what their flaws do to the figures is the question.
            numbers = {
                name: before
                and compare(points[variant], points[before], name, floor[name], ("this", "the other"), True)
                for name in NUMBERS
            }
            changes = setting_changes(data, before, variant) if before else []
            yield {"server": label, "group": load, "variant": variant, "changes": changes, "numbers": numbers}


def setting_changes(data, before, after):
    """The client settings that differ between two variants, as text."""
    old, new = (data["settings"] | data["settings"]["client_variants"][variant] for variant in (before, after))
    return [
        f"{name} {json.dumps(old[name])} → {json.dumps(new[name])}".replace('"', "")
        for name in CLIENT_SETTINGS
        if old[name] != new[name]
    ]


def summarise_published(limits, published):
    """The writeup's own points, and their share of the card's limit if a run has measured such a card."""
    cards = {name: limit for name, limit in limits.items() if limit["device"].startswith(PUBLISHED_CARD)}
    run = most_bandwidth(cards) if cards else None
    points = []
    for server, concurrency, formats, ids in PUBLISHED_POINTS:
        rate, *others = (published.get(claim) for claim in ids)
        limit = published_limit(cards[run], formats, concurrency) if run else None
        share = rate / limit if limit and rate else None
        points.append(
            {"server": server, "concurrency": concurrency, "numbers": [rate, *others], "limit": limit, "share": share}
        )
    return {"limits_of": run, "points": points}
