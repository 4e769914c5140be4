"""The whole graph of the profile writeup through a real Docker engine, in images of doubles that compute and serve
nothing."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docker_engine
import pytest
import yaml
from conftest import REPO, copy_tree, run_in, tiny_wheel, variables
from doubles import DOUBLE, double_image

from lib.core.stage import load_yaml, read_json
from lib.serving.process import is_ready

# Role -> the name that its image has here; all are one image with every double in it.
NAMES = {"triton": "tritonserver:25.09", "pytorch": "pytorch:25.09", "vllm": "vllm:v0.11.0",
         "trtllm": "release:gpt-oss-dev", "client": "sdk:25.09"}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    """A Docker engine with the double images in its registry; images: role -> reference."""
    if reason := docker_engine.why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="engine") as name, docker_engine.engine(Path(name)) as started:
        programs = double_image(Path(name) / "double")
        for program in ("sh", "bash", "cp", "rm", "env"):
            programs[shutil.which(program)] = f"bin/{program}"
        host = started.reference.removeprefix("docker://").split("/")[0]
        names = [f"{host}/{one}" for one in NAMES.values()]
        pushed = docker_engine.push_image(started, Path(name) / "double", names[0], programs, *names[1:])
        started.images = {role: f"docker://{reference}" for role, reference in zip(NAMES, pushed, strict=True)}
        yield started


def lay_packages_on_an_image(tree, folder):
    """containers/on-image with one tiny package, which lies in `folder`; the variables under which uv finds it."""
    (tree / "containers/on-image").mkdir()
    digest = tiny_wheel(folder)
    (tree / "containers/on-image/requirements.txt").write_text(f"tinypkg==1.0 --hash=sha256:{digest}\n")
    (tree / "containers/on-image/image-python").write_text(f"{sys.version_info.major}.{sys.version_info.minor}\n")
    # Not into this checkout's environments.
    (tree / ".venvs").unlink()
    (tree / ".venvs").mkdir()
    for made in (REPO / ".venvs").resolve().glob("*/lock.sha256"):
        (tree / ".venvs" / made.parent.name).symlink_to(made.parent)
    if (REPO / ".venvs/uv").exists():
        (tree / ".venvs/uv").symlink_to((REPO / ".venvs/uv").resolve())
    return {"UV_FIND_LINKS": str(folder), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}


def choose_images(tree, images):
    """The double images as the writeup's own set in containers/images.yaml."""
    path = tree / "containers/images.yaml"
    before, start, rest = path.read_text().partition("writeup: &writeup\n")
    ours, rest = re.match(r"((?:  .*\n)+)(.*)", rest, re.DOTALL).groups()
    for role, image in images.items():
        ours = re.sub(rf"(?m)^  {role}: .*$", f"  {role}: {image}", ours)
    path.write_text(before + start + ours + rest)


