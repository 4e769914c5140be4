"""
The answers of a running server about itself: its version, counters and gauges.
"""

import json
import math

from lib.core.stage import UserError
from lib.core.web import UNANSWERED, open_url

URL = "http://127.0.0.1:8000"


def answer(path, url=URL):
    """The JSON that the running server answers a GET with."""
    try:
        with open_url(url + path, timeout=10) as response:
            return json.load(response)
    except UNANSWERED as error:
        raise UserError(f"{url}{path}: the server is ready and does not answer this: {error}") from None


def exposition(server):
    """The server's own figures now, as Prometheus text; empty if it has none."""
    try:
        with open_url(server.metrics, timeout=10) as response:
            return response.read().decode(errors="replace")
    except UNANSWERED:
        return ""


def read_metrics(server, names):
    """The server's own figures now, by our `names`; an empty dict if it has none."""
    return sums(exposition(server), names)


def sums(text, names):
    """Prometheus text -> our name -> the sum over all labels of the metric.

    A metric that is not there, or is no finite number, is left out: unknown in the validity checks.
    """
    samples = read_samples(text)
    values = {
        name: [sample.value for sample in samples if sample.name in (metric, f"{metric}_total")]
        for name, metric in names.items()
    }
    return {name: sum(numbers) for name, numbers in values.items() if numbers and math.isfinite(sum(numbers))}


def read_samples(text):
    """Every sample of a Prometheus text, with its name, labels and value; an empty list where the text is malformed.

    The parser adds _total to the name of a counter that lacks it.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError:
        return []
