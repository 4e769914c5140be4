"""The times of Triton's Python steps, from its own metrics: recorded around three streams of eight tokens each."""

import pytest
from conftest import REPO

from lib.bench.triton_steps import step_times

BEFORE, AFTER = (
    (REPO / f"tests/fixtures/serving/triton-metrics-{when}.txt").read_text() for when in ("before", "after")
)


def test_each_step_has_its_time_a_request():
    times = step_times(BEFORE, AFTER)
    # The first request waits for the tokenizer; the last piece of a stream may carry no token.
    assert times["triton_preprocessing_runs"] == 1 and 8 <= times["triton_postprocessing_runs"] <= 9
    for step in ("preprocessing", "postprocessing"):
        assert 0 < times[f"triton_{step}_queue_ms"] < times[f"triton_{step}_ms"] < 1000


@pytest.mark.parametrize("text", ["", "vllm:prompt_tokens_total 3\n", "no exposition at all {"])
def test_without_tritons_counters_every_time_is_unknown(text):
    assert set(step_times(text, text).values()) == {None}


def test_without_a_request_every_time_is_unknown():
    assert set(step_times(BEFORE, BEFORE).values()) == {None}
