"""
The report's figures as SVG text: colours that colour-blind readers tell apart (Okabe and Ito), text and axes in the
page's own colour, ids that stay apart when several figures stand on one page.
"""

import io
import re
import textwrap

ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)
VERDICT_COLOURS = (GREEN, SKY, VERMILION, PURPLE, ORANGE, GREY)
TEXT = "#010203"  # stands for the page's text colour: replaced by currentColor
WIDTH = 4.9  # inches: the labels stay readable when a phone shows the figure at its own width


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


def svg(figure, name):
    """The figure as one <svg> element; `name` goes before its ids."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()
    whole = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    whole = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", whole)
    return whole.replace(TEXT, "currentColor")


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
    return svg(figure, name)


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
    return svg(figure, name)


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
    return svg(figure, name)


def serving(name, servers):
    """Throughput and time to the first token over concurrency; servers: {label: (points, is a stand-in)}.

    A stand-in is drawn dashed, an invalid point hollow.
    """
    figure, panels = new_figure(4.9, panels=2)
    quantities = (("output_tokens_per_second", "output tokens/s"), ("ttft_ms_p50", "first token, ms (median)"))
    for axes, (key, title) in zip(panels, quantities, strict=True):
        for colour, (label, (points, stand_in)) in zip(COLOURS, servers.items(), strict=False):
            known = [point for point in points if point.get(key) is not None]
            x, y = [point["concurrency"] for point in known], [point[key] for point in known]
            axes.plot(x, y, "--" if stand_in else "-", color=colour, label=label)
            for point in known:
                fill = colour if point.get("valid", True) else "none"
                axes.plot(point["concurrency"], point[key], "o", color=colour, markerfacecolor=fill, markersize=5)
        axes.set(xlabel="concurrent requests", title=title, ylim=(0, None))
        axes.set_xscale("log", base=2)
        levels = sorted({point["concurrency"] for points, _ in servers.values() for point in points})
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    wrapped = [textwrap.fill(label, 60) for label in labels]
    figure.legend(handles, wrapped, loc="outside lower center", ncols=1)
    return svg(figure, name)


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
    return svg(figure, name)
