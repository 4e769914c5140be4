"""tools/preflight.py: what a run takes, before it starts."""

import dataclasses
import os
from pathlib import Path

import pytest
from conftest import only_error, run_in, set_params

from lib.core.stage import load_yaml, write_json
from lib.training.config import Lora
from stages.engine import Engine
from tools.preflight import (
    Estimate,
    in_use,
    misfit_engine,
    misfits,
    missing_disk,
    missing_images,
    missing_resources,
    old_drivers,
)

NEEDS = Estimate(minutes=240, disk_gb=150.0, images_gb=0.0, memory_gb=64.0, gpu_memory_gb=80.0)
H200 = {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "570.86.15"}
L4 = {"name": "NVIDIA L4", "memory_mib": 23034, "driver": "570.86.15"}


def test_a_machine_with_enough_of_everything_lacks_nothing():
    assert missing_resources(NEEDS, 151.0, 64, [L4, H200]) == []


def test_the_memory_of_a_64_gib_machine_is_enough_for_64_gb():
    # 64 GB are 59.6 GiB.
    assert missing_resources(NEEDS, 151.0, 60, [H200]) == []
    assert len(missing_resources(NEEDS, 151.0, 59, [H200])) == 1


def test_all_shortages_are_listed_at_once_with_numbers():
    disk, memory, gpu = missing_resources(NEEDS, 12.34, 16, [L4])
    assert "12.3 GB are free" in disk and "150 GB are needed" in disk
    assert "16 GiB" in memory and "64 GB are needed" in memory and "finetune.micro_batch" in memory
    assert gpu == "GPU: the largest has 24 GB, 80 GB are needed"


def test_without_a_gpu_the_embedded_profile_is_suggested():
    assert missing_resources(NEEDS, 151.0, 64, []) == [
        "GPU: nvidia-smi finds none; `make reproduce PROFILE=embedded` needs none"
    ]


def test_a_gpu_with_shared_memory_counts_the_machines_memory():
    shared = {"name": "NVIDIA GB10", "memory_mib": None, "driver": "580.95.05"}
    assert missing_resources(NEEDS, 151.0, 119, [shared]) == []
    assert len(missing_resources(NEEDS, 151.0, 64, [shared])) == 1


def test_a_profile_without_a_gpu_does_not_ask_for_one():
    assert missing_resources(Estimate(12, 8.0, 0.0, 9.0, 0.0), 9.0, 16, []) == []


def test_docker_and_every_unresolved_image_are_named_once():
    images = {
        "tools": "venv:tools",
        "pytorch": "docker://example.org/a:1@sha256:" + "0" * 64,
        "triton": "docker://example.org/b:2@sha256:UNRESOLVED",
        "trtllm": "docker://example.org/b:2@sha256:UNRESOLVED+packages@0123456789ab",
    }
    docker, image = missing_images(images, docker_answers=False)
    assert docker.startswith("Docker: no engine answers") and "start it" in docker
    assert image == "image: example.org/b:2@sha256:UNRESOLVED has no digest yet; `make digests` resolves it"
    assert missing_images(images, docker_answers=True) == [image]


def test_dockers_storage_holds_the_images():
    p = dataclasses.replace(NEEDS, disk_gb=60.0, images_gb=100.0)
    assert missing_disk(p, 70.0, "/var/lib/docker", 110.0, shared=False) == []
    (line,) = missing_disk(p, 500.0, "/var/lib/docker", 90.0, shared=False)
    assert line.startswith("images: 90.0 GB are free in /var/lib/docker, 100 GB of images are needed")
    (line,) = missing_disk(p, 110.0, "/var/lib/docker", 110.0, shared=True)  # enough for either, not for both
    assert "160 GB of images and of this checkout are needed" in line
    assert missing_disk(p, 500.0, None, None, shared=True) == missing_disk(NEEDS, 0.0, "/", 0.0, shared=False) == []


def test_an_image_names_the_driver_that_it_was_made_for():
    images = {"pytorch": "docker://example.org/a:1", "triton": "docker://example.org/b:2", "tools": "venv:tools"}
    assert [line.split(" or newer")[0] for line in old_drivers(images, [{**H200, "driver": "575.57.08"}])] == [
        "driver 575.57.08: the image of pytorch was made for 580"
    ]
    assert old_drivers(images, [{**H200, "driver": "580.82.07"}]) == []
    assert len(old_drivers(images, [H200])) == 2 and old_drivers(images, []) == []


def test_virtual_environments_need_no_docker():
    assert missing_images({"tools": "venv:tools", "client": "host:"}, docker_answers=False) == []


def profile_of(name):
    """(the parameters of a profile, its images)."""
    params = load_yaml("params.yaml")
    for section, keys in load_yaml(f"profiles/{name}.yaml").items():
        params[section] |= keys
    return params, load_yaml("containers/images.yaml")[name]


