"""
The figures of the answer page (lib/report/answer_page.py), each labelled where its data stands.
"""

from lib.report.plots import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, TEXT, VERMILION, drawn, new_figure

GROUP_COLOURS = {
    "holds": GREEN, "consistent": "#bfe5d8", "does not hold": VERMILION, "no answer": "#bbbbbb", "opinion": "#e0e0e0",
}  # fmt: skip


def verdict_bar(name, groups):
    """One bar of all claims; groups: {group: {verdict: claims}}, verdicts with claims only."""
    figure, (axes,) = new_figure(1.3)
    total, start = sum(sum(of.values()) for of in groups.values()), 0
    for group, of in groups.items():
        width = sum(of.values())
        axes.barh(0, width, left=start, color=GROUP_COLOURS[group], edgecolor="white", label=f"{width} {group}")
        if width > 0.03 * total:
            axes.text(start + width / 2, 0, str(width), ha="center", va="center", color="black", fontweight="bold")
        start += width
    axes.set(xlim=(0, total))
    axes.set_axis_off()
    figure.legend(loc="outside lower center", ncols=3)
    return drawn(figure, name, groups=groups)


def bars(name, entries, unit):
    """One labelled bar an entry; entries: [(label, value, kind)], kind "published" is hatched."""
    figure, (axes,) = new_figure(0.8 + 0.42 * len(entries))
    most = max(value for _, value, _ in entries)
    for place, (_, value, kind) in enumerate(entries):
        style = {"color": GREY, "hatch": "///", "edgecolor": "white"} if kind == "published" else {"color": BLUE}
        axes.barh(place, value, height=0.62, **style)
        axes.text(value + 0.01 * most, place, f"{value:,.0f}", va="center")
    axes.set_yticks(range(len(entries)), [label for label, _, _ in entries])
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.14 * most))
    return drawn(figure, name, entries=entries)


def style_distances(name, measures):
    """Distance from the reference answers; measures: {measure: {"base" | "lora" | "qlora": standard deviations}}."""
    figure, (axes,) = new_figure(1.2 + 0.34 * len(measures))
    axes.axvline(0, color=TEXT, linewidth=1)
    for number, (who, label, colour) in enumerate(
        (("base", "base", GREY), ("lora", "LoRA", BLUE), ("qlora", "QLoRA", ORANGE))
    ):
        places = [place + 0.16 * (number - 1) for place in range(len(measures))]
        values = [of[who] for of in measures.values()]
        axes.plot(values, places, MARKERS[number], color=colour, label=label, markersize=6)
    axes.set_yticks(range(len(measures)), [measure.replace("_", " ") for measure in measures])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("standard deviations from the reference answers (0: alike)")
    figure.legend(loc="outside lower center", ncols=3)
    return drawn(figure, name, measures=measures)


def beside(name, pairs, labels, unit):
    """Two runs beside each other; pairs: [(what, this run's value, the other's)], labels: the two runs."""
    figure, (axes,) = new_figure(1.2 + 0.5 * len(pairs))
    most = max(value for _, *values in pairs for value in values)
    for number, label in enumerate(labels):
        places = [place + 0.36 * (number - 0.5) for place in range(len(pairs))]
        values = [pair[number + 1] for pair in pairs]
        axes.barh(places, values, height=0.34, color=COLOURS[0] if number == 0 else GREY, label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.01 * most, place, f"{value:,.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(pairs)), [what for what, *_ in pairs])
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.14 * most))
    figure.legend(loc="outside lower center", ncols=2)
    return drawn(figure, name, pairs=pairs, labels=labels)
