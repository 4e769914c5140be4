"""`make experiments` and `make bench`: what there is to measure, what it takes, and how one experiment is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import REPO, only_error, run_in
from contracts import BrokenContract, Contract

from lib.bench.experiments import Bench, visits, with_experiment
from lib.claims.claims import load_claims
from lib.claims.runs import lookup
from lib.core.stage import load_yaml, read_params
from tools.experiments import HEADER, row


def listed(tree):
    """{experiment: its cells by heading} of what `make experiments` prints."""
    done = run_in(tree, "make", "--no-print-directory", "experiments")
    assert done.returncode == 0, done.stderr
    _, header, *lines = done.stdout.splitlines()
    starts = [header.index(name) for name in HEADER]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[:-2]]
    return {one[0]: dict(zip(HEADER, one, strict=True)) for one in cells}, lines


def test_the_list_shows_points_and_command_of_each_experiment(tree):
    found, lines = listed(tree)
    p = read_params(Bench, REPO / "params.yaml")
    assert [name.removesuffix(" *") for name in found] == list(p.definitions)
    assert {name[:-2] for name in found if name.endswith(" *")} == set(p.experiments)
    assert found["base *"]["points"] == "4" and found["base *"]["run it with"] == "make bench EXPERIMENT=base"
    assert found["gpt-oss"]["servers"] == "vllm-gpt-oss" and found["gpt-oss"]["model"] == "gpt-oss-20b:mxfp4"
    assert lines[-1] == "minutes: about those of two CPU cores (what needs a GPU: of one H200), unless measured here"


def test_minutes_are_estimated_until_the_machine_measured_some(tmp_path, monkeypatch):
    p = read_params(Bench, REPO / "params.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    plan = list(visits(with_experiment(p, "base")))
    points = sum(len(group) for _, group in plan)
    cells = dict(zip(HEADER, row(p, "base", "cpu"), strict=True))
    # By hand: 4 starts of 60 s, 6 points of 15.3 s (7 answers of 16 tokens, one after the other), 6 of 14.5 s (4 of 4).
    assert (cells["starts"], cells["minutes"]) == ("4", "7")
    # 7 starts of 120 s, 9 points of 153 s: 2 rounds of 1,000 tokens at 46 ms, 2,048,000 tokens to read.
    assert {row(p, "gpt-oss-search", kind)[HEADER.index("minutes")] for kind in ("cpu", "gpu")} == {"37"}
    measured = {"ready": {"triton": 30, "vllm": 30}, "points": {"vllm-64-32-c1-corrected": 30}}
    (tmp_path / ".work" / "embedded").mkdir(parents=True)
    (tmp_path / ".work" / "embedded" / "bench-base.seconds.json").write_text(json.dumps(measured))
    assert row(p, "base", "cpu")[HEADER.index("minutes")] == f"{30 * (len(plan) + points) / 60:.0f} (measured here)"


def test_the_list_names_a_missing_gpu_or_server():
    p = read_params(Bench, REPO / "params.yaml")
    assert row(p, "int4", "cpu")[HEADER.index("run it with")] == "(needs a GPU)"
    assert row(p, "int4", "gpu")[HEADER.index("run it with")] == "make bench EXPERIMENT=int4"
    p.servers = ["triton"]
    assert row(p, "walk", "cpu")[-1] == "none of bench.servers"


# One experiment, under a real DVC, with a stage that writes down how often it ran.

STAGE = """\
import os, pathlib, sys
name, budget = sys.argv[1], os.environ.get("BUDGET")
with open("runs", "a") as runs:
    runs.write(f"{name} {budget}\\n")
