"""
Servers held against each other: a comparison is the ratio of two medians with its 95 % bootstrap interval over the
repeats. It is called a difference only where the interval leaves out 1 and the ratio is further from 1 than a server's
own repeats are from each other.
"""

import statistics

from stages.points import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED, REPEATS_NEEDED

RATE = "output_tokens_per_second"
SAME_SPEED = "cannot be told apart"
NO_INTERVAL = f"no verdict: fewer than {REPEATS_NEEDED} repeats"


def counted_by(point, name):
    """The key of a point's number: the throughput by the server's own count of tokens, where it has one."""
    server = f"server_{RATE}"
    return server if name == RATE and point.get(server) is not None else name


def set_right(point, name):
    """What a client's number is multiplied by where the client counted other tokens than the server made, as
    genai-perf, which tokenises an answer again, may: it divides latency - TTFT by (tokens - 1), a time between tokens,
    and takes the inverse, tokens/s a user. Both counts are means over the requests, and so is the factor."""
    counted, made = point.get("output_tokens"), point.get("server_output_tokens")
    if not counted or not made or min(counted, made) <= 1 or not name.startswith(("itl_ms", "per_user")):
        return 1
    return (counted - 1) / (made - 1) if name.startswith("itl_ms") else (made - 1) / (counted - 1)


def value(point, name):
    """A number of a point or None; see counted_by and set_right."""
    found = point.get(counted_by(point, name))
    return None if found is None else found * set_right(point, name)


def span(point, name):
    """The interval of a point's number, as [low, high], or None."""
    found = point["intervals"].get(counted_by(point, name))
    return found and [end * set_right(point, name) for end in found]


def repeated(point, name, every=False):
    """A number of every valid repeat of a point, or of every repeat; an empty list where one does not have it."""
    found = [value(one, name) for one in point["repeats"] if every or one["valid"]]
    return [] if None in found else found


def noise(runs, name, every=False):
    """How far a repeat lies from the median of its own point, at most, over all points: A against A.

    every: repeats that are not valid too.
    """
    spread = [0.0]
    for one in runs:
        for point in one["points"]:
            found = repeated(point, name, every)
            spread += [abs(figure / statistics.median(found) - 1) for figure in found]
    return max(spread)


def ratio(above, below, middle="median"):
    """{ratio, low, high} of two lists of repeats: their medians (or "mean") divided, and its 95 % interval."""
    import numpy

    generator, of = numpy.random.default_rng(BOOTSTRAP_SEED), getattr(numpy, middle)
    drawn = [of(generator.choice(one, (BOOTSTRAP_SAMPLES, len(one))), axis=1) for one in (above, below)]
    low, high = numpy.quantile(drawn[0] / drawn[1], [0.025, 0.975]).tolist()
    enough = min(len(above), len(below)) >= REPEATS_NEEDED
    found = getattr(statistics, middle)(above) / getattr(statistics, middle)(below)
    return {"ratio": found, "low": low if enough else None, "high": high if enough else None}


def compared(above, below, name, floor, names, every=False):
    """{ratio, low, high, verdict} of a number of two points; None where one is not valid or has no such number.

    floor: the noise of equal runs; names: what the two are called in the verdict; every: points that are not valid too.
    """
    pair = [repeated(point, name, every) for point in (above, below)]
    if not all(every or point["valid"] for point in (above, below)) or not all(pair):
        return None
    found = ratio(*pair)
    if found["low"] is None:
        return {**found, "verdict": NO_INTERVAL}
    if found["low"] <= 1 <= found["high"] or abs(found["ratio"] - 1) <= floor:
        return {**found, "verdict": SAME_SPEED}
    return {**found, "verdict": f"{names[0] if found['ratio'] > 1 else names[1]} higher"}
