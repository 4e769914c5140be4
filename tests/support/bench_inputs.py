"""The benchmark's parameters for tests, and a results folder to measure from; the fixture comes by conftest.py."""

import pytest
from conftest import REPO, write_files

RECORDED = REPO / "tests" / "fixtures" / "bench"

PARAMS = {"experiments": {"base": "base"}, "definitions": {"base": {}, "old": {"pinned": False, "endpoint": "chat"}},
          "configurations": {"fp8": ["--quantization=fp8"]},
          "client_variants": {"corrected": {}, "short": {"min_requests": 2}},
          "variants": ["corrected"], "servers": ["triton", "vllm"], "model": "base",
          "lengths": [[64, 32]], "concurrency": [1, 2, 4], "repeats": 1, "together": False, "client": "genai-perf",
          "requests_per_stream": 4, "min_requests": 8, "warmup_requests": 2, "endpoint": "completions",
          "prompts": "unique", "pinned": True, "seed": 42, "ready_seconds": 20, "point_seconds": 20,
          "server_options": []}  # fmt: skip
# A point that did what was asked for.
POINT = {"requests": 8, "input_tokens": 64.0, "output_tokens": 32.0, "requests_per_second": 2.0,
         "request_latency_ms_avg": 2000.0}  # fmt: skip


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A working folder of the embedded profile with a model, two adapters and a repository, none of them real."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    files = {
        "machine/machine.json": "{}",
        "base_model/model/config.json": '{"dtype": "bfloat16", "head_dim": 8, "use_cache": true}',
        "base_model/metrics.json": '{"name": "Tiny", "weights": "random", "parameters": 7}',
        "finetune/lora/adapter/adapter_config.json": '{"r": 4}',
        "finetune/qlora/adapter/adapter_config.json": '{"r": 12}',
        "repository/base/repository.json": '{"engine": "Fake 1", "engine_is_stand_in": true, "not_built": null, '
        '"stands_in_for": "TensorRT-LLM"}',
    }
    write_files(tmp_path / "results" / "embedded", files)
    return tmp_path
