"""What trtllm-serve is started with, held against what its images take; and what they cannot serve."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import REPO, only_error, run_in, set_params
from contracts import Contract

RELEASE = "docker://example.org/release:1.0.0@sha256:" + "0" * 64
PREVIEW = "docker://example.org/release:gpt-oss-dev@sha256:" + "0" * 64
LLAMA = {"model_type": "llama"}
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 32}


@pytest.fixture
def made(tree):
    """made(MODEL, image, config) runs the stage in a copied tree with that model and two adapters; gives its folder."""
    results = tree / "results" / "embedded"
    for method in ("lora", "qlora"):
        shutil.copytree(REPO / "tests/fixtures/adapter", results / "finetune" / method / "adapter")
    (results / "base_model" / "model").mkdir(parents=True)

    def run(model, image=RELEASE, config=LLAMA, **parameters):
        (results / "base_model" / "model" / "config.json").write_text(json.dumps(config))
        set_params(tree, trtllm_serve=parameters)
        run.done = run_in(tree, sys.executable, "-m", "stages.trtllm_serve", model, image)
        return results / "trtllm_serve" / model

    run.tree = tree
    return run


def served(out, version):
    """(the words of trtllm-serve, remarks, options) after both were held against the image's contract."""
    words = json.loads((out / "serve.json").read_text())["command"]
    contract = Contract(f"trtllm-serve-{version}")
    given, remarks = contract.parse(words[words.index("trtllm-serve") :])
    options = yaml.safe_load((out / "options.yaml").read_text())
    contract.check_options(options)
    return given, remarks, options


def test_the_writeups_server_is_what_gpt_oss_dev_takes(made):
    out = made("base", PREVIEW, GPT_OSS, moe_backend="TRITON")
    assert made.done.returncode == 0, made.done.stderr
    given, remarks, options = served(out, "gpt-oss-dev")
    # The host that the writeup forgot is there; M18: its large max_num_tokens is kept; M16: the tag moves.
    assert [one for one, _ in remarks] == ["M18", "M16"]
    assert given["--host"] == "0.0.0.0" and given["--extra_llm_api_options"] == str(out / "options.yaml")
    assert (given["--max_batch_size"], given["--max_seq_len"], given["--max_num_tokens"]) == (256, 32768, 262144)
    assert options["moe_config"] == {"backend": "TRITON"}
    assert options["cuda_graph_config"] == {"max_batch_size": 256, "enable_padding": True}
    assert options["enable_attention_dp"] is False


def test_the_release_serves_adapters_with_modules_and_rank(made):
    out = made("lora", tp_size=2)
    assert made.done.returncode == 0, made.done.stderr
    given, _, options = served(out, "1.0.0")
    assert given["--tp_size"] == 2
    assert options["lora_config"] == {
        "lora_target_modules": ["attn_dense", "attn_k", "attn_q", "attn_v", "mlp_4h_to_h", "mlp_gate", "mlp_h_to_4h"],
        "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2,
    }  # fmt: skip
    adapters = json.loads((out / "serve.json").read_text())["adapters"]
    assert list(adapters) == ["1", "2"] and adapters["1"].endswith("finetune/lora/adapter")
    assert "lora_config" not in served(made("base"), "1.0.0")[2]


def test_its_rank_follows_the_adapters(made):
    options = served(made("lora", max_lora_rank=2), "1.0.0")[2]
    assert options["lora_config"]["max_lora_rank"] == 4


@pytest.mark.parametrize(
    ("model", "image", "config", "parameters", "says"),
    [
        (
            "base",
            RELEASE,
            GPT_OSS,
            {"moe_backend": "TRITON"},
            "which TensorRT-LLM 1.0.0 rejects: its moe_config.backend",
        ),
        ("base", RELEASE, GPT_OSS, {}, "TensorRT-LLM 1.0.0 does not know gpt_oss yet; release:gpt-oss-dev does"),
        ("base", PREVIEW, LLAMA, {"moe_backend": "TRITON"}, "moe_backend is TRITON; llama has no experts: use none"),
        ("lora", PREVIEW, GPT_OSS, {}, "do not say that adapters work with it; serve the base model"),
        ("base", RELEASE, LLAMA, {"moe_backend": "triton"}, "moe_backend is 'triton'; use none, TRITON, CUTLASS"),
        ("base", RELEASE, LLAMA, {"max_seq_len": 0}, "max_seq_len is 0; use 1 or more"),
        ("base", RELEASE, LLAMA, {"kv_cache_free_gpu_memory_fraction": 1.5}, "is 1.5; use a share between 0 and 1"),
    ],
)
def test_what_an_image_cannot_serve_is_one_line(made, model, image, config, parameters, says):
    made(model, image, config, **parameters)
    assert says in only_error(made.done)


def test_without_the_image_it_says_so_in_a_moment(made):
    out = made("lora", "venv:tools")
    assert [path.name for path in out.iterdir()] == ["serve.json"]
    assert json.loads((out / "serve.json").read_text())["not_built"] == "no trtllm-serve in venv:tools"


def test_a_partial_kernel_cache_is_deleted_before_start(made, tmp_path):
    words = json.loads((made("base") / "serve.json").read_text())["command"]
    (tmp_path / ".cache" / "flashinfer").mkdir(parents=True)
    (tmp_path / "trtllm-serve").write_text('#!/bin/sh\nls -A "$HOME/.cache"; echo "$@"\n')
    (tmp_path / "trtllm-serve").chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == " ".join(words[words.index("serve") :]) + "\n"
