"""stages/limits.py: what this machine copies, reads and multiplies, each with its spread, and why something was not."""

import json

import pytest
from conftest import only_error, run_in, set_params, stage

from stages.limits import Limits, best, run_probe


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    """limits.json of a run on this machine with small sizes."""
    from conftest import copy_tree

    tree = copy_tree(tmp_path_factory.mktemp("limits") / "tree")
    set_params(tree, limits={"mib": 8, "side": 64, "calls": 1, "repeats": 3})
    stage(tree, "venv:tools", "machine")
    return json.loads((stage(tree, "venv:pytorch", "limits") / "limits.json").read_text())


def test_memory_and_matrix_units_are_measured_without_a_gpu(limits):
    measured = {name for probes in limits["probes"].values() for name, one in probes.items() if one["median"]}
    assert measured == {"copy", "sum", "matrix_vector", "matrix_bf16", "matrix_fp32"}


def test_every_probe_says_least_median_and_most_of_its_repeats(limits):
    for one in (one for probes in limits["probes"].values() for one in probes.values() if one["median"]):
        assert 0 < one["least"] <= one["median"] <= one["most"] and one["not_measured"] is None
    assert limits["repeats"] == 3


def test_a_limit_is_the_fastest_probe(limits):
    for limit in ("bytes_per_second", "flops_per_second"):
        assert limits[limit] == max(one["median"] for one in limits["probes"][limit].values())
    # Memory here moves between a hundred MB and a TB a second: a wrong unit would be outside.
    assert 1e8 < limits["bytes_per_second"] < 1e12


def test_what_this_machine_has_not_is_null_with_the_reason(limits):
    fp8 = limits["probes"]["fp8_flops_per_second"]["matrix_fp8"]
    assert limits["fp8_flops_per_second"] is fp8["median"] is None and "capability 8.9" in fp8["not_measured"]


def test_the_result_names_the_device_and_what_made_it(limits):
    assert limits["device"].endswith("threads") and "torch" in limits["made_by"]["versions"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory\nmore"), AttributeError("no _scaled_mm")])
def test_a_probe_that_fails_says_why_and_leaves_the_others(error):
    def make(device, p):
        raise error

    found = run_probe(make, "cuda", Limits(1, 16, 1, 1))
    assert found["median"] is None and found["not_measured"] == str(error).splitlines()[0]
    assert best({"broken": found, "works": {"median": 5.0}}) == 5.0 and best({"broken": found}) is None


@pytest.mark.parametrize(("key", "value"), [("mib", 0), ("repeats", 0), ("calls", -1), ("side", 100)])
def test_a_size_that_cannot_be_measured_is_one_line(tree, key, value):
    set_params(tree, limits={key: value})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.limits")
    assert only_error(done).startswith(f"error: params.yaml: limits.{key} is {value}; ")
