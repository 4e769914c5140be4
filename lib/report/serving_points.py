"""
The loads of one experiment in the report (lib/report/serving.py): their table and figures, each load beside what the
machine allows.
"""

from lib.analysis.summary import bound, load_of, share
from lib.bench.metrics import RATE, span, value
from lib.claims.format import show
from lib.report import plots
from lib.report.page import Grey
from lib.report.result_files import slug

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
        ("serving", plots.serving, "Throughput and waiting over concurrent requests"),
        (
            "pareto",
            plots.pareto,
            "What one user gets and what all get together, at the concurrency beside each point",
        ),
    ):
        figure = slug(kind, name)
        yield ("figure", figure, draw(figure, series), f"{caption}: {name}. {shared}")
