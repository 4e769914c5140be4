"""
The figures of the report's chapters.
"""

from lib.analysis.metrics import PER_USER, RATE, panel_title
from lib.report.canvas import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    VERMILION,
    concurrency_axis,
    decades,
    drawn,
    label_lines,
    legend,
    look,
    new_figure,
)

# In the order of lib/claims/kinds.py; a paler shade of the same colour is weaker evidence.
VERDICT_COLOURS = (GREEN, SKY, VERMILION, PURPLE, "#7fcfb6", "#eaa27a", "#d9a0c5", "#bfe5d8", "#a5d4f3", "#f3c9ae",
                   "#e8e8e8", ORANGE, GREY)  # fmt: skip
# A term of predicted memory has one look in every figure.
MEMORY_TERMS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "dequantised",
                "temporaries", "workspace", "loader", "slack", "context")  # fmt: skip


def losses(name, curves):
    """Training and validation loss over optimiser steps; curves: {variant: rows of steps.csv, as numbers or None}."""
    figure, (axes,) = new_figure(2.6 + 0.2 * len(curves))
    for number, (variant, rows) in enumerate(curves.items()):
        style = look(number)
        for key, line, label, marker in (
            ("loss", "-", "training", ""),
            ("eval_loss", "--", "validation", style["marker"]),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                words = {"label": f"{variant}, {label}", "color": style["color"], "marker": marker}
                axes.plot(*zip(*points, strict=True), line, markersize=4, **words)
    axes.set(xlabel="optimiser step", ylabel="loss")
    label_lines(figure, [axes])
    return drawn(figure, name, curves=curves)


def memory(name, bars):
    """A stacked bar of predicted terms for every fine-tuning; bars: [(label, {term: MiB}, measured MiB, (low, high))].

    The measured process is a line across its bar, the published range a band behind it; None: not published. Predicted
    and measured stand beside the bar as numbers.
    """
    figure, (axes,) = new_figure(1.6 + 0.34 * len(bars))
    terms = {term for _, sizes, _, _ in bars for term, mib in sizes.items() if mib}
    lefts = [0.0] * len(bars)
    for n, term in enumerate(MEMORY_TERMS):
        if term not in terms:
            continue
        widths = [sizes.get(term, 0) for _, sizes, _, _ in bars]
        hatch = "" if n < len(COLOURS) else "////"
        colour = COLOURS[n % len(COLOURS)]
        axes.barh(
            range(len(bars)), widths, left=lefts, height=0.62, color=colour, label=term, hatch=hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, (predicted, (_, _, measured, (low, high))) in enumerate(zip(lefts, bars, strict=True)):
        axes.plot([measured] * 2, [place - 0.42, place + 0.42], color=TEXT, linewidth=2)
        if low is not None:
            axes.barh(place, max(high - low, 150), left=low, height=0.95, color=GREY, alpha=0.45, zorder=0)
        words = f"{predicted:,.0f} | {measured:,.0f}"
        axes.annotate(words, (1.02, place), xycoords=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.annotate("predicted | measured", (1.02, 1), xycoords="axes fraction", va="bottom", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, _, _, _ in bars])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("MiB")
    figure.legend(loc="outside lower center", ncols=3)
    return drawn(figure, name, bars=bars)


def scaling(name, points):
    """Seconds a step and tokens a second over the GPUs; points: [(GPUs, seconds, tokens/s)], one GPU first."""
    figure, panels = new_figure(4.4, panels=2)
    gpus, seconds, rates = (list(column) for column in zip(*points, strict=True))
    ideals = [seconds[0] / n for n in gpus], [rates[0] * n for n in gpus]
    for axes, values, ideal, title in zip(
        panels, (seconds, rates), ideals, ("seconds a step", "tokens/s of all GPUs"), strict=True
    ):
        axes.plot(gpus, ideal, "--", color=GREY, label="ideal")
        axes.plot(gpus, values, "-o", color=BLUE, label="measured")
        axes.set(title=title, ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xticks(gpus, [str(n) for n in gpus])
    panels[-1].set_xlabel("GPUs")
    label_lines(figure, panels)
    return drawn(figure, name, points=points)


def shown(axes, number, entry, key, across="concurrency"):
    """One series: its valid points joined, with their intervals, invalid ones as grey crosses apart from the line."""
    known = [point for point in entry["points"] if point[key] is not None and point[across] is not None]
    good = [(point[across], point[key]) for point in known if point["valid"]]
    style = look(number)
    if good:
        axes.plot(*zip(*good, strict=True), "--" if entry["stand_in"] else "-", label=entry["label"], **style)
    for point in known:
        if point["valid"] and (span := point["intervals"].get(key)):
            axes.plot(
                [point[across]] * 2, span, "-", color=style["color"], linewidth=4, alpha=0.4, solid_capstyle="butt"
            )
    if bad := [(point[across], point[key]) for point in known if not point["valid"]]:
        axes.plot(*zip(*bad, strict=True), "x", color=GREY, label="not valid")


def bounds(axes, series, key, across="concurrency"):
    """The limits of the series, each once; several are told apart by the colour of the one series that each is for."""
    limits = {}
    for number, entry in enumerate(series):
        if points := tuple((point[across], point[key]) for point in entry["limit"]):
            limits.setdefault(points, []).append(COLOURS[number % len(COLOURS)])
    for points, colours in limits.items():
        own = len(limits) > 1 and len(colours) == 1
        style = {"color": colours[0] if own else TEXT, "linewidth": 1.3}
        label = "the machine's limit" + (", each in its line's colour" if len(limits) > 1 else "")
        axes.plot(*zip(*points, strict=True), ":", label=label, **style)


def serving(name, series):
    """Throughput, wait for the first token and time between tokens over concurrency, with intervals and limits.

    series: [{label, stand_in, points, limit}]; a point has concurrency, valid, intervals and, under these names,
    tokens_per_second, ttft_ms and itl_ms; so has a point of the limit. A stand-in is drawn dashed.
    """
    figure, panels = new_figure(6.6 + 0.2 * len(series), panels=3)
    shown_numbers = {"tokens_per_second": RATE, "ttft_ms": "ttft_ms_p50", "itl_ms": "itl_ms_p50"}
    titles = {key: panel_title(number) for key, number in shown_numbers.items()}
    levels = sorted({point["concurrency"] for entry in series for point in entry["points"]})
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for number, entry in enumerate(series):
            shown(axes, number, entry, key)
        if key != "ttft_ms":
            bounds(axes, series, key)
        axes.set_title(title)
        axes.grid()
        concurrency_axis(axes, levels)
        if key == "tokens_per_second":
            decades(axes, "y")
        else:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter("{x:,g}")
    panels[-1].set_xlabel("concurrent requests")
    label_lines(figure, panels)
    return drawn(figure, name, series=series)


def pareto(name, series):
    """What one user gets against what all get together, a point a load; series: as in serving, with
    per_user_tokens_per_second."""
    figure, (axes,) = new_figure(3.6 + 0.2 * len(series))
    across = PER_USER
    for number, entry in enumerate(series):
        shown(axes, number, entry, "tokens_per_second", across)
        for point in entry["points"]:
            if point["tokens_per_second"] is not None and point[across] is not None:
                place = (point[across], point["tokens_per_second"])
                axes.annotate(str(point["concurrency"]), place, (4, 4), textcoords="offset points", fontsize=7)
    bounds(axes, series, "tokens_per_second", across)
    axes.set(xlabel=panel_title(across), title=panel_title(RATE))
    decades(axes, "xy")
    axes.grid()
    legend(figure, [axes])
    return drawn(figure, name, series=series)


def verdicts(name, counts, order):
    """One stacked bar a writeup; counts: {writeup: {verdict: claims}}, order: the verdicts from left to right."""
    figure, (axes,) = new_figure(0.9 + 0.4 * len(counts))
    for verdict, colour in zip(order, VERDICT_COLOURS, strict=True):
        widths = [100 * of[verdict] / sum(of.values()) for of in counts.values()]
        starts = [100 * sum(of[v] for v in order[: order.index(verdict)]) / sum(of.values()) for of in counts.values()]
        axes.barh(range(len(counts)), widths, left=starts, color=colour, height=0.6, label=verdict)
        for place, (width, start, of) in enumerate(zip(widths, starts, counts.values(), strict=True)):
            if width > 5:
                axes.text(
                    start + width / 2, place, str(of[verdict]), ha="center", va="center", fontsize=8, color="black"
                )
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.set(xlabel="% of its claims", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=2)
    return drawn(figure, name, counts=counts)


def estimates(name, series):
    """Estimated tokens/s over users as hollow points with their band, published and measured figures filled.

    series: [{label, kind, points}]; a point has concurrency and tokens_per_second, an estimated one low and high.
    """
    figure, (axes,) = new_figure(4.2)
    levels = sorted({point["concurrency"] for entry in series for point in entry["points"]})
    for number, entry in enumerate(series):
        style = look(number)
        users, rates = zip(
            *[(point["concurrency"], point["tokens_per_second"]) for point in entry["points"]], strict=True
        )
        if entry["kind"] == "estimated":
            axes.plot(users, rates, ":", markerfacecolor="none", label=entry["label"], **style)
            ends = [[point[end] for point in entry["points"]] for end in ("low", "high")]
            axes.fill_between(users, *ends, color=style["color"], alpha=0.12, linewidth=0)
        else:
            axes.plot(users, rates, linestyle="none", label=entry["label"], **style)
    axes.set(xlabel="concurrent requests", title=panel_title(RATE))
    axes.grid()
    concurrency_axis(axes, levels)
    decades(axes, "y")
    label_lines(figure, [axes])
    return drawn(figure, name, series=series)
