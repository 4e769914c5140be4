"""tools/reproduce.py: the time left that a run shows, on the recorded times of two machines."""

import time
from types import SimpleNamespace

import pytest
from conftest import REPO

from lib.core.stage import load_yaml
from tools.reproduce import STAGE_SECONDS, Progress, seconds_left

SLOW = load_yaml(REPO / STAGE_SECONDS)["embedded"]
# The stages of more than ten seconds on another machine of two cores.
FAST = {
    "limits": 16, "base_model": 24, "vram": 12, "finetune@lora": 118, "finetune@qlora": 137, "chat": 40, "style": 83,
    "bench@base": 158, "bench@lora": 83, "report": 23,
}  # fmt: skip
MINUTES = load_yaml(REPO / "profiles/embedded.yaml")["estimate"]["minutes"]


def split(times, after):
    """The times of the stages up to `after`, and those of the stages that follow."""
    place = list(times).index(after) + 1
    return dict(list(times.items())[:place]), dict(list(times.items())[place:])


@pytest.mark.parametrize(
    ("machine", "table"), [({name: SLOW[name] for name in FAST}, FAST), (FAST, SLOW)], ids=["slow", "fast"]
)
def test_the_time_left_after_training_is_within_35_percent(machine, table):
    taken, left = split(machine, "finetune@qlora")
    assert seconds_left(list(left), taken, table, MINUTES) == pytest.approx(sum(left.values()), rel=0.35)


@pytest.mark.parametrize("after", ["base_model", "finetune@lora", "bench@base", "claims"])
def test_the_reference_pace_gives_the_sum_of_the_table(after):
    taken, left = split(SLOW, after)
    assert seconds_left(list(left), taken, SLOW, MINUTES) == pytest.approx(sum(left.values()))


def test_the_times_of_this_checkout_come_first():
    assert seconds_left(["a", "b"], {"a": 300, "b": 5}, {"a": 100, "b": 100}, 1) == 305
    assert seconds_left(["b", "c"], {"a": 300, "b": 5}, {"a": 100, "c": 10}, 1) == 5 + 3 * 10


def test_the_estimate_counts_until_enough_has_run():
    assert seconds_left(list(SLOW), {}, SLOW, MINUTES) == pytest.approx(60 * MINUTES)
    taken, left = split(SLOW, "machine")
    share = sum(left.values()) / sum(SLOW.values())
    assert seconds_left(list(left), {"machine": 9 * taken["machine"]}, SLOW, MINUTES) == pytest.approx(
        60 * MINUTES * share
    )


def test_a_stage_without_a_time_makes_the_time_left_unknown():
    assert seconds_left(["bench@mine"], {}, SLOW, MINUTES) is None
    assert seconds_left(["bench@mine"], {"bench@mine": 4}, {}, MINUTES) == 4


@pytest.mark.parametrize(("names", "line"), [(["a"], ", about 3 min left"), (["b"], ", about 1 min left"), ([], "")])
def test_a_line_rounds_the_time_left_up(names, line):
    assert Progress.left(SimpleNamespace(names=names, seconds={"a": 130, "b": 4}, table={}, minutes=9)) == line


@pytest.mark.parametrize(("elapsed", "line"), [(90, ", about 8 min left"), (600, "")])
def test_without_a_table_the_estimate_counts_down(elapsed, line):
    run = SimpleNamespace(names=["c"], seconds={}, table={}, minutes=9, begun=time.monotonic() - elapsed)
    assert Progress.left(run) == line
