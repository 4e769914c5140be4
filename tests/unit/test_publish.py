"""tools/publish.py: this checkout's run as a reference."""

import json

import pytest
from conftest import only_error, run_in

from lib.core.stage import write_json
from tools.publish import MAX_BYTES


@pytest.fixture
def finished(tree):
    """A copy of the project with a finished run in it."""
    run = tree / "results" / "embedded"
    write_json(run / "machine" / "machine.json", {"cpu": "Xeon"})
    write_json(run / "finetune" / "lora" / "metrics.json", {"made_by": {}, "train_loss_last": 2.4})
    write_json(run / "finetune" / "lora" / "adapter" / "adapter_config.json", {"r": 4})
    write_json(run / "base_model" / "model" / "config.json", {"hidden_size": 576})
    write_json(run / "base_model" / "metrics.json", {"name": "SmolLM2-135M-Instruct"})
    write_json(run / "bench" / "base" / "vllm" / "points.json", [])
    write_json(run / "bench" / "base" / "vllm" / "raw" / "c1" / "profile_export_genai_perf.json", {})
    write_json(run / "bench" / "base" / "vllm" / "large.json", "x" * MAX_BYTES)
    (run / "finetune" / "lora" / "steps.csv").write_text("step,seconds\n1,2.5\n")
    (run / "base_model" / "model" / "model.safetensors").write_bytes(bytes(1000))
    (run / "finetune" / "lora" / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    (run / "bench" / "base" / "vllm" / "server.log").write_text("ready\n")
    for lock in (tree / "dvc.lock", tree / "studies" / "dvc.lock"):
        lock.parent.mkdir(exist_ok=True)
        lock.write_text("schema: '2.0'\n")
    return tree


def publish(tree, *names):
    return run_in(tree, "containers/run", "venv:tools", "python", "-m", "tools.publish", *names)


def test_a_publication_holds_numbers_and_no_weights(finished):
    done = publish(finished, "laptop.2-embedded")
    assert done.returncode == 0, done.stderr
    target = finished / "results" / "reference" / "laptop.2-embedded"
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == [
        "base_model/metrics.json",
        "bench/base/vllm/points.json",
        "dvc.lock",
        "experiments.yaml",
        "finetune/lora/metrics.json",
        "finetune/lora/steps.csv",
        "machine/machine.json",
        "params.yaml",
        "run.json",
        "studies/dvc.lock",
    ]
    run = json.loads((target / "run.json").read_text())
    assert (run["name"], run["profile"]) == ("laptop.2-embedded", "embedded") and run["made_by"]["commit"] == "none"
    assert (target / "params.yaml").read_bytes() == (finished / "params.yaml").read_bytes()


def test_a_name_published_again_holds_only_the_new_run(finished):
    assert publish(finished, "laptop").returncode == 0
    (finished / "results" / "embedded" / "finetune" / "lora" / "steps.csv").unlink()
    assert publish(finished, "laptop").returncode == 0
    assert not (finished / "results" / "reference" / "laptop" / "finetune" / "lora" / "steps.csv").exists()


@pytest.mark.parametrize("names", [["../embedded"], ["H200"], ["a/b"], ["."], [".."], [""], [], ["a", "b"], ["a b"]])
def test_a_bad_name_is_refused_and_nothing_is_removed(finished, names):
    before = sorted((finished / "results").rglob("*"))
    assert "use small letters, digits, dots and dashes" in only_error(publish(finished, *names))
    assert sorted((finished / "results").rglob("*")) == before


def test_a_run_without_its_machine_is_no_reference(finished):
    (finished / "results" / "embedded" / "machine" / "machine.json").unlink()
    assert "machine.json: there is no such file" in only_error(publish(finished, "laptop"))
    assert not (finished / "results" / "reference" / "laptop").exists()


def test_without_a_run_there_is_nothing_to_publish(tree):
    assert only_error(publish(tree, "laptop")) == (
        "error: results/embedded holds no results; `make reproduce PROFILE=embedded` makes them"
    )


def test_make_publish_takes_the_name(finished):
    assert run_in(finished, "make", "publish", "NAME=laptop").returncode == 0
    assert (finished / "results" / "reference" / "laptop" / "run.json").exists()
    assert "NAME is ''" in run_in(finished, "make", "publish").stderr
