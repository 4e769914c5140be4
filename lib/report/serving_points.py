"""
The points of one served experiment in the report: their table and figures, each beside the machine's limit.
"""

from lib.analysis.metrics import RATE, SHOWN, metric_of
from lib.claims.format import show
from lib.report import plots
from lib.report.page import Grey
from lib.report.result_files import slug

# Columns of the tables and of every comparison: the number in the summary and its title.
NUMBERS = {name: metric_of(name).column for name in SHOWN}
# The figures' names of the same, which are those of a limit too.
DRAWN = {name: name.removeprefix("output_").removesuffix("_p50") for name in SHOWN}


def points_table(data):
    """(header, rows) of every load of every server of an experiment."""
    rows = []
    for point in data["points"]:
        share = "—" if point["share"] is None else f"{point['share']:.0%}"
        row = [point["server"], point["load"], format_number(point, RATE), share]
        row += [format_number(point, name) for name in NUMBERS if name != RATE]
        row += [show(point["tokens_per_joule"]), repeats_cell(point)]
        row += ["yes" if point["valid"] else f"no: {'; '.join(point['invalid_reasons'])}"]
        rows.append(row if point["valid"] else Grey(row))
    rate, *others = NUMBERS.values()
    return ["server", "load", rate, "of the limit", *others, "tokens/J", "repeats", "valid"], rows


def repeats_cell(point):
    """How many repeats are valid, and how many earlier tries failed a check."""
    cell = f"{point['valid_repeats']} of {point['repeats']}"
    return f"{cell}, {point['refused_tries']} refused before" if point["refused_tries"] else cell


def format_number(point, name):
    """A number of a point, with its interval where it has one."""
    number = point["numbers"][name]
    span = "" if number["low"] is None else f" [{show(number['low'])}, {show(number['high'])}]"
    return show(number["value"]) + span


# The figures.


def series_of(data):
    """An experiment's points as the figures take them: one series a server and pair of lengths."""
    for server in data["servers"]:
        for lengths in data["settings"]["lengths"]:
            points = [
                point
                for point in data["points"]
                if point["server"] == server["label"]
                and [point["input_tokens_asked"], point["output_tokens_asked"]] == lengths
            ]
            if points:
                yield {
                    "label": f"{server['label']}{detail(server, lengths, data)}",
                    "stand_in": server["engine_is_stand_in"],
                    "points": [drawn_point(point) for point in points],
                    "limit": [point["limit"] for point in points if point["limit"]],
                }


def detail(server, lengths, data):
    """What stands behind a server's name in a figure: the lengths where they differ, else the engine."""
    if len(data["settings"]["lengths"]) > 1:
        return f", {lengths[0]} in, {lengths[1]} out"
    return "" if server["engine_is_stand_in"] else f" ({server['engine']})"


def drawn_point(point):
    """What the figures show of a point."""
    numbers = {DRAWN[name]: point["numbers"][name] for name in NUMBERS}
    return {
        "concurrency": point["concurrency"],
        "valid": point["valid"],
        "intervals": {name: [n["low"], n["high"]] for name, n in numbers.items() if n["low"] is not None},
        **{name: number["value"] for name, number in numbers.items()},
    }


def draw_figures(name, data):
    """Both figures of an experiment that has more than one load."""
    series = list(series_of(data))
    if max((len({point["concurrency"] for point in entry["points"]}) for entry in series), default=0) < 2:
        return
    words = f"{data['base_model']['weights'].capitalize()} weights. "
    words += "Bars: 95 % intervals. Dotted: the most or the least that this machine allows. Crosses: not valid."
    for kind, draw, caption in (
        ("serving", plots.serving, "Throughput and waiting over concurrent requests"),
        ("pareto", plots.pareto, "What one user gets and what all get together, at the concurrency beside each point"),
    ):
        figure = slug(kind, name)
        yield ("figure", figure, draw(figure, series), f"{caption}: {name}. {words}")
