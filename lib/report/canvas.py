"""
What all figures share: the style (canvas.mplstyle), colours that colour-blind readers tell apart, markers that tell the
same in print, labels at the ends of lines, and an SVG whose ids stay apart on a page. Each figure keeps its data.
"""

import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)
TEXT = "#010203"  # stands for the page's text colour: replaced by currentColor
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.9  # inches: the labels stay readable when a phone shows the figure at its own width
DOTS_PER_INCH = 150
LABEL_LETTERS, LABEL_LINE = 17, 0.14  # of a label at a line's end: letters a row, inches a row
LEGEND_LETTERS = 60  # in a row of a legend


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


def use_style():
    """Set matplotlib to the figures' style."""
    import matplotlib.style

    matplotlib.style.use(Path(__file__).with_suffix(".mplstyle"))


def new_figure(height, panels=1, columns=1):
    """(figure, axes) of `panels` panels, `columns` in a row, without a window."""
    use_style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [figure.add_subplot(-(-panels // columns), columns, n + 1) for n in range(panels)]


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


def look(number):
    """Colour and marker of a series; beyond seven the colours come again with other markers."""
    rounds = number // len(COLOURS)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + rounds) % len(MARKERS)]}


# Axes.


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


# Labels.


def label_lines(figure, panels):
    """The name of each line at its right end, in every panel; one legend below where the names do not fit."""
    inches = 0.72 * figure.get_figheight() / len(panels)
    ends = [line_ends(axes) for axes in panels]
    if max(sum(map(rows_of, names)) for names in ends) * LABEL_LINE > inches:
        legend(figure, panels)
        return
    for axes, names in zip(panels, ends, strict=True):
        label_ends(axes, names, LABEL_LINE / inches)


def line_ends(axes):
    """{label: (x, y, colour)} of the right end of each named line, once a name."""
    ends = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if len(handle.get_xdata()):
            x, y = max(zip(handle.get_xdata(), handle.get_ydata(), strict=True))
            ends.setdefault(label, (x, y, handle.get_color()))
    return ends


def rows_of(label):
    return len(textwrap.wrap(label, LABEL_LETTERS))


def label_ends(axes, ends, row):
    """Write the names right of the axes, each as high as its line ends, or as near as its neighbours allow.

    ends: as line_ends gives them; row: the height of a row of text as a share of the axes.
    """
    place = axes.transScale + axes.transLimits
    axes.get_xlim(), axes.get_ylim()  # the limits are those of the data from here on
    heights = {label: place.transform((x, y))[1] for label, (x, y, _) in ends.items()}
    order = sorted(ends, key=heights.get)
    top = 0.0
    for label in order:  # from below: no label begins under the end of the one before
        half = rows_of(label) * row / 2
        heights[label] = max(heights[label], top + half)
        top = heights[label] + half
    limit = max(1.0, sum(rows_of(label) for label in order) * row)
    for label in reversed(order):  # from above: those that were pushed out come back
        half = rows_of(label) * row / 2
        heights[label] = min(heights[label], limit - half)
        limit = heights[label] - half
    for label, (x, y, colour) in ends.items():
        axes.annotate(
            textwrap.fill(label, LABEL_LETTERS), (x, y), (1.06, heights[label]), textcoords="axes fraction",
            va="center", fontsize=8, linespacing=1.0, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def legend(figure, panels):
    """One legend for all panels, below them."""
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = 2 if max(map(len, handles), default=0) <= LEGEND_LETTERS / 2 else 1
    labels = [textwrap.fill(label, LEGEND_LETTERS) for label in handles]
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns)