path = pathlib.Path("results/embedded/bench", name, "vllm/points.json")
path.parent.mkdir(parents=True)
path.write_text("partial" if budget else "whole")
sys.exit(75 if budget else 0)
"""


@pytest.fixture
def project(tmp_path):
    """A folder with DVC, the benchmark's parameters, and a stage that stands for the benchmark's."""
    for name in ("lib", "stages", "tools", "containers"):
        shutil.copytree(REPO / name, tmp_path / name)
    for name in ("params.yaml", "experiments.yaml"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / ".venvs").symlink_to(REPO / ".venvs")
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  bench:\n    foreach: ${bench.experiments}\n    do:\n      cmd: python3 stage.py ${key}\n"
        "      outs: ['results/embedded/bench/${key}']\n"
    )
    assert run_in(tmp_path, "containers/run", "venv:tools", "dvc", "init", "--no-scm", "--quiet").returncode == 0

    def make(name, **environment):
        command = ["containers/run", "venv:tools", "python", "-m", "tools.bench", *name.split()]
        done = run_in(tmp_path, *command, environment=environment)
        make.runs = (tmp_path / "runs").read_text().splitlines() if (tmp_path / "runs").exists() else []
        return done

    make.points = tmp_path / "results/embedded/bench/walk/vllm/points.json"
    return make


def test_a_cut_sweep_fails_keeps_its_curve_and_resumes(project):
    cut = project("walk", BUDGET="30m")
    assert cut.returncode != 0 and project.points.read_text() == "partial"
    assert project("walk").returncode == 0 and project.points.read_text() == "whole"
    assert project("walk").returncode == 0
    assert project.runs == ["walk 30m", "walk None"]  # whole, and nothing has changed


def test_an_experiment_outside_the_profile_joins_params_yaml(project):
    done = project("walk")
    assert "params.yaml: bench.experiments has walk now" in done.stdout
    params = load_yaml(project.points.parents[5] / "params.yaml")
    assert params["bench"]["experiments"] == {"base": "base", "lora": "lora", "walk": "base"}
    assert "params.yaml" not in project("walk").stdout


def test_a_budget_without_a_unit_is_refused(project):
    assert (
        only_error(project("walk", BUDGET="30")) == "error: BUDGET is '30'; write a number and s, m or h, such as 30m"
    )
    assert project.runs == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "EXPERIMENT is missing; use one of base, lora, walk"),
        ("new", "experiments.yaml: bench.definitions has no 'new'; it has base, lora, walk"),
        ("int4", "EXPERIMENT is int4, which serves llama-2-7b:int4-g128; nvidia-smi finds no GPU for that"),
        ("lengths", "bench.definitions.lengths asks vllm for 2176 tokens in and out; its options have --max-model"),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(project, name, message):
    assert message in only_error(project(name))
    assert project.runs == []


def test_too_few_gpus_are_refused_before_an_experiment_starts(project, tmp_path):
    (tmp_path / "bin").mkdir()
    two = "NVIDIA H200, 143771, 570.86.15\nNVIDIA H200, 143771, 570.86.15"
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{two}'\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    error = only_error(project("tensor-parallel", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
    assert error == (
        "error: experiments.yaml: bench.definitions.tensor-parallel.servers has vllm-tp4, which wants 4 GPUs; there "
        "are 2: leave it out"
    )
    assert project.runs == []


def test_the_published_vllm_has_every_option_of_its_experiments():
    p, contract = read_params(Bench, REPO / "params.yaml"), Contract("vllm-serve")
    refused = {}
    for name, words in p.configurations.items():
        try:
            contract.parse([*contract.data["program"], *words])
        except BrokenContract as error:
            refused[name] = str(error)
    assert list(refused) == ["gpt-oss-newer", "gpt-oss-newer-kv8"]
    assert all("--stream-interval" in why for why in refused.values())
    for words in (p.configurations["graphs"], p.configurations["ngram"]):
        json.loads(words[0].partition("=")[2])


def profile_params(name):
    """params.yaml's section bench under a profile."""
    values = load_yaml(REPO / f"profiles/{name}.yaml")["bench"]
    return Bench(**load_yaml(REPO / "params.yaml")["bench"] | values)


def as_result(points):
    """What points.json says of these points before they are measured."""
    keys = ("concurrency", "input_tokens_asked", "output_tokens_asked")
    values = [(one.concurrency, one.input_tokens, one.output_tokens) for one in points]
    return {"points": [dict(zip(keys, each, strict=True)) for each in values]}


def test_the_command_of_a_claim_measures_each_point_it_reads():
    _, claims = load_claims(REPO / "data/claims")
    read = [(figure, claim.command) for claim in claims if claim.measure for figure in claim.figures.values()]
    figures = [(Path(one["file"]).parts, one["key"].rpartition(".")[0], command) for one, command in read]
    figures = [
        (*parts[1:3], key, command) for parts, key, command in figures if parts[0] == "bench" and "points[" in key
    ]
    profiles, missing = [profile_params(name) for name in ("writeup", "weightless")], set()
    for experiment, server, key, command in figures:
        asked = command == f"make bench EXPERIMENT={experiment}"
        plans = [visits(with_experiment(p, experiment)) for p in profiles if asked or experiment in p.experiments]
        if not any(lookup(as_result(group), key) for plan in plans for name, group in plan if name == server):
            missing.add((experiment, server, key))
    assert len(figures) > 70 and missing == set()
