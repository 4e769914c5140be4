"""
The time of a request inside Triton: the Python steps around the engine, by Triton's own counters.

The engine's model is decoupled: it takes a request over and returns at once, so Triton counts no time of it.
"""

from lib.serving.answers import read_samples

STEPS = ("preprocessing", "postprocessing")
RUNS = "nv_inference_exec_count"
DURATION, QUEUE = "nv_inference_request_duration_us", "nv_inference_queue_duration_us"


def step_times(before, after):
    """Two Prometheus texts of Triton, around a load -> {triton_STEP_ms, triton_STEP_queue_ms, triton_STEP_runs}.

    Each is a mean over the requests: milliseconds in the step, queue included; milliseconds in its queue alone; how
    often it ran. The preprocessing runs once a request, the postprocessing once a streamed piece. None where Triton
    does not tell.
    """
    start, end = by_model(before), by_model(after)
    change = {key: value - start[key] for key, value in end.items() if key in start}
    requests = change.get((RUNS, STEPS[0]))

    def mean(metric, step, per=1):
        total = change.get((metric, step))
        return total / requests / per if requests and total is not None else None

    times = {}
    for step in STEPS:
        times[f"triton_{step}_ms"] = mean(DURATION, step, 1000)
        times[f"triton_{step}_queue_ms"] = mean(QUEUE, step, 1000)
        times[f"triton_{step}_runs"] = mean(RUNS, step)
    return times


def by_model(text):
    """Prometheus text -> {(metric, model): value}; empty where the text is malformed."""
    labelled = [sample for sample in read_samples(text) if "model" in sample.labels]
    return {(sample.name.removesuffix("_total"), sample.labels["model"]): sample.value for sample in labelled}
