"""
How far the estimates are from what was measured, and the band that follows; whether a published figure lies inside it.

Pure functions on JSON data: no package, no file.
"""

import itertools

from lib.analysis.metrics import PER_USER, RATE, metric_of

# Numbers that a band is made for. The time to the first token has none: the package assumes that prompts arrive one
# after the other, and ours arrive together.
NUMBERS = (RATE, PER_USER, "itl_ms_avg")
LOADS = ((1, "1 user"), (16, "2 to 16 users"), (float("inf"), "more than 16 users"))


def load_group(users):
    """The group of loads that share a band."""
    return next(name for most, name in LOADS if users <= most)


def calibration_row(labels, measured, estimated):
    """One measured point beside its estimate: {number: {measured, estimated, ratio}}; labels say which point it is."""
    numbers = {
        name: {"measured": measured[name], "estimated": estimated[name], "ratio": measured[name] / estimated[name]}
        for name in (*NUMBERS, "ttft_ms_avg")
        if measured.get(name) and estimated.get(name)
    }
    return {**labels, "load": load_group(labels["concurrency"]), "numbers": numbers}


def make_bands(rows):
    """[{weights_format, load, number, points, low, high}]: measured over estimated, at least and at most.

    1 is always inside: the rows are of vLLM, and another engine may be estimated better.
    """
    groups = {}
    for row in rows:
        for name in NUMBERS:
            if name in row["numbers"]:
                key = (row["weights_format"], row["load"], name)
                groups.setdefault(key, []).append(row["numbers"][name]["ratio"])
    return [
        {
            "weights_format": weights,
            "load": load,
            "number": name,
            "points": len(ratios),
            "low": min(1, *ratios),
            "high": max(1, *ratios),
        }
        for (weights, load, name), ratios in groups.items()
    ]


def point_bands(point, weights, bands):
    """{number: {low, high}} of an estimated point; empty where nothing of its format and load was measured.

    weights: the format, or None for the widest band of all formats: that of an engine which was not measured.
    """
    load, widest = load_group(point["concurrency"]), {}
    for band in bands:
        if band["load"] == load and weights in (None, band["weights_format"]):
            low, high = widest.get(band["number"], (1, 1))
            widest[band["number"]] = min(low, band["low"]), max(high, band["high"])
    return {name: {"low": point[name] * low, "high": point[name] * high} for name, (low, high) in widest.items()}


def bounded_bands(points, limit):
    """{number: {low, high}} of a format without kernels: from the slowest band of the `points` in other formats to the
    card's own limit, {number: value}."""
    bands = {}
    for name in NUMBERS:
        known = [point["band"][name] for point in points if name in point["band"]]
        if known and limit.get(name):
            faster = metric_of(name).higher_is_better
            worst = min(band["low"] for band in known) if faster else max(band["high"] for band in known)
            bands[name] = {"low": min(worst, limit[name]), "high": max(worst, limit[name])}
    return bands


def judge(published, figures, compute=None):
    """{verdict, reason} of a published figure or conclusion against estimates; None where the bands do not decide.

    published: the figure, or None for a conclusion, which `compute` answers with true or false.
    figures: {name: {value, low, high, bounded}}; a bounded one can only disagree, for its band is no calibration.
    compute: a function of {name: value}, the one figure itself if left out.
    """
    compute = compute or (lambda values: next(iter(values.values())))
    corners = itertools.product(*[[(name, figure["low"]), (name, figure["high"])] for name, figure in figures.items()])
    answers = [compute(dict(corner)) for corner in corners]
    value = compute({name: figure["value"] for name, figure in figures.items()})
    if published is None:
        if len({bool(answer) for answer in answers}) > 1:
            return None
        verdict = "estimate agrees" if answers[0] else "estimate disagrees"
        return {"verdict": verdict, "reason": "the conclusion comes out the same anywhere in the calibrated band"}
    low, high = min(answers), max(answers)
    where = "inside" if low <= published <= high else "below" if published < low else "above"
    if where == "inside" and any(figure["bounded"] for figure in figures.values()):
        return None
    verdict = "estimate agrees" if where == "inside" else "estimate disagrees"
    reason = f"published {published:,g} lies {where} the band of {low:,.5g} to {high:,.5g}"
    return {"verdict": verdict, "reason": f"{reason} (estimated {value:,.5g})"}
