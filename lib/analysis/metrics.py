"""
The metrics of a served point as they are shown: titles with units, and which direction is better.

Measuring has its own table (lib/serving/client_summary.py) and does not import this one: another title measures nothing
again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    column: str  # heading of a table's column
    title: str  # of a figure's panel
    higher_is_better: bool


RATE = "output_tokens_per_second"
PER_USER = "per_user_tokens_per_second"
METRICS = {
    RATE: Metric("tokens/s", "output tokens/s, all users", True),
    PER_USER: Metric("tokens/s a user", "output tokens/s, one user", True),
    "ttft_ms": Metric("first token ms", "first token after ms", False),
    "itl_ms": Metric("between tokens ms", "ms between tokens", False),
}
SHOWN = (RATE, PER_USER, "ttft_ms_p50", "itl_ms_p50")  # of every point, in tables and figures
PERCENTILES = ("p50", "p90", "p95", "p99")  # of TTFT and ITL, shown and compared


def metric_of(number):
    """The metric of a number of points.json: of ttft_ms_p50 that of ttft_ms."""
    return METRICS[number if number in METRICS else number.rpartition("_")[0]]


def panel_title(number):
    """The title of a figure's panel, with the statistic of a time."""
    metric = metric_of(number)
    statistic = {"p50": "median", "avg": "mean"}.get(number.rpartition("_")[2], number.rpartition("_")[2])
    return metric.title if number in METRICS else f"{metric.title} ({statistic})"
