"""`make experiments` and `make bench`: what there is to measure, what it takes, and how one experiment is run."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import REPO, TINY_SHAPE, at_once, only_error, run_in, stage
from contracts import BrokenContract, Contract

from lib.bench.experiments import Bench, unfinished, visits, with_experiment
from lib.claims.claims import load_claims
from lib.claims.runs import lookup
from lib.core.stage import load_yaml, read_json, read_params, write_json
from tools.experiments import HEADER, row, table


def listed(tree):
    """{experiment: its cells by heading} of what `make experiments` prints."""
    done = run_in(tree, "make", "--no-print-directory", "experiments")
    assert done.returncode == 0, done.stderr
    _, header, *lines = done.stdout.splitlines()
    starts = [header.index(name) for name in HEADER]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[:-2]]
    return {one[0]: dict(zip(HEADER, one, strict=True)) for one in cells}, lines


def test_every_experiment_stands_there_with_what_it_measures_and_what_runs_it(tree):
    found, lines = listed(tree)
    p = read_params(Bench, REPO / "params.yaml")
    assert [name.removesuffix(" *") for name in found] == list(p.definitions)
    assert {name[:-2] for name in found if name.endswith(" *")} == set(p.experiments)
    assert found["base *"]["points"] == "4" and found["base *"]["run it with"] == "make bench EXPERIMENT=base"
    assert found["gpt-oss"]["servers"] == "vllm-gpt-oss" and found["gpt-oss"]["model"] == "gpt-oss-20b:mxfp4"
    assert lines[-1] == "minutes: about those of two CPU cores (what needs a GPU: of one H200), unless measured here"


def test_the_minutes_go_by_the_loads_until_something_was_measured_here(tmp_path, monkeypatch):
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


def test_what_serves_a_shape_needs_a_gpu_and_what_no_server_runs_says_so():
    p = read_params(Bench, REPO / "params.yaml")
    assert row(p, "int4", "cpu")[HEADER.index("run it with")] == "(needs a GPU)"
    assert row(p, "int4", "gpu")[HEADER.index("run it with")] == "make bench EXPERIMENT=int4"
    p.servers = ["triton"]
    assert row(p, "walk", "cpu")[-1] == "none of bench.servers"


def test_columns_stand_below_each_other():
    assert table([("a", "b"), ("long", "c")]) == ["a     b", "long  c"]


# One experiment, under a real DVC, with a stage that writes down how often it ran.

STAGE = """\
import json, os, pathlib, sys
name = sys.argv[1]
with open("runs", "a") as runs:
    runs.write(f"{name} {os.environ.get('EXPERIMENT')} {os.environ.get('BUDGET')}\\n")
asked = os.environ.get("EXPERIMENT") == name
reason = None if asked and not os.environ.get("BUDGET") else "the budget ended after 1 of 4 measurements"
reason = reason if asked else f"params.yaml: bench.experiments has no {name}"
path = pathlib.Path("results/embedded/bench", name, "vllm/points.json")
path.parent.mkdir(parents=True)
path.write_text(json.dumps({"not_measured": reason}))
"""


@pytest.fixture
def project(tmp_path):
    """A folder with DVC, the benchmark's parameters, and one stage for the experiments walk and int4."""
    for name in ("lib", "stages", "tools", "containers"):
        shutil.copytree(REPO / name, tmp_path / name)
    shutil.copy(REPO / "params.yaml", tmp_path)
    (tmp_path / ".venvs").symlink_to(REPO / ".venvs")
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  bench:\n    foreach: [walk, int4]\n    do:\n      cmd: python3 stage.py ${item}\n"
        "      outs: ['results/embedded/bench/${item}']\n"
    )
    assert run_in(tmp_path, "containers/run", "venv:tools", "dvc", "init", "--no-scm", "--quiet").returncode == 0

    def make(name, **environment):
        command = ["containers/run", "venv:tools", "python", "-m", "tools.bench", *name.split()]
        done = run_in(tmp_path, *command, environment=environment)
        make.runs = (tmp_path / "runs").read_text().splitlines() if (tmp_path / "runs").exists() else []
        return done

    make.folder = tmp_path / "results/embedded/bench/walk"
    return make


