"""
Ground truth against a load client's report (stages/client_accuracy.py): the mock server's record, or vLLM's counts,
and whether these match the load.
"""

import hashlib

import numpy as np

from lib.core.stage import UserError
from lib.serving.client_summary import TIMES
from lib.serving.load import read_prompts

STATISTICS = ("avg", "p50", "p90", "p95", "p99")  # all clients give these
# The metrics compared with the mock's own record, statistic by statistic.
COMPARED = (*(f"{name}_{statistic}" for name in TIMES for statistic in STATISTICS), "output_tokens_per_second")
# vLLM's own sums over all requests, and our names for them.
COUNTERS = {
    "requests": "vllm:request_success_total",
    "input_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "ttft_seconds": "vllm:time_to_first_token_seconds_sum",
    "request_seconds": "vllm:e2e_request_latency_seconds_sum",
}


def statistics(values):
    """avg and percentiles, as all three clients take them: linear between neighbours."""
    return {
        statistic: float(np.mean(values) if statistic == "avg" else np.percentile(values, int(statistic[1:])))
        for statistic in STATISTICS
    }


def true_numbers(requests):
    """The exact metrics of the requests that the mock wrote down: our names -> ms, tokens/s."""
    measured = {name: [] for name in TIMES}
    for request in requests:
        written, arrived = request["written"], request["arrived"]
        measured["ttft_ms"].append(1000 * (written[0] - arrived))
        measured["tpot_ms"].append(1000 * (written[-1] - written[0]) / (len(written) - 1))
        measured["itl_ms"] += [1000 * gap for gap in np.diff(written)]
        measured["request_latency_ms"].append(1000 * (written[-1] - arrived))
    tokens = sum(len(request["written"]) for request in requests)
    numbers = {
        f"{name}_{statistic}": value for name in TIMES for statistic, value in statistics(measured[name]).items()
    }
    return numbers | {"output_tokens_per_second": tokens / load_seconds(requests)}


def load_seconds(requests):
    """From the first request's arrival to the last token."""
    return max(request["written"][-1] for request in requests) - min(request["arrived"] for request in requests)


def lateness(requests):
    """How long after its deadline the mock wrote a token, in ms."""
    late = [1000 * (w - d) for request in requests for w, d in zip(request["written"], request["due"], strict=True)]
    return statistics(late) | {"max": max(late)}


def wrong(load, requests):
    """Why what arrived is not the load that was asked for; empty when it is."""
    reasons = []
    if len(requests) != load.requests:
        reasons.append(f"{len(requests)} requests arrived, {load.requests} were asked for")
    arrived = [request["prompt_sha256"] for request in requests]
    if len(set(arrived)) < len(arrived):
        reasons.append(f"{len(arrived) - len(set(arrived))} prompts arrived twice")
    ours = {hashlib.sha256(text.encode()).hexdigest() for text in read_prompts(load)[: load.requests]}
    if others := set(arrived) - ours:
        reasons.append(f"{len(others)} prompts are not among the file's first {load.requests}")
    wanted = {"prompt_tokens": load.input_tokens, "max_tokens": load.output_tokens, "stream": True, **load.pinned}
    for name, value in wanted.items():
        if other := {request[name] for request in requests} - {value}:
            reasons.append(f"{name} is {', '.join(map(str, sorted(other, key=str)))}, not {value}")
    if short := [request for request in requests if len(request["written"]) != load.output_tokens]:
        reasons.append(f"{len(short)} answers were cut off")
    return reasons


def judge_run(load, reported, seconds, requests):
    """One run beside the mock's record; error = reported - true, None if the client does not report the metric."""
    reasons = wrong(load, requests)
    # Whatever came in between, as if the load had been the whole run.
    complete = [request for request in requests if len(request["written"]) > 1]
    if not complete:
        raise UserError(f"{load.folder}: no answer was written; what the client printed lies beside it")
    truth = true_numbers(complete)
    error = {name: None if reported[name] is None else reported[name] - truth[name] for name in COMPARED}
    busy = load_seconds(complete)
    return {
        "said": reported,
        "known": truth,
        "error": error,
        "error_percent": {
            name: None if value is None or not truth[name] else 100 * value / truth[name]
            for name, value in error.items()
        },
        "late_ms": lateness(complete),
        "seconds": seconds | {"load": busy, "overhead": seconds["wall"] - busy},
        "valid": not reasons,
        "invalid_reasons": reasons,
    }


def server_counts(load, before, after):
    """vLLM's counts between two readings, per request, and whether they match the load."""
    more = {name: after[name] - before[name] for name in COUNTERS if name in before and name in after}
    requests = more.pop("requests", 0)
    each = {name: value / requests for name, value in more.items()} if requests else {}
    counts = {
        "requests": int(requests),
        "input_tokens": each.get("input_tokens"),
        "output_tokens": each.get("output_tokens"),
        "ttft_ms_avg": 1000 * each["ttft_seconds"] if "ttft_seconds" in each else None,
        "request_latency_ms_avg": 1000 * each["request_seconds"] if "request_seconds" in each else None,
    }
    wanted = {name: getattr(load, name) for name in ("requests", "input_tokens", "output_tokens")}
    reasons = [f"the server counted {counts[n]} {n}, {w} were asked for" for n, w in wanted.items() if counts[n] != w]
    return {"server": counts, "valid": not reasons, "invalid_reasons": reasons}
