"""
Servers held against each other: a comparison is the ratio of two medians with its 95 % bootstrap interval over the
repeats. It is called a difference only where the interval leaves out 1 and the ratio is further from 1 than a server's
own repeats are from each other.
"""

import statistics

from lib.stats import REPEATS_NEEDED, ratio

SAME_SPEED = "cannot be told apart"
NO_INTERVAL = f"no verdict: fewer than {REPEATS_NEEDED} repeats"


def read_repeats(point, name, every=False):
    """A number of every valid repeat of a point, or of every repeat; an empty list if one of them lacks it."""
    numbers = [repeat.get(name) for repeat in point["repeats"] if every or repeat["valid"]]
    return [] if None in numbers else numbers


def noise(runs, name, every=False):
    """How far a repeat lies from the median of its own point, at most, over all points: A against A.

    every: repeats that are not valid too.
    """
    spread = [0.0]
    for run in runs:
        for point in run["points"]:
            figures = read_repeats(point, name, every)
            spread += [abs(figure / statistics.median(figures) - 1) for figure in figures]
    return max(spread)


def compare(above, below, name, floor, names, every=False):
    """{ratio, low, high, verdict} of a number of two points; None where one is not valid or has no such number.

    floor: the noise of equal runs; names: what the two are called in the verdict; every: points that are not valid too.
    """
    pair = [read_repeats(point, name, every) for point in (above, below)]
    if not all(every or point["valid"] for point in (above, below)) or not all(pair):
        return None
    quotient = ratio(*pair)
    if quotient["low"] is None:
        return {**quotient, "verdict": NO_INTERVAL}
    if quotient["low"] <= 1 <= quotient["high"] or abs(quotient["ratio"] - 1) <= floor:
        return {**quotient, "verdict": SAME_SPEED}
    return {**quotient, "verdict": f"{names[0] if quotient['ratio'] > 1 else names[1]} higher"}