def leave_out(tree):
    """Delete what this test does not ask for and dvc would read a hundred times: variants, other experiments, studies,
    published runs, and all loads but one."""
    (tree / "dvc.lock").unlink()
    shutil.rmtree(tree / "results/reference")
    (tree / "results/reference").mkdir()
    params = load_yaml(tree / "params.yaml")
    bench = params["bench"]
    bench |= {"experiments": {"base": "base", "lora": "lora"}, "concurrency": [1], "repeats": 1}
    params["vram"]["shapes"], params["finetune"]["definitions"], params["engine"]["definitions"] = (
        ["llama-2-7b"],
        {},
        {},
    )
    (tree / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def writeup(engine, tmp_path_factory):
    """The profile writeup run in a copied tree, with the double images and a GPU that nvidia-smi names, fewer loads:
    (tree, variables, what dvc said)."""
    folder = tmp_path_factory.mktemp("writeup")
    tree = copy_tree(folder / "my prömpts (attempt 2)")
    run_in(tree, "git", "init", "--quiet")
    assert run_in(tree, "make", "profile", "PROFILE=writeup").returncode == 0
    environment = lay_packages_on_an_image(tree, folder / "wheels")
    choose_images(tree, engine.images | {"pytorch": f"{engine.images['pytorch']}+on-image"})
    leave_out(tree)
    (folder / "bin").mkdir()
    (folder / "bin/nvidia-smi").write_text('#!/bin/sh\ncase "$*" in *compute_cap*) echo 9.0 ;; *) exit 9 ;; esac\n')
    (folder / "bin/nvidia-smi").chmod(0o755)
    environment |= {"DOCKER_HOST": engine.host, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = run_in(tree, "containers/run", "venv:tools", "dvc", "repro", environment=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return tree, environment, done.stdout + done.stderr


def ran(said):
    """The stages that dvc ran."""
    return re.findall(r"(?m)^Running stage '([^']+)'", said)


def test_a_second_run_repeats_only_the_machine_stage(writeup):
    tree, environment, said = writeup
    named = {one.split("@")[0] for one in ran(said)}
    assert named == set(load_yaml(tree / "dvc.yaml")["stages"]) and len(ran(said)) >= 20
    again = run_in(tree, "containers/run", "venv:tools", "dvc", "repro", environment=environment)
    assert again.returncode == 0 and ran(again.stdout) == ["machine"], again.stderr


def test_the_first_use_of_an_image_records_its_versions(writeup, engine):
    tree, _, said = writeup
    kept = {path.name: json.loads(path.read_text()) for path in (tree / ".cache/images").iterdir()}
    digest = engine.images["triton"].rpartition(":")[2][:12]
    assert sorted(kept) == [f"{digest}+on-image.json", f"{digest}.json"]
    inside = kept[f"{digest}.json"]
    assert inside["placeholders"]["ensemble"] == ["logits_datatype", "triton_max_batch_size"] and inside["sha256"]
    image = f"{engine.images['pytorch']}+on-image"
    assert said.count(f"first use of {image}") == 1
    # The double is no NVIDIA image, and it is said.
    assert f"{image}: torch is None, this was written for 2.9.0a0" in said


def test_the_packages_on_an_image_are_what_its_python_imports(writeup):
    made = read_json(writeup[0] / "results/writeup/base_model/double.json")
    assert made["package"] == 42
    lock = (writeup[0] / "containers/on-image/requirements.txt").read_bytes()
    assert made["lock"] == hashlib.sha256(lock).hexdigest()


def test_the_engine_is_made_in_the_image_and_says_which(writeup, engine):
    out = writeup[0] / "results/writeup/engine/corrected"
    made = json.loads((out / "engine.json").read_text())
    assert (made["key"]["image"], made["key"]["gpu"], made["max_batch_size"]) == (engine.images["triton"], "sm_90", 16)
    assert (out / "engine/rank0.engine").read_text() == DOUBLE
    assert made["commands"][0][1] == "/app/examples/quantization/quantize.py"
    inside = json.loads((out / "provenance.json").read_text())
    assert "--max_lora_rank" in inside["trtllm_build_help"] and len(inside["sha256"]) == 4
    assert made["differs"][0] == "tensorrt_llm is None, this was written for 1.0.0"


def test_the_tools_of_the_image_convert_and_fill_templates(writeup):
    results = writeup[0] / "results/writeup"
    assert sorted(json.loads((results / "adapter/adapter.json").read_text())["adapters"]) == ["1", "2"]
    text = (results / "repository/lora/models/tensorrt_llm/config.pbtxt").read_text()
    assert f'"{results}/adapter"' in text and f'"{results}/engine/corrected/engine"' in text
    base = (results / "repository/base/models/tensorrt_llm/config.pbtxt").read_text()
    assert 'string_value: "${lora_prefetch_dir}"' in base


def test_doubles_of_servers_give_no_valid_point_or_verdict(writeup):
    results = writeup[0] / "results/writeup"
    for path in (f"{model}/{server}" for model in ("base", "lora") for server in ("triton", "vllm")):
        found = read_json(results / "bench" / path / "points.json")
        assert DOUBLE.strip() in found["engine"] and len(found["points"]) == 1
        assert [point["valid"] for point in found["points"]] == [False]
        assert (
            "the server counted 0.00 output tokens a request, 256 were asked for"
            in found["points"][0]["invalid_reasons"]
        )
    claims = read_json(results / "claims/claims.json")["claims"]
    served = [claim for claim in claims if "bench/base/triton/points.json" in json.dumps(claim["measure"])]
    here = [one for claim in served for one in claim["outcomes"] if one["run"] == "this checkout"]
    assert len(here) > 10 and {one["measured"] for one in here} == {None}
    assert {one["verdict"] for one in here} <= {"not comparable", "not measured", "contradicted by its own source"}
    assert [one for one in here if "is invalid: " in one["reason"]]


def test_the_server_stays_in_the_foreground_until_stopped(writeup, engine):
    tree, environment, _ = writeup
    ask = (
        "from pathlib import Path; from lib.serving.servers import Inputs, Triton; root = Path('results/writeup'); "
        "print(*Triton('lora', Inputs(root / 'base_model', root / 'repository')).command([]), sep='\\n')"
    )
    words = run_in(tree, sys.executable, "-c", ask).stdout.split("\n")[:-1]
    process = subprocess.Popen(
        ["containers/run", engine.images["triton"], *words], cwd=tree, env=variables() | environment
    )
    try:
        docker_engine.wait_until(lambda: is_ready("http://127.0.0.1:8000/v2/health/ready"), tree, 20)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert engine.docker("ps", "--all", "--quiet") == ""
