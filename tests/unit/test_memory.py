"""lib/training/memory.py: the memory of a process while it trains."""

import pytest
from conftest import copy_tree, probe


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return probe(copy_tree(tmp_path_factory.mktemp("memory") / "tree"), "venv:pytorch", "memory")


def test_a_peak_belongs_to_the_phase_it_occurs_in(sampled):
    phases = {name: phase["process_peak_mib"] for name, phase in sampled["summary"]["phases"].items()}
    assert 390 < phases["step"] - phases["load"] < 450
    assert phases["eval"] < phases["load"] + 100


def test_a_repeated_phase_keeps_its_highest_peak(sampled):
    summary = sampled["summary"]
    assert summary["process_peak_mib"] == summary["phases"]["step"]["process_peak_mib"]


def test_a_machine_without_a_gpu_has_no_gpu_figures(sampled):
    summary = sampled["summary"]
    assert summary["device"] == "resident (CPU)"
    assert summary["torch_allocated_peak_mib"] is None and summary["torch_reserved_peak_mib"] is None


def test_the_sampler_stops_with_its_block(sampled):
    assert sampled["threads"] == 0
