"""
The loads of one experiment in the report (stages/serving_report.py): their table and figures, each load beside what the
machine allows.
"""

from stages import figures
from stages.claims import show
from stages.comparison import RATE, span, value
from stages.page import Grey
from stages.roofline import BITS, KV_BYTES, closed_loop, decode_step, rates, seconds
from stages.sections import slug

# Columns of the tables, and of every comparison: the number in points.json and what it is called.
NUMBERS = {
    RATE: "tokens/s",
    "per_user_tokens_per_second": "tokens/s a user",
    "ttft_ms_p50": "first token ms",
    "itl_ms_p50": "between tokens ms",
}
# What the figures call the same.
DRAWN = {
    RATE: "tokens_per_second",
    "per_user_tokens_per_second": "per_user_tokens_per_second",
    "ttft_ms_p50": "ttft_ms",
    "itl_ms_p50": "itl_ms",
}


def load_of(data, point):
    """A load in a word: its concurrency, with lengths and arm where the experiment has several."""
    words = [f"{point['input_tokens_asked']}/{point['output_tokens_asked']}"] * (len(data["settings"]["lengths"]) > 1)
    words += [f"c={point['concurrency']}"]
    return " ".join(words + [point["arm"]] * (len(data["settings"]["arms"]) > 1))


def points_table(servers, limits):
    """(header, rows) of every load of every server."""
    rows = []
    for server, data in servers.items():
        for point in data["points"]:
            of_limit = share(data, point, limits)
            row = [server, load_of(data, point), with_interval(point, RATE), f"{of_limit:.0%}" if of_limit else "—"]
            row += [with_interval(point, name) for name in NUMBERS if name != RATE]
            row += [show(point.get("tokens_per_joule")), repeats_told(point["repeats"])]
            row += ["yes" if point["valid"] else f"no: {'; '.join(point['invalid_reasons'])}"]
            rows.append(row if point["valid"] else Grey(row))
    (rate, *others) = NUMBERS.values()
    return ["server", "load", rate, "of the limit", *others, "tokens/J", "repeats", "valid"], rows


def repeats_told(repeats):
    """How many are valid, and how many tries more the certificate refused."""
    refused = sum(len(one.get("refused_tries", [])) for one in repeats)
    told = f"{sum(one['valid'] for one in repeats)} of {len(repeats)}"
    return f"{told}, {refused} refused before" if refused else told


def with_interval(point, name):
    """A number of a point, with its interval where it has one."""
    found = span(point, name)
    return show(value(point, name)) + (f" [{show(found[0])}, {show(found[1])}]" if found else "")


def share(data, point, limits):
    """A point's throughput over the limit; 0 where either is not known."""
    limit, rate = bound(data, point, limits), value(point, RATE)
    return rate / limit["tokens_per_second"] if limit and rate else 0


def bound(data, point, limits):
    """{tokens_per_second, per_user_tokens_per_second, itl_ms}: what no engine exceeds for this load on this machine, by
    the lengths that the server counted; None where the format, the model's size or the machine's rates are not known,
    and for a server that guesses tokens: it reads the weights once for several.
    """
    base, weights, kv = data["base_model"], data["weights_format"], data["kv_format"]
    if not limits or weights not in BITS or kv not in KV_BYTES or "config" not in base or guesses(data):
        return None
    config, machine = base["config"], rates(limits, gpus(data["server_command"]))
    tokens_in = round(point.get("input_tokens") or point["input_tokens_asked"])
    tokens_out = round(point.get("server_output_tokens") or point["output_tokens_asked"])
    found = closed_loop(config, weights, kv, machine, point["concurrency"], tokens_in, tokens_out)
    step = seconds(decode_step(config, weights, kv, point["concurrency"], tokens_in + tokens_out // 2), machine)
    if not step or not found["tokens_per_second"]:
        return None
    return {
        "concurrency": point["concurrency"],
        "tokens_per_second": found["tokens_per_second"],
        "per_user_tokens_per_second": 1 / step,
        "itl_ms": 1000 * step,
    }


def guesses(data):
    """Whether a server decodes speculatively."""
    return any("--speculative" in word for word in data["server_command"] or [])


def gpus(command):
    """The GPUs that share the model, out of the words that started the server."""
    for word in command or []:
        name, _, number = word.partition("=")
        if name in ("--tensor-parallel-size", "--tp_size"):
            return int(number)
    return 1


# The figures.


def all_series(server, data, limits):
    """A server's points as the figures take them: one series a pair of lengths."""
    for lengths in data["settings"]["lengths"]:
        group = [p for p in data["points"] if [p["input_tokens_asked"], p["output_tokens_asked"]] == lengths]
        if group:
            several = f", {lengths[0]} in, {lengths[1]} out" if len(data["settings"]["lengths"]) > 1 else ""
            engine = "" if data["engine_is_stand_in"] else f" ({data['engine']})"
            yield {
                "label": f"{server}{engine}{several}",
                "stand_in": data["engine_is_stand_in"],
                "points": [drawn_point(point) for point in group],
                "limit": [one for point in group if (one := bound(data, point, limits))],
            }


def drawn_point(point):
    """What the figures show of a point."""
    spans = {DRAWN[name]: span(point, name) for name in NUMBERS}
    return {
        "concurrency": point["concurrency"],
        "valid": point["valid"],
        "intervals": {name: found for name, found in spans.items() if found},
        **{DRAWN[name]: value(point, name) for name in NUMBERS},
    }


def drawings(name, series, weights):
    """Both figures of an experiment."""
    shared = "Bars: 95 % intervals. Dotted: the most or the least that this machine allows. Crosses: not valid."
    shared = f"{weights.capitalize()} weights. {shared}"
    for kind, draw, caption in (
        ("serving", figures.serving, "Throughput and waiting over concurrent requests"),
        (
            "pareto",
            figures.pareto,
            "What one user gets and what all get together, at the concurrency beside each point",
        ),
    ):
        figure = slug(kind, name)
        yield ("figure", figure, draw(figure, series), f"{caption}: {name}. {shared}")
