"""stages/serving_summary.py: one table of every served point of every run."""

import json

import pytest
from conftest import REPO, copy_tree, run_in

REFERENCE = REPO / "results/reference"


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """What the stage writes of the published runs."""
    tree = copy_tree(tmp_path_factory.mktemp("summary") / "tree")
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.serving_summary")
    assert done.returncode == 0, done.stderr
    return json.loads((tree / "results/embedded/serving_summary/summary.json").read_text())


def points_of(summary):
    for run in summary["runs"].values():
        for experiment in run["experiments"].values():
            yield from experiment["points"]


def test_every_published_point_stands_in_the_table_once(summary):
    points = [json.loads(path.read_text())["points"] for path in REFERENCE.glob("*/bench/*/*/points.json")]
    assert len(list(points_of(summary))) == sum(map(len, points)) > 100


def test_a_point_holds_its_share_of_the_limit(summary):
    for point in points_of(summary):
        rate = point["numbers"]["output_tokens_per_second"]["value"]
        if point["limit"]:
            assert point["share"] == pytest.approx(rate / point["limit"]["tokens_per_second"])
        else:
            assert point["share"] is None


def test_a_number_lies_within_its_interval(summary):
    numbers = [number for point in points_of(summary) for number in point["numbers"].values()]
    bounded = [number for number in numbers if number["low"] is not None]
    assert len(bounded) > 100
    assert all(number["low"] <= number["value"] <= number["high"] for number in bounded)


def test_servers_are_divided_by_plain_vllm(summary):
    base = summary["runs"]["embedded-2-cores"]["experiments"]["base"]
    assert {row["divided_by"] for row in base["comparisons"]} == {"vllm"}
    assert {row["server"] for row in base["comparisons"]} == {"triton (stand-in)"}
