"""
One point of a benchmark: corrected to the server's token count, summed up over its repeats, shown in a line.
"""

import statistics

from lib.stats import REPEATS_NEEDED, interval

ASKED = ("concurrency", "input_tokens_asked", "output_tokens_asked", "variant")


def named_as_points(numbers):
    """A client's numbers (lib/serving/client_summary.py) in the names of points.json, whose itl_ms is TPOT: genai-perf
    calls it ITL."""
    left_out = ("failed", *(name for name in numbers if name.startswith("itl_ms")))
    return {name.replace("tpot", "itl"): value for name, value in numbers.items() if name not in left_out}


def correct(read, server_tokens, watts):
    """A client's point by the server's own count of tokens a request; the client's numbers stay as client_NAME.

    genai-perf tokenises an answer again and may count other tokens than the server made. Both counts are means over the
    requests, and so is the factor: a client's ITL is (latency - TTFT) / (tokens - 1), and tokens/s a user its inverse
    (NVIDIA's ITL is vLLM's TPOT). Without server_tokens nothing is corrected. tokens_per_joule takes the GPUs' mean
    power, `watts`.
    """
    point = {**read, **{f"client_{name}": read[name] for name in read if is_corrected(name)}}
    client, rate = read["output_tokens"], None
    if server_tokens is not None:
        rate = server_tokens * read["requests_per_second"]
        point |= {"output_tokens": server_tokens, "output_tokens_per_second": rate}
        if client and min(client, server_tokens) > 1:
            factor = (client - 1) / (server_tokens - 1)
            for name in filter(is_corrected, read):
                if read[name] is not None and name.startswith(("itl_ms", "per_user")):
                    point[name] = read[name] * factor if name.startswith("itl_ms") else read[name] / factor
    return {**point, "tokens_counted_by": "client" if server_tokens is None else "server",
            "tokens_per_joule": rate / watts if rate is not None and watts else None}  # fmt: skip


def is_corrected(name):
    """Whether a client's number depends on how many tokens it counts in an answer."""
    return name.startswith(("output_tokens", "per_user_tokens_per_second", "itl_ms")) and not name.endswith("_asked")


def guess_counts(counted):
    """The tokens that a server guessed (speculative decoding; None: it counts none) and the share that was right (None:
    there was no guess)."""
    guessed = counted.get("guessed")
    return {"guessed_tokens": guessed, "guessed_right": counted["guessed_right"] / guessed if guessed else None}


def summarise_repeats(repeats):
    """One entry of points.json: the medians of the valid repeats, with intervals, and every repeat as it was.

    Without a valid repeat the medians are of the invalid ones, and the point is not valid.
    """
    valid = [repeat for repeat in repeats if repeat["valid"]]
    used = valid or repeats
    numbers = [key for key, value in used[0].items() if type(value) in (int, float) and key not in (*ASKED, "repeat")]
    medians = {
        key: statistics.median(repeat[key] for repeat in used) for key in numbers if None not in numbers_of(used, key)
    }
    return {
        **{key: used[0][key] for key in ASKED},
        "tokens_counted_by": used[0]["tokens_counted_by"],
        **{key: None for key, value in used[0].items() if value is None},
        **medians,
        "intervals": {key: interval(numbers_of(used, key)) for key in medians if len(used) >= REPEATS_NEEDED},
        "valid": bool(valid),
        "invalid_reasons": sorted(
            {reason for repeat in repeats if not repeat["valid"] for reason in repeat["invalid_reasons"]}
        ),
        "repeats": repeats,
    }


def numbers_of(repeats, key):
    return [repeat.get(key) for repeat in repeats]


def format_line(point):
    """One point in one line."""
    rate, first = point["output_tokens_per_second"], point["ttft_ms_p50"]
    numbers = f"{rate:.1f} tokens/s" if rate is not None else "throughput not measured"
    numbers += f", first token after {first:.0f} ms (median)" if first is not None else ""
    where = f"{point['input_tokens_asked']} in, {point['output_tokens_asked']} out, concurrency {point['concurrency']}"
    where += "" if point["variant"] == "corrected" else f", {point['variant']}"
    return f"{where}: {numbers}{'' if point['valid'] else ', INVALID: '}" + "; ".join(point["invalid_reasons"])