def test_an_experiment_outside_the_profile_is_measured_and_gone_on_with_until_it_is_whole(project):
    assert project("walk", BUDGET="30m").returncode == 0
    assert project.runs == ["walk walk 30m"] and unfinished(project.folder)
    assert project("walk").returncode == 0
    assert project.runs[1:] == ["walk walk None"] and not unfinished(project.folder)
    assert project("walk").returncode == 0
    assert len(project.runs) == 2  # whole, and nothing has changed


def test_every_experiment_outside_the_profile_says_so_of_each_of_its_servers(tree):
    model = tree / "results/embedded/base_model"
    write_json(model / "metrics.json", {"name": "tiny", "weights": "random", "parameters": 1})
    write_json(model / "model/config.json", TINY_SHAPE)
    bench = load_yaml(tree / "params.yaml")["bench"]
    outside = [name for name in bench["definitions"] if name not in bench["experiments"]]
    images = ("host:", "triton=host:", "vllm=host:", "trtllm=host:")
    at_once(*(partial(stage, tree, "venv:tools", "bench", name, *images) for name in outside))
    for name in outside:
        said = {path.parent.name: read_json(path) for path in tree.glob(f"results/embedded/bench/{name}/*/points.json")}
        assert said.keys() == set(bench["definitions"][name]["servers"]), name
        for one in said.values():
            assert one["points"] == [] and one["not_measured"] == f"params.yaml: bench.experiments has no {name}"


def test_what_stood_as_not_asked_for_is_measured(project):
    run_in(project.folder.parents[3], "containers/run", "venv:tools", "dvc", "repro", "--quiet", "bench@walk")
    assert unfinished(project.folder)
    assert project("walk").returncode == 0
    assert project.runs == ["walk None None", "walk walk None"] and not unfinished(project.folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "EXPERIMENT is missing; use one of base, lora, walk"),
        ("new", "params.yaml: bench.definitions has no 'new'; it has base, lora, walk"),
        ("int4", "EXPERIMENT is int4, which serves llama-2-7b:int4-g128; nvidia-smi finds no GPU for that"),
        ("lengths", "bench.definitions.lengths asks vllm for 2176 tokens in and out; its options have --max-model"),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(project, name, message):
    assert message in only_error(project(name))
    assert project.runs == []


def test_an_experiment_that_wants_more_gpus_than_there_are_is_refused_before_anything_runs(project, tmp_path):
    (tmp_path / "bin").mkdir()
    two = "NVIDIA H200, 143771, 570.86.15\nNVIDIA H200, 143771, 570.86.15"
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{two}'\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    error = only_error(project("tensor-parallel", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
    assert error == (
        "error: params.yaml: bench.definitions.tensor-parallel.servers has vllm-tp4, which wants 4 GPUs; there are 2: "
        "leave it out"
    )
    assert project.runs == []


def test_every_setting_but_that_for_a_newer_vllm_is_one_that_the_writeups_vllm_has():
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


def test_every_point_that_a_claim_reads_is_one_that_a_profile_measures():
    _, claims = load_claims(REPO / "data/claims")
    read = [figure for claim in claims if claim.measure for figure in claim.figures.values()]
    figures = [(Path(one["file"]).parts, one["key"].rpartition(".")[0]) for one in read]
    figures = [(parts[1], parts[2], key) for parts, key in figures if parts[0] == "bench" and "points[" in key]
    profiles, missing = [profile_params(name) for name in ("writeup", "weightless")], set()
    for experiment, server, key in figures:
        plans = [visits(with_experiment(p, experiment)) for p in profiles if experiment in p.experiments]
        if not any(lookup(as_result(group), key) for plan in plans for name, group in plan if name == server):
            missing.add((experiment, server, key))
    assert len(figures) > 70 and missing == set()
