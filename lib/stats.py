"""
Bootstrap intervals and ratios of repeated measurements.
"""

import statistics


def ratio(above, below, middle="median"):
    """{ratio, low, high} of two lists of repeats: their medians (or "mean") divided, and its 95 % interval."""
    import numpy

    generator, of = numpy.random.default_rng(BOOTSTRAP_SEED), getattr(numpy, middle)
    drawn = [of(generator.choice(repeats, (BOOTSTRAP_SAMPLES, len(repeats))), axis=1) for repeats in (above, below)]
    low, high = numpy.quantile(drawn[0] / drawn[1], [0.025, 0.975]).tolist()
    enough = min(len(above), len(below)) >= REPEATS_NEEDED
    quotient = getattr(statistics, middle)(above) / getattr(statistics, middle)(below)
    return {"ratio": quotient, "low": low if enough else None, "high": high if enough else None}


BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED = 2000, 42
REPEATS_NEEDED = 3  # below, an interval would be the two figures themselves


def interval(numbers, middle="median"):
    """The 95 % bootstrap interval of the median (or "mean"), as [low, high]."""
    import numpy

    drawn = numpy.random.default_rng(BOOTSTRAP_SEED).choice(numbers, (BOOTSTRAP_SAMPLES, len(numbers)))
    return numpy.quantile(getattr(numpy, middle)(drawn, axis=1), [0.025, 0.975]).tolist()
