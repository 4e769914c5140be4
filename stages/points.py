"""
One point of a benchmark: read from genai-perf's files, checked against what was asked for, told in a line.
"""

from stages.stage import UserError, read_json

# A mean output length that is further off than this is another workload than the one asked for.
LENGTH_TOLERANCE = 0.02
STATISTICS = ("avg", "p50", "p90", "p95", "p99")
# Our name -> genai-perf's key, the unit it must come in, and the statistics we report.
METRICS = {
    "requests": ("request_count", "count", ("avg",)),
    "input_tokens": ("input_sequence_length", "tokens", ("avg",)),
    "output_tokens": ("output_sequence_length", "tokens", ("avg",)),
    "output_tokens_per_second": ("output_token_throughput", "tokens/sec", ("avg",)),
    "requests_per_second": ("request_throughput", "requests/sec", ("avg",)),
    "per_user_tokens_per_second": ("output_token_throughput_per_user", "tokens/sec/user", ("avg",)),
    "ttft_ms": ("time_to_first_token", "ms", STATISTICS),
    "itl_ms": ("inter_token_latency", "ms", STATISTICS),
    "request_latency_ms": ("request_latency", "ms", STATISTICS),
}


def read_point(folder):
    """What we report of one point, from genai-perf's JSON under `folder`; None where it has no such number."""
    found = sorted(folder.rglob("*_genai_perf.json"))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files *_genai_perf.json, want 1; genai-perf did not finish this point")
    profile, point = read_json(found[0]), {}
    for name, (key, unit, statistics) in METRICS.items():
        measured = profile.get(key, {})
        if measured and measured["unit"] != unit:
            raise UserError(f"{found[0]}: {key} is in {measured['unit']!r}, want {unit!r}; is it another genai-perf?")
        for one in statistics:
            point[name if statistics == ("avg",) else f"{name}_{one}"] = measured.get(one)
    if point["requests"] is None:
        raise UserError(f"{found[0]}: request_count is missing; is it another genai-perf?")
    return {**point, "requests": int(point["requests"])}


def judged(point, asked_requests, asked_tokens):
    """The point with what the server's own count adds, and whether it measured the work that was asked for.

    genai-perf counts output tokens by tokenising the text again, which is off where the text has another, shorter
    spelling in tokens; the server knows how many it made. So its count decides, where there is one.
    """
    counted, made = point["output_tokens"], point["server_output_tokens"]
    failed = max(0, asked_requests - point["requests"])
    reasons = [f"{failed} of {asked_requests} requests failed"] if failed else []
    who, tokens = ("genai-perf counted", counted) if made is None else ("the server made", made)
    if tokens is None or off(tokens, asked_tokens):
        shown = "no" if tokens is None else f"{tokens:.2f}"
        reasons.append(f"{who} {shown} output tokens a request, {asked_tokens} were asked for")
    notes = []
    if made is not None and counted is not None and off(counted, made):
        notes.append(f"genai-perf counted {counted:.2f} output tokens a request where the server made {made:.2f}")
    rate = made * point["requests_per_second"] if made is not None else None
    return {
        **point,
        "server_output_tokens_per_second": rate,
        "failed_requests": failed,
        "valid": not reasons,
        "invalid_reasons": reasons,
        "notes": notes,
    }


def off(tokens, wanted):
    return abs(tokens / wanted - 1) > LENGTH_TOLERANCE


def per_request(before, after):
    """The mean output tokens of a request by the server's own counters, warm-up included; None without counters."""
    names = ("output_tokens", "requests")
    if any(name not in counts for name in names for counts in (before, after)):
        return None
    if after["requests"] == before["requests"]:
        return None
    return (after["output_tokens"] - before["output_tokens"]) / (after["requests"] - before["requests"])


def told(point):
    """One point in one line."""
    rate, first = point["output_tokens_per_second"], point["ttft_ms_p50"]
    numbers = f"{rate:.1f} tokens/s" if rate is not None else "throughput not measured"
    numbers += f", first token after {first:.0f} ms (median)" if first is not None else ""
    return f"concurrency {point['concurrency']}: {numbers}{'' if point['valid'] else ', INVALID: '}" + "; ".join(
        point["invalid_reasons"]
    )
