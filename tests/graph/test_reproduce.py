"""The whole graph in a fresh clone, as `dvc repro` runs it, with the smallest settings: minutes, no GPU."""

import csv
import re
import subprocess

import psutil
import pytest
from conftest import OWN_NETWORK, copy_tree, run_in, set_params, variables
from smallest import SMALLEST

from lib.core.stage import read_json


def git(tree, *words):
    done = run_in(tree, "git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dvc(tree, *words):
    """Run a dvc command that must succeed; returns the stages that it ran."""
    # As a person would: the commit is the clone's own.
    own = ("REPO_COMMIT", "REPO_DIRTY")
    environment = {name: value for name, value in variables().items() if name not in own}
    done = subprocess.run(
        [*OWN_NETWORK, "containers/run", "venv:tools", "dvc", *words],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return re.findall(r"(?m)^Running stage '([^']+)'", done.stdout)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with the smallest settings, all of it run once: (tree, the stages that ran)."""
    tree = copy_tree(tmp_path_factory.mktemp("clone") / "tree")
    set_params(tree, **SMALLEST)
    if OWN_NETWORK:  # without a way out nothing could be fetched any more
        environments = ("tools", "pytorch", "vllm", "client")
        run_in(tree, "containers/venv", *environments, check=True)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "all")
    return tree, dvc(tree, "repro")


def test_a_fresh_clone_runs_every_stage_of_the_graph(clone):
    tree, ran = clone
    listed = run_in(tree, "containers/run", "venv:tools", "dvc", "stage", "list", "--name-only").stdout.split()
    assert sorted(ran) == sorted(listed) and len(ran) >= 16


def test_every_result_records_its_commit_and_environment(clone):
    tree, _ = clone
    commit = git(tree, "rev-parse", "HEAD")
    found = {}
    for path in sorted((tree / "results" / "embedded").rglob("*.json")):
        content = read_json(path)
        if isinstance(content, dict) and "made_by" in content and "reference" not in path.parts:
            found[str(path.relative_to(tree / "results" / "embedded"))] = content["made_by"]
    assert {"finetune/lora/metrics.json", "vram/vram.json", "chat/chat.json"} <= found.keys()
    for made in found.values():
        assert made["commit"] == commit and made["dirty"] is False and made["image"].startswith("venv:")
        assert re.fullmatch("[0-9a-f]{64}", made["lock_sha256"])


def test_the_numbers_of_the_smallest_run_are_there(clone):
    tree, _ = clone
    results = tree / "results" / "embedded"
    for method in ("lora", "qlora"):
        metrics = read_json(results / "finetune" / method / "metrics.json")
        assert metrics["optimizer_steps"] == 2 and metrics["weights"] == "real" and metrics["wall_seconds"] > 0
    for name in ("base/triton", "base/vllm", "lora/triton", "lora/vllm"):
        (point,) = read_json(results / "bench" / name / "points.json")["points"]
        assert point["requests"] == 2 and point["output_tokens"] == 8
    assert (results / "claims" / "claims.json").is_file() and (results / "report" / "index.html").is_file()


def test_nothing_that_a_stage_started_outlives_it(clone):
    tree, _ = clone
    alive = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if (process.info["cwd"] or "").startswith(str(tree)):
            alive.append(process.info["cmdline"])
    assert alive == []


def test_a_second_run_looks_at_the_machine_and_does_nothing_else(clone):
    tree, _ = clone
    assert dvc(tree, "repro") == ["machine"]


def test_a_new_rank_does_not_rerun_the_base_model_benchmark(clone):
    tree, _ = clone
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "a run")
    targets = ["finetune@lora", "bench@base"]
    # An engine must have room for the rank; here none is built, so nothing that stands on it changes.
    ran = dvc(tree, "exp", "run", "-S", "lora.r=8", *targets)
    assert sorted(ran) == ["engine@corrected", "finetune@lora", "machine"]
    metrics = read_json(tree / "results" / "embedded" / "finetune" / "lora" / "metrics.json")
    assert metrics["lora"]["r"] == 8 and metrics["trainable_parameters"] == 2 * 1_221_120
    shown = run_in(tree, "containers/run", "venv:tools", "dvc", "exp", "show", "--csv", "--only-changed").stdout
    rows = {row["rev"]: row for row in csv.DictReader(shown.splitlines())}
    sizes = {(row["lora.r"], row["lora.trainable_parameters"]) for row in rows.values()}
    assert sizes == {("4", "1221120"), ("8", "2442240")}


def test_a_queued_experiment_uses_the_existing_environments(clone):
    tree, _ = clone
    # --temp is what `dvc queue start` does, in front: a copy of the tree. Without a way out nothing can be installed.
    assert dvc(tree, "exp", "run", "--temp", "-S", "lora.r=16", "machine") == ["machine"]
    assert list((tree / ".dvc" / "tmp" / "exps").glob("**/.venvs")) == []
    assert (tree / ".venvs" / "tools" / "bin" / "python").exists()
