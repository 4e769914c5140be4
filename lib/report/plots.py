"""
The report's figures: colours that colour-blind readers tell apart (Okabe and Ito), markers and dashes that tell the
same in print, text and axes in the page's own colour, ids that stay apart when several figures stand on one page. Each
keeps the data that it shows.
"""

import io
import re
import textwrap
from dataclasses import dataclass

from lib.analysis.metrics import PER_USER, RATE, panel_title

ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)
# In the order of lib/claims/kinds.py; a paler shade of the same colour is weaker evidence.
VERDICT_COLOURS = (GREEN, SKY, VERMILION, PURPLE, "#7fcfb6", "#eaa27a", "#d9a0c5", "#bfe5d8", "#a5d4f3", "#f3c9ae",
                   "#e8e8e8", ORANGE, GREY)  # fmt: skip
TEXT = "#010203"  # stands for the page's text colour: replaced by currentColor
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.9  # inches: the labels stay readable when a phone shows the figure at its own width
DOTS_PER_INCH = 150


@dataclass
class Drawn:
    """A figure as SVG text, its data, and the figure itself, for other forms of it."""

    svg: str
    data: dict
    figure: object

    def png(self):
        bytes_ = io.BytesIO()
        self.figure.savefig(bytes_, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
        return bytes_.getvalue()


def new_figure(height, panels=1):
    """(figure, axes) of `panels` panels one below the other, without a window."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 8, "axes.titlesize": 9, "axes.titlelocation": "left",
        **{key: TEXT for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    })  # fmt: skip
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [figure.add_subplot(panels, 1, n + 1) for n in range(panels)]


def drawn(figure, name, **data):
    """The figure as one <svg> element; `name` goes before its ids. data: what it shows, for a file beside it."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()
    whole = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    whole = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", whole)
    return Drawn(whole.replace(TEXT, "currentColor"), data, figure)


def losses(name, curves):
    """Training and validation loss over optimiser steps; curves: {variant: rows of steps.csv, as numbers or None}."""
    figure, (axes,) = new_figure(2.6 + 0.2 * len(curves))
    for colour, (variant, rows) in zip(COLOURS, curves.items(), strict=False):
        for key, style, label in (("loss", "-", "training"), ("eval_loss", "--o", "validation")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=f"{variant}, {label}")
    axes.set(xlabel="optimiser step", ylabel="loss")
    figure.legend(loc="outside lower center", ncols=2)
    return drawn(figure, name, curves=curves)


def memory(name, bars):
    """A stacked bar of predicted terms for every fine-tuning; bars: [(label, {term: MiB}, measured MiB, (low, high))].

    The measured process is a line across its bar, the published range a band behind it; None: not published.
    """
    figure, (axes,) = new_figure(1.6 + 0.34 * len(bars))
    terms = list(dict.fromkeys(term for _, sizes, _, _ in bars for term, mib in sizes.items() if mib))
    lefts = [0.0] * len(bars)
    for n, term in enumerate(terms):
        widths = [sizes.get(term, 0) / 1024 for _, sizes, _, _ in bars]
        hatch = "" if n < len(COLOURS) else "////"
        colour = COLOURS[n % len(COLOURS)]
        axes.barh(
            range(len(bars)), widths, left=lefts, height=0.62, color=colour, label=term, hatch=hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, (_, _, measured, (low, high)) in enumerate(bars):
        axes.plot([measured / 1024] * 2, [place - 0.42, place + 0.42], color=TEXT, linewidth=2)
        if low is not None:
            width = max(high - low, 150) / 1024
            axes.barh(place, width, left=low / 1024, height=0.95, color=GREY, alpha=0.45, zorder=0)
    axes.set_yticks(range(len(bars)), [label for label, _, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
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
        axes.plot(gpus, values, "-o", color=BLUE, markersize=5, label="measured")
        axes.set(title=title, ylim=(0, None))
        axes.set_xticks(gpus, [str(n) for n in gpus])
    panels[-1].set_xlabel("GPUs")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn(figure, name, points=points)


def concurrency_axis(axes, levels):
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.minorticks_off()


def decades(axes, which):
    """Logarithmic axes: the gap to a limit is the share of it at every load."""
    from matplotlib.ticker import LogLocator, NullLocator

    for letter in which:
        getattr(axes, f"set_{letter}scale")("log")
        axis = getattr(axes, f"{letter}axis")
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axis.set_major_formatter("{x:,g}")
    axes.margins(**dict.fromkeys(which, 0.12))


def shown(axes, number, entry, key, across="concurrency"):
    """One series: its valid points joined, with their intervals, invalid ones as grey crosses apart from the line."""
    known = [point for point in entry["points"] if point[key] is not None and point[across] is not None]
    good = [(point[across], point[key]) for point in known if point["valid"]]
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = {"color": colour, "marker": marker, "markersize": 5, "label": entry["label"]}
    if good:
        axes.plot(*zip(*good, strict=True), "--" if entry["stand_in"] else "-", **style)
    for point in known:
        if point["valid"] and (span := point["intervals"].get(key)):
            axes.plot([point[across]] * 2, span, "-", color=colour, linewidth=4, alpha=0.4, solid_capstyle="butt")
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


def legend(figure, panels):
    """One legend for all panels, below them."""
    found = {}
    for axes in panels:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [textwrap.fill(label, 60) for label in found]
    figure.legend(list(found.values()), labels, loc="outside lower center", ncols=1)


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
        axes.grid(alpha=0.25)
        concurrency_axis(axes, levels)
        if key == "tokens_per_second":
            decades(axes, "y")
        else:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter("{x:,g}")
    panels[-1].set_xlabel("concurrent requests")
    legend(figure, panels)
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
    axes.grid(alpha=0.25)
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

    series: [{label, estimated, points}]; a point has concurrency and tokens_per_second, an estimated one low and high.
    """
    figure, (axes,) = new_figure(3.6 + 0.2 * len(series))
    levels = sorted({point["concurrency"] for entry in series for point in entry["points"]})
    for number, entry in enumerate(series):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        users, rates = zip(*[(one["concurrency"], one["tokens_per_second"]) for one in entry["points"]], strict=True)
        style = {"color": colour, "marker": marker, "markersize": 6, "label": entry["label"]}
        if entry["estimated"]:
            axes.plot(users, rates, ":", markerfacecolor="none", **style)
            ends = [[one[end] for one in entry["points"]] for end in ("low", "high")]
            axes.fill_between(users, *ends, color=colour, alpha=0.12, linewidth=0)
        else:
            axes.plot(users, rates, linestyle="none", **style)
    axes.set(xlabel="concurrent requests", title=panel_title(RATE))
    axes.grid(alpha=0.25)
    concurrency_axis(axes, levels)
    decades(axes, "y")
    legend(figure, [axes])
    return drawn(figure, name, series=series)
