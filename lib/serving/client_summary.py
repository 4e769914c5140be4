"""
Reads the summary that a load client wrote of one run, under our names; genai-perf and AIPerf write the same form.

  tpot_ms   of a request: (latency - ttft) / (output tokens - 1), over requests; genai-perf and AIPerf call it ITL
  itl_ms    the gaps between an answer's chunks, those of all requests together; AIPerf calls it inter-chunk latency
  request_latency_ms   from sending to the last token
"""

from pathlib import Path

from lib.core.stage import UserError, read_json

STATISTICS = ("avg", "min", "p50", "p75", "p90", "p95", "p99", "max")
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "request_latency_ms")
# Our name -> genai-perf's key (None: it has no such number), the unit it must come in, and the statistics we keep, as
# NAME_STATISTIC; the mean of a number that is no time has the plain name.
METRICS = {
    "requests": ("request_count", "count", ("avg",)),
    "failed": (None, None, ("avg",)),
    "input_tokens": ("input_sequence_length", "tokens", ("avg",)),
    "output_tokens": ("output_sequence_length", "tokens", ("avg",)),
    "output_tokens_per_second": ("output_token_throughput", "tokens/sec", ("avg",)),
    "requests_per_second": ("request_throughput", "requests/sec", ("avg",)),
    "per_user_tokens_per_second": ("output_token_throughput_per_user", "tokens/sec/user", STATISTICS),
    "ttft_ms": ("time_to_first_token", "ms", STATISTICS),
    "ttst_ms": ("time_to_second_token", "ms", STATISTICS),
    "tpot_ms": ("inter_token_latency", "ms", STATISTICS),
    "itl_ms": (None, None, STATISTICS),
    "request_latency_ms": ("request_latency", "ms", STATISTICS),
}


def key_of(name, statistic):
    """The key of a metric's statistic, in the numbers that a client reads and in points.json."""
    return name if statistic == "avg" and not name.endswith("_ms") else f"{name}_{statistic}"


KEYS = tuple(key_of(name, statistic) for name, (_, _, statistics) in METRICS.items() for statistic in statistics)


def read_profile(path, profile, metrics=METRICS):
    """Our names -> the numbers of a summary in genai-perf's form, {key: {"unit": ..., "avg": ..., "p50": ...}}; None
    if it lacks the number."""
    numbers = {}
    for name, (key, unit, statistics) in metrics.items():
        entry = profile.get(key) or {"unit": unit}
        if entry["unit"] != unit:
            raise UserError(f"{path}: {key} is in {entry['unit']!r}, want {unit!r}; is it another version?")
        numbers |= {key_of(name, statistic): entry.get(statistic) for statistic in statistics}
    require(path, profile, metrics["requests"][0])
    return numbers | {"requests": int(numbers["requests"])}


def read_only(folder, pattern, client):
    """(path, content) of the only file of that name under `folder`; UserError if there is none, or more than one."""
    files = sorted(Path(folder).rglob(pattern))
    if len(files) != 1:
        remedy = f"empty the folder and run {client} again" if files else f"{client} did not finish; run it again"
        raise UserError(f"{folder}: {len(files)} files {pattern}, want 1; {remedy}")
    data = read_json(files[0])
    if not isinstance(data, dict):
        raise UserError(f"{files[0]}: not the summary of {client}; empty the folder and run it again")
    return files[0], data


def require(path, data, key):
    """A value that every whole file has; UserError names the file that lacks it."""
    if data.get(key) is None:
        raise UserError(f"{path}: {key} is missing; was the client stopped, or is it another version?")
    return data[key]
