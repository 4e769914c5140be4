"""
One point of a benchmark: read from genai-perf's files, repeated, summed up, told in a line.
"""

import statistics

from lib.core.stage import UserError, read_json
from lib.stats import REPEATS_NEEDED, interval

STATISTICS = ("avg", "min", "p50", "p75", "p90", "p95", "p99", "max")
# Our name -> genai-perf's key, the unit it must come in, and the statistics we report, as NAME_STATISTIC; the mean of
# what is no time has the plain name.
METRICS = {
    "requests": ("request_count", "count", ("avg",)),
    "input_tokens": ("input_sequence_length", "tokens", ("avg",)),
    "output_tokens": ("output_sequence_length", "tokens", ("avg",)),
    "output_tokens_per_second": ("output_token_throughput", "tokens/sec", ("avg",)),
    "requests_per_second": ("request_throughput", "requests/sec", ("avg",)),
    "per_user_tokens_per_second": ("output_token_throughput_per_user", "tokens/sec/user", STATISTICS),
    "ttft_ms": ("time_to_first_token", "ms", STATISTICS),
    "ttst_ms": ("time_to_second_token", "ms", STATISTICS),
    "itl_ms": ("inter_token_latency", "ms", STATISTICS),
    "request_latency_ms": ("request_latency", "ms", STATISTICS),
}
ASKED = ("concurrency", "input_tokens_asked", "output_tokens_asked", "arm")


def read_point(folder):
    """What we report of one point, from genai-perf's JSON under `folder`; None where it has no such number."""
    found = sorted(folder.rglob("*_genai_perf.json"))
    if len(found) != 1:
        why = "measure this point again, in an empty folder" if found else "genai-perf did not finish this point"
        raise UserError(f"{folder}: {len(found)} files *_genai_perf.json, want 1; {why}")
    profile, point = read_json(found[0]), {}
    for name, (key, unit, wanted) in METRICS.items():
        measured = profile.get(key, {})
        if measured and measured["unit"] != unit:
            raise UserError(f"{found[0]}: {key} is in {measured['unit']!r}, want {unit!r}; is it another genai-perf?")
        for one in wanted:
            point[name if one == "avg" and not name.endswith("_ms") else f"{name}_{one}"] = measured.get(one)
    if point["requests"] is None:
        raise UserError(f"{found[0]}: request_count is missing; is it another genai-perf?")
    return {**point, "requests": int(point["requests"])}


def latencies(folder):
    """Seconds from sending a request to the last piece of its answer, in the order of sending, out of what genai-perf
    keeps of every single request; None where it kept nothing."""
    found = sorted(folder.rglob("profile_export.json"))
    if not found:
        return None
    requests = [one for experiment in read_json(found[0])["experiments"] for one in experiment["requests"]]
    answered = [(one["timestamp"], one["response_timestamps"]) for one in requests if one["response_timestamps"]]
    return [(max(written) - begin) / 1e9 for begin, written in sorted(answered)]


def by_server(point, made, watts):
    """What follows from the server's own count of tokens a request, `made`, and from the GPUs' mean power.

    server_itl_ms_avg: (latency - TTFT) / (tokens - 1), the mean over the load (NVIDIA's ITL is vLLM's TPOT); a client
    that tokenises text again divides by another number.
    """
    rate = made * point["requests_per_second"] if made is not None else None
    spans = (point["request_latency_ms_avg"], point["ttft_ms_avg"])
    itl = (spans[0] - spans[1]) / (made - 1) if made and made > 1 and None not in spans else None
    return {
        "server_output_tokens": made,
        "server_output_tokens_per_second": rate,
        "server_itl_ms_avg": itl,
        "tokens_per_joule": rate / watts if rate is not None and watts else None,
    }


def guess_counts(counted):
    """The tokens that a server guessed (speculative decoding; None: it counts none) and the share that was right (None:
    there was no guess)."""
    guessed = counted.get("guessed")
    return {"guessed_tokens": guessed, "guessed_right": counted["guessed_right"] / guessed if guessed else None}


def summed_up(repeats):
    """One entry of points.json: the medians of the valid repeats, with intervals, and every repeat as it was.

    Without a valid repeat the medians are of the invalid ones, and the point is not valid.
    """
    valid = [one for one in repeats if one["valid"]]
    used = valid or repeats
    numbers = [key for key, value in used[0].items() if type(value) in (int, float) and key not in (*ASKED, "repeat")]
    medians = {key: statistics.median(one[key] for one in used) for key in numbers if None not in values(used, key)}
    return {
        **{key: used[0][key] for key in ASKED},
        **{key: None for key, value in used[0].items() if value is None},
        **medians,
        "intervals": {key: interval(values(used, key)) for key in medians if len(used) >= REPEATS_NEEDED},
        "valid": bool(valid),
        "invalid_reasons": sorted({reason for one in repeats if not one["valid"] for reason in one["invalid_reasons"]}),
        "repeats": repeats,
    }


def values(repeats, key):
    return [one.get(key) for one in repeats]


def told(point):
    """One point in one line."""
    rate, first = point["server_output_tokens_per_second"], point["ttft_ms_p50"]
    rate = point["output_tokens_per_second"] if rate is None else rate  # a client may count other tokens
    numbers = f"{rate:.1f} tokens/s" if rate is not None else "throughput not measured"
    numbers += f", first token after {first:.0f} ms (median)" if first is not None else ""
    where = f"{point['input_tokens_asked']} in, {point['output_tokens_asked']} out, concurrency {point['concurrency']}"
    where += "" if point["arm"] == "corrected" else f", {point['arm']}"
    return f"{where}: {numbers}{'' if point['valid'] else ', INVALID: '}" + "; ".join(point["invalid_reasons"])


RATE = "output_tokens_per_second"
PERCENTILES = ("p50", "p90", "p95", "p99")  # of TTFT and ITL, shown and compared


def counted_by(point, name):
    """The key of a point's number: the throughput by the server's own count of tokens, where it has one."""
    server = f"server_{RATE}"
    return server if name == RATE and point.get(server) is not None else name


def set_right(point, name):
    """What a client's number is multiplied by where the client counted other tokens than the server made, as
    genai-perf, which tokenises an answer again, may: it divides latency - TTFT by (tokens - 1), a time between tokens,
    and takes the inverse, tokens/s a user. Both counts are means over the requests, and so is the factor."""
    counted, made = point.get("output_tokens"), point.get("server_output_tokens")
    if not counted or not made or min(counted, made) <= 1 or not name.startswith(("itl_ms", "per_user")):
        return 1
    return (counted - 1) / (made - 1) if name.startswith("itl_ms") else (made - 1) / (counted - 1)


def value(point, name):
    """A number of a point or None; see counted_by and set_right."""
    found = point.get(counted_by(point, name))
    return None if found is None else found * set_right(point, name)


def span(point, name):
    """The interval of a point's number, as [low, high], or None."""
    found = point["intervals"].get(counted_by(point, name))
    return found and [end * set_right(point, name) for end in found]


def repeated(point, name, every=False):
    """A number of every valid repeat of a point, or of every repeat; an empty list where one does not have it."""
    found = [value(one, name) for one in point["repeats"] if every or one["valid"]]
    return [] if None in found else found
