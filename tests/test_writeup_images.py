"""The old workflow's stages through a real Docker engine, in an image of doubles that compute and serve nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docker_engine
import pytest
from conftest import REPO, copy_tree, run_in, variables
from doubles import DOUBLE, double_image

from stages.serving import is_ready

STAGES = ("engine@corrected", "adapter", "repository@base", "repository@lora")


@pytest.fixture(scope="module")
def engine():
    if reason := docker_engine.why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="engine") as name, docker_engine.engine(Path(name)) as started:
        programs = double_image(Path(name) / "triton")
        for program in ("sh", "cp", "env"):
            programs[shutil.which(program)] = f"bin/{program}"
        host = started.reference.removeprefix("docker://").split("/")[0]
        image = docker_engine.push_image(started, Path(name) / "triton", f"{host}/tritonserver:25.09", programs)
        started.triton = f"docker://{image}"
        yield started


@pytest.fixture(scope="module")
def writeup(engine, tmp_path_factory):
    """The profile writeup in a copied tree, with the double image and a GPU that nvidia-smi names."""
    folder = tmp_path_factory.mktemp("writeup")
    tree = copy_tree(folder / "tree")
    run_in(tree, "git", "init", "--quiet")
    assert run_in(tree, "make", "profile", "PROFILE=writeup").returncode == 0
    images = (tree / "containers/images.yaml").read_text().splitlines()
    start = images.index("writeup: &writeup")
    number = next(n for n, line in enumerate(images) if n > start and line.startswith("  triton: "))
    images[number] = f"  triton: {engine.triton}"
    (tree / "containers/images.yaml").write_text("\n".join(images) + "\n")

    results = tree / "results" / "writeup"
    for name, text in {
        "machine/machine.json": "{}",
        "base_model/model/config.json": '{"model_type": "llama"}',
        "base_model/metrics.json": "{}",
        "dataset/corrected/train.jsonl": '{"prompt": "[INST] 犬 [/INST]", "completion": " 猫"}\n',
    }.items():
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(text)
    for method in ("lora", "qlora"):
        shutil.copytree(REPO / "tests/fixtures/adapter", results / "finetune" / method / "adapter")
    (folder / "bin").mkdir()
    (folder / "bin/nvidia-smi").write_text('#!/bin/sh\ncase "$*" in *compute_cap*) echo 9.0 ;; *) exit 9 ;; esac\n')
    (folder / "bin/nvidia-smi").chmod(0o755)
    environment = {"DOCKER_HOST": engine.host, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = run_in(tree, "containers/run", "venv:tools", "dvc", "repro", "-s", *STAGES, environment=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tree, environment


def test_the_engine_is_made_in_the_image_and_says_which(writeup, engine):
    out = writeup[0] / "results/writeup/engine/corrected"
    made = json.loads((out / "engine.json").read_text())
    assert (made["key"]["image"], made["key"]["gpu"], made["max_batch_size"]) == (engine.triton, "sm_90", 16)
    assert (out / "engine/rank0.engine").read_text() == DOUBLE
    assert made["commands"][0][1] == "/app/examples/quantization/quantize.py"
    inside = json.loads((out / "provenance.json").read_text())
    assert "--max_lora_rank" in inside["trtllm_build_help"] and len(inside["sha256"]) == 4
    assert inside["placeholders"]["ensemble"] == ["logits_datatype", "triton_max_batch_size"]
    # The image is no NVIDIA image, and the result says so.
    assert made["differs"][0] == "tensorrt_llm is None, this was written for 1.0.0"


def test_the_adapters_and_the_repository_are_filled_by_the_images_own_tools(writeup):
    results = writeup[0] / "results/writeup"
    assert sorted(json.loads((results / "adapter/adapter.json").read_text())["adapters"]) == ["1", "2"]
    text = (results / "repository/lora/models/tensorrt_llm/config.pbtxt").read_text()
    assert f'"{results}/adapter"' in text and f'"{results}/engine/corrected/engine"' in text
    assert (
        'string_value: "${lora_prefetch_dir}"'
        in (results / "repository/base/models/tensorrt_llm/config.pbtxt").read_text()
    )


def test_a_second_run_does_nothing(writeup):
    tree, environment = writeup
    done = run_in(tree, "containers/run", "venv:tools", "dvc", "repro", "-s", *STAGES, environment=environment)
    assert done.stdout.count("didn't change, skipping") == len(STAGES), done.stdout + done.stderr


def test_the_server_stays_in_the_foreground_until_it_is_told_to_stop(writeup, engine):
    tree, environment = writeup
    ask = "from stages.servers import Triton; print(*Triton('lora').command([]), sep='\\n')"
    words = run_in(tree, sys.executable, "-c", ask).stdout.split("\n")[:-1]
    process = subprocess.Popen(["containers/run", engine.triton, *words], cwd=tree, env=variables() | environment)
    try:
        docker_engine.wait_until(lambda: is_ready("http://127.0.0.1:8000/v2/health/ready"), tree, 20)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert engine.docker("ps", "--all", "--quiet") == ""
