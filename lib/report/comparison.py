"""
The comparison of this checkout's servers: curves of every server in one figure, and their ratios in a table.
"""

import textwrap

from lib.analysis.metrics import PER_USER, PERCENTILES, RATE, panel_title
from lib.core.stage import REPRO, UserError
from lib.report import canvas

EXPERIMENTS = ("base", "lora")  # those that are drawn over each other, where a run has them
LINES = {"base": "-", "lora": "--"}
SAME_WORK = ("base_model", "lengths")  # what experiments must share to stand in one figure


def panels(percentile):
    """{number in the summary: title of its panel}."""
    return {name: panel_title(name) for name in (RATE, PER_USER, f"ttft_ms_{percentile}", f"itl_ms_{percentile}")}


def compared_experiments(run):
    """{name: experiment} of one run; UserError where there is none, or where they did not do the same work."""
    experiments = {name: run["experiments"][name] for name in EXPERIMENTS if name in run["experiments"]}
    if not experiments:
        raise UserError(f"there is no benchmark of this checkout; `{REPRO} bench` makes it")
    first, *others = experiments
    for name in others:
        for key in SAME_WORK:
            values = [work_of(experiments[each])[key] for each in (name, first)]
            if values[0] != values[1]:
                words = f"{key} is {values[0]!r} in {name} and {values[1]!r} in {first}"
                raise UserError(f"the experiments cannot be compared: {words}; `{REPRO} bench` measures both alike")
    return experiments


def work_of(experiment):
    return {"base_model": experiment["base_model"], "lengths": experiment["settings"]["lengths"]}


def ratio_rows(experiments, percentile):
    """The ratios of the summary, one row an experiment, server and load; None where a point is not valid."""
    return [
        {"experiment": name, **{key: row[key] for key in ("server", "divided_by", "load")}}
        | {number: row["numbers"][number] for number in panels(percentile)}
        for name, experiment in experiments.items()
        for row in experiment["comparisons"]
    ]


def remarks(experiments):
    """What a reader of the figure must know: stand-ins, formats, servers without points, invalid points."""
    lines = []
    for name, experiment in experiments.items():
        formats = {server["name"]: format_words(server) for server in experiment["servers"] if server["points"]}
        if len(set(formats.values())) > 1:
            each = ", ".join(f"{server} {words}" for server, words in formats.items())
            lines.append(f"{name}: the servers hold other formats ({each}), so their ratios compare these too")
        for server in experiment["servers"]:
            if server["engine_is_stand_in"]:
                lines.append(f"{server['name']}-{name}: {server['engine']}")
            if server["not_measured"]:
                lines.append(f"{server['name']}-{name}: not measured ({server['not_measured']})")
        for point in experiment["points"]:
            lines += [f"{point['server']}-{name}, {point['load']}: {reason}" for reason in point["invalid_reasons"]]
    return lines


def line_label(server, experiment):
    """A line's name in the legend: engine and formats; a stand-in is never shown under another engine's name."""
    engine = "stand-in engine" if server["engine_is_stand_in"] else server["engine"]
    return f"{server['name']}: {engine}, {format_words(server)}, {experiment}"


def format_words(server):
    """The formats of a server's weights and of its keys and values."""
    return f"{server['weights_format'] or 'unknown'} weights, {server['kv_format'] or 'unknown'} cache"


def heading(experiment):
    base, lengths = experiment["base_model"], experiment["settings"]["lengths"]
    weights = "" if base["weights"] == "real" else f" ({base['weights']} weights)"
    return f"{base['name']}{weights}: {' and '.join(f'{i} tokens in, {o} out' for i, o in lengths)}"


def draw_comparison(experiments, percentile):
    """The comparison as one figure: four panels, the legend above, the remarks below."""
    canvas.use_style()
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(s["name"] for e in experiments.values() for s in e["servers"]))
    colours = dict(zip(names, canvas.COLOURS, strict=False))
    notes = [textwrap.fill(line, 150, subsequent_indent="    ") for line in remarks(experiments)]
    figure = Figure(figsize=(9, 6.6 + 0.16 * "\n".join(notes).count("\n")), layout="constrained")
    levels = sorted({point["concurrency"] for each in experiments.values() for point in each["points"]})
    handles = {}
    for axes, (number, title) in zip(figure.subplots(2, 2).flat, panels(percentile).items(), strict=True):
        for name, experiment in experiments.items():
            for server in experiment["servers"]:
                draw_line(axes, server, name, experiment, number, colours[server["name"]])
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
        axes.set_title(title)
        axes.set_xlabel("concurrent users")
        if levels:
            canvas.concurrency_axis(axes, levels)
        axes.set_ylim(bottom=0)
        axes.grid()
    title = heading(next(iter(experiments.values())))
    figure.legend(handles=handles.values(), loc="outside upper center", ncols=2, frameon=False, title=title)
    figure.supxlabel("\n".join(notes), fontsize=7, ha="left", x=0.01)
    return figure


def draw_line(axes, server, name, experiment, number, colour):
    """One server: valid points joined with their intervals, invalid ones as grey crosses apart from the line."""
    points = [
        (point["concurrency"], point["numbers"][number], point["valid"])
        for point in experiment["points"]
        if point["server"] == server["label"] and point["numbers"][number]["value"] is not None
    ]
    valid = [(level, value["value"]) for level, value, is_valid in points if is_valid]
    if valid:
        label = line_label(server, name)
        axes.plot(*zip(*valid, strict=True), f"o{LINES[name]}", color=colour, label=label)
    for level, value, is_valid in points:
        if is_valid and value["low"] is not None:
            axes.plot([level] * 2, [value["low"], value["high"]], "-", color=colour, linewidth=3, alpha=0.5)
    if invalid := [(level, value["value"]) for level, value, is_valid in points if not is_valid]:
        axes.plot(*zip(*invalid, strict=True), "x", color=canvas.GREY, label="not valid, see below")


def check_percentile(percentile):
    if percentile not in PERCENTILES:
        known = ", ".join(PERCENTILES)
        raise UserError(f"params.yaml: bench_vllm_vs_trtllm.percentile is {percentile!r}; use one of {known}")