def test_only_images_that_a_run_starts_are_asked_for():
    assert not [image for image in in_use(*reversed(profile_of("weightless"))).values() if "docker:" in image]
    params, images = profile_of("writeup")
    assert in_use(images, params).keys() == {"tools", "pytorch", "triton", "vllm", "client"}
    params["bench"]["experiments"] = {"trtllm": "base"}
    assert in_use(images, params).keys() == {"tools", "pytorch", "triton", "vllm", "trtllm", "client"}
    params["bench"]["servers"] = ["trtllm"]
    assert in_use(images, params).keys() == {"tools", "pytorch", "triton", "trtllm", "client"}  # the engine is built


def without_docker(tmp_path):
    """A PATH on which `docker` exists, but no engine answers."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "docker").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_make_reproduce_lists_shortages_and_starts_nothing(tree, tmp_path):
    assert run_in(tree, "make", "profile", "PROFILE=writeup").returncode == 0
    set_params(tree, estimate={"disk_gb": 9e9, "memory_gb": 9e9, "gpu_memory_gb": 9e9})
    done = run_in(tree, "make", "reproduce", environment=without_docker(tmp_path))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    said = [line.strip() for line in done.stderr.splitlines()]
    assert said[0] == "error: profile writeup cannot run here:"
    for start in ("Docker: ", "image: nvcr.io/", "disk: ", "memory: ", "GPU: "):
        assert [line for line in said if line.startswith(start)], (start, said)
    assert not (tree / "results" / "writeup").exists()
    assert (tree / "dvc.lock").read_bytes() == Path("dvc.lock").read_bytes()


def test_enough_of_everything_gives_one_line_with_the_estimate(tree, tmp_path):
    set_params(tree, estimate={"minutes": 12, "disk_gb": 0.5, "memory_gb": 0.5, "gpu_memory_gb": 0.0})
    done = run_in(
        tree, "containers/run", "venv:tools", "python", "-m", "tools.preflight", environment=without_docker(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "profile embedded: a whole run takes about 12 min, 0.5 GB of disk and 0.5 GB of memory; "
        "what is up to date is skipped\n"
    )


def test_an_engine_unfit_for_adapters_stops_before_training(tree, tmp_path):
    assert run_in(tree, "make", "profile", "PROFILE=writeup").returncode == 0
    set_params(tree, lora={"r": 16}, engine={"lora_target_modules": ["attn_q", "attn_k", "attn_v", "attn_dense"]})
    done = run_in(tree, "make", "reproduce", environment=without_docker(tmp_path))
    said = [line.strip() for line in done.stderr.splitlines()]
    fit = "engine corrected: the adapters do not fit: "
    assert not any("rank" in line for line in said)  # engine.max_lora_rank follows lora.r
    assert f"{fit}up_proj is mlp_gate there, which is not in engine.lora_target_modules" in said


def test_an_engine_needs_as_many_gpus_as_share_it():
    engine = Engine(**load_yaml("params.yaml")["engine"] | {"route": "quantize", "variants": ["corrected", "two-gpus"]})
    lora = Lora(**load_yaml("params.yaml")["lora"])
    assert misfit_engine(engine, lora, 1) == ["engine two-gpus: engine.tp_size is 2, this machine has 1 GPUs"]
    assert misfit_engine(engine, lora, 2) == []
    assert misfit_engine(dataclasses.replace(engine, route="none"), lora, 1) == []


def test_an_engine_of_another_machine_will_be_rebuilt(tree, tmp_path):
    key = {"tensorrt_llm": "1.0.0", "gpu": "sm_90", "image": load_yaml("containers/images.yaml")["images"]["triton"]}
    write_json(tree / "results/embedded/engine/corrected/engine.json", {"not_built": None, "key": key})
    command = ["containers/run", "venv:tools", "python", "-m", "tools.preflight"]
    done = run_in(tree, *command, environment=without_docker(tmp_path))
    assert "engine corrected: rebuild: built for sm_90 with TensorRT-LLM 1.0.0, found " in done.stdout, done.stderr


def test_settings_that_cannot_serve_stop_before_building():
    params, images = profile_of("writeup")
    assert misfits(params, images, 1) == []
    params["repository"]["engine_variant"] = "batch-4"
    params["engine"] |= {"variants": ["corrected", "brain"], "definitions": {"brain": {"dtype": "bfloat16"}}}
    assert misfits(params, images, 1) == [
        "engine: repository.engine_variant is batch-4, built are corrected, brain: engine.route and engine.variants",
        "engine: engine.dtype is bfloat16 and float16; the adapters are stored in one of them",
    ]
    params, images = profile_of("writeup")
    params["bench"]["experiments"]["trtllm"] = "base"
    params["trtllm_serve"] |= {"tp_size": 2, "moe_backend": "TRITON"}
    assert misfits(params, images, 1) == [
        "trtllm_serve: trtllm_serve.tp_size is 2, this machine has 1 GPUs",
    ]
    images["trtllm"] = images["triton"]  # the release, which has no such backend
    assert "moe_backend is TRITON, which TensorRT-LLM 1.0.0 rejects" in misfits(params, images, 2)[0]


@pytest.mark.parametrize("value", ["lots", None])
def test_an_estimate_that_is_no_number_is_named(tree, value):
    set_params(tree, estimate={"disk_gb": value})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "tools.preflight")
    assert only_error(done) == f"error: params.yaml: estimate.disk_gb is {value!r}, want a value of type float"
