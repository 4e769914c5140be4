"""
The figures of the answer page (lib/report/answer_page.py) and of the fine-tuning chapter's opening, each labelled where
its data stands.
"""

from lib.report.canvas import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, TEXT, VERMILION, drawn, new_figure

GROUP_COLOURS = {
    "holds": GREEN, "consistent": "#bfe5d8", "does not hold": VERMILION, "no answer": "#bbbbbb", "opinion": "#e0e0e0",
}  # fmt: skip
# How a bar looks: an estimate is hollow, what somebody else published is hatched.
KINDS = {
    "measured": {"color": BLUE},
    "published": {"color": GREY, "hatch": "///", "edgecolor": "white"},
    "estimated": {"facecolor": "none", "edgecolor": BLUE, "linestyle": "--"},
}
MODELS = (("base", "base model", GREY), ("lora", "LoRA", BLUE), ("qlora", "QLoRA", ORANGE))
MEASURES_A_ROW = 2


def verdict_bar(name, groups):
    """One bar of all claims; groups: {group: {verdict: claims}}, verdicts with claims only."""
    figure, (axes,) = new_figure(1.0)
    sums = {group: count for group, of in groups.items() if (count := sum(of.values()))}
    start = 0
    for number, (group, count) in enumerate(sums.items()):
        middle, side = start + count / 2, 1 if number % 2 else -1  # above and below in turn: narrow parts stay apart
        axes.barh(0, count, left=start, color=GROUP_COLOURS[group], edgecolor="white")
        axes.text(middle, 0, str(count), ha="center", va="center", color="black", fontweight="bold")
        axes.text(middle, side * 0.5, group, ha="center", va="bottom" if side > 0 else "top", fontsize=8)
        start += count
    axes.set(xlim=(0, start), ylim=(-0.8, 0.8))
    axes.set_axis_off()
    return drawn(figure, name, groups=groups)


def bars(name, entries, unit):
    """One labelled bar an entry; entries: [(label, value, kind of KINDS)] or, with an interval, [(..., low, high)]."""
    figure, (axes,) = new_figure(0.8 + 0.42 * len(entries))
    most = max(end or 0 for _, value, _, *ends in entries for end in (value, *ends))
    for place, (_, value, kind, *ends) in enumerate(entries):
        axes.barh(place, value, height=0.62, **KINDS[kind])
        ends = ends if None not in ends else []
        if ends:
            axes.plot(ends, [place] * 2, "-", color=TEXT, linewidth=1.5, marker="|")
        axes.text(max([value, *ends]) + 0.015 * most, place, f"{value:,.0f}", va="center")
    axes.set_yticks(range(len(entries)), [label for label, *_ in entries])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set(xlabel=unit, xlim=(0, 1.14 * most))
    return drawn(figure, name, entries=entries)


def style_distances(name, measures):
    """Distance from the reference answers; measures: {measure: {"base" | "lora" | "qlora": standard deviations}}."""
    figure, (axes,) = new_figure(1.2 + 0.34 * len(measures))
    axes.axvline(0, color=TEXT, linewidth=1)
    for number, (who, label, colour) in enumerate(MODELS):
        places = [place + 0.16 * (number - 1) for place in range(len(measures))]
        values = [of[who] for of in measures.values()]
        axes.plot(values, places, MARKERS[number], color=colour, label=label, markersize=6)
    axes.set_yticks(range(len(measures)), [measure.replace("_", " ") for measure in measures])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("standard deviations from the reference answers (0: alike)")
    figure.legend(loc="outside lower center", ncols=3)
    return drawn(figure, name, measures=measures)


def style_measures(name, measures):
    """A panel a measure: the dataset and the models as points with their 95 % intervals, the dataset's as a line too.

    measures: {measure: {"dataset" | "base" | "lora" | "qlora": {mean, low, high}}}.
    """
    rows = -(-len(measures) // MEASURES_A_ROW)
    figure, panels = new_figure(0.2 + 1.05 * rows, len(measures), MEASURES_A_ROW)
    shown = (*MODELS, ("dataset", "dataset", GREEN))
    for axes, (measure, means) in zip(panels, measures.items(), strict=True):
        if means["dataset"]["mean"] is not None:
            axes.axvline(means["dataset"]["mean"], color=GREEN, linewidth=1)
        for place, (who, _, colour) in enumerate(shown):
            mean = means[who]
            if mean["mean"] is None:  # too short answers for this measure
                continue
            if mean["low"] is not None:
                axes.plot([mean["low"], mean["high"]], [place] * 2, "-", color=colour, linewidth=2)
            axes.plot(mean["mean"], place, MARKERS[place], color=colour)
        axes.set_yticks(range(len(shown)), [label for _, label, _ in shown])
        axes.set(ylim=(len(shown) - 0.5, -0.5), title=measure.replace("_", " "))
        axes.margins(x=0.1)
        axes.tick_params(labelsize=7.5)
    return drawn(figure, name, measures=measures)


def beside(name, pairs, labels, unit):
    """Two runs beside each other; pairs: [(what, this run's value, the other's)], labels: the two runs."""
    figure, (axes,) = new_figure(0.8 + 0.5 * len(pairs))
    most = max(value for _, *values in pairs for value in values)
    for number, label in enumerate(labels):
        places = [place + 0.36 * (number - 0.5) for place in range(len(pairs))]
        values = [pair[number + 1] for pair in pairs]
        axes.barh(places, values, height=0.34, color=COLOURS[0] if number == 0 else GREY)
        for row, (place, value) in enumerate(zip(places, values, strict=True)):
            words = f"{value:,.1f}" + (f" {label}" if row == 0 else "")
            axes.text(value + 0.01 * most, place, words, va="center", fontsize=8)
    axes.set_yticks(range(len(pairs)), [what for what, *_ in pairs])
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.14 * most))
    return drawn(figure, name, pairs=pairs, labels=labels)
