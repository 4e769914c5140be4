"""
Sweep the concurrency against one server with genai-perf: python -m stages.bench RUN SERVER_IMAGE CLIENT_IMAGE

in:   results/<profile>/base_model, results/<profile>/machine/machine.json and what RUN serves: repository/base,
      repository/lora, or the adapters in finetune
out:  results/<profile>/bench/RUN/points.json, points.csv   one entry a concurrency, and what made it
      results/<profile>/bench/RUN/raw/<concurrency>/        genai-perf's own files, untouched
      results/<profile>/bench/RUN/prompts.jsonl, server.log

A finished point waits in .work/<profile>/bench/RUN/<fingerprint>/ until the sweep is whole, for DVC deletes a stage's
outs before it runs: a sweep that was stopped goes on at the first point that is missing.
"""

import csv
import hashlib
import json
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.server import answer, counters, run_client, serving
from stages.stage import UserError, flags, read_json, read_params, results, run, write_json, write_metrics

# Most a mean output length may be off before a point counts as another workload than the one asked for.
LENGTH_TOLERANCE = 0.02
STATISTICS = ("avg", "p50", "p90", "p95", "p99")
# Our name -> genai-perf's key, the unit it must come in, and the statistics we report.
METRICS = {
    "requests": ("request_count", "count", ("avg",)),
    "input_tokens": ("input_sequence_length", "tokens", ("avg",)),
    "output_tokens": ("output_sequence_length", "tokens", ("avg",)),
    "output_tokens_per_second": ("output_token_throughput", "tokens/sec", ("avg",)),
    "requests_per_second": ("request_throughput", "requests/sec", ("avg",)),
    "per_user_tokens_per_second": ("output_token_throughput_per_user", "tokens/sec/user", ("avg",)),
    "ttft_ms": ("time_to_first_token", "ms", STATISTICS),
    "itl_ms": ("inter_token_latency", "ms", STATISTICS),
    "request_latency_ms": ("request_latency", "ms", STATISTICS),
}


@dataclass
class Bench:
    servers: list
    input_tokens: int
    output_tokens: int
    concurrency: list
    requests_per_stream: int
    min_requests: int
    warmup_requests: int
    seed: int
    ready_seconds: int
    point_seconds: int
    server_options: list

    def __post_init__(self):
        if unknown := [name for name in self.servers if name not in SERVERS]:
            raise UserError(f"params.yaml: bench.servers has {unknown[0]!r}; use {', '.join(SERVERS)}")
        if not self.concurrency or any(type(one) is not int or one < 1 for one in self.concurrency):
            raise UserError(f"params.yaml: bench.concurrency is {self.concurrency}; use whole numbers from 1")
        for name in ("input_tokens", "output_tokens", "requests_per_stream", "min_requests"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: bench.{name} is {getattr(self, name)}; use 1 or more")

    def requests(self, concurrency):
        return max(self.min_requests, concurrency * self.requests_per_stream)

    def warmup(self, concurrency):
        return concurrency * self.warmup_requests


@dataclass
class Triton:
    """A model repository behind tritonserver, driven over gRPC with the tensors of NVIDIA's inflight_batcher_llm."""

    model: str
    url = "http://127.0.0.1:8000"
    ready = url + "/v2/health/ready"
    ports = (8000, 8001, 8002)
    metrics = "http://127.0.0.1:8002/metrics"
    counts = {
        "output_tokens": "nv_llm_output_token_len_sum",
        "input_tokens": "nv_llm_input_token_len_sum",
        "requests": "nv_llm_output_token_len_count",
    }

    def served(self):
        return [results("repository") / self.model]

    def not_built(self):
        return read_json(results("repository") / self.model / "repository.json")["not_built"]

    def command(self, p):
        local = {f"{protocol}-address": "127.0.0.1" for protocol in ("http", "grpc", "metrics")}
        ports = dict(zip(("http-port", "grpc-port", "metrics-port"), self.ports, strict=True))
        models = results("repository") / self.model / "models"
        return ["tritonserver", *flags({"model-repository": models, **local, **ports, "exit-timeout-secs": 10})]

    def client(self, p):
        adapter = ["lora_task_id:1"] if self.model == "lora" else []
        return {
            "model": "ensemble",
            "url": "127.0.0.1:8001",
            "endpoint-type": "kserve",
            "backend": "tensorrtllm",
            "extra-inputs": [f"min_tokens:{p.output_tokens}", *adapter],
        }

    def engine(self):
        """(name with version, is it a stand-in) of what answers."""
        built = read_json(results("repository") / self.model / "repository.json")
        note = f" (stand-in for {built['stands_in_for']})" if built["engine_is_stand_in"] else ""
        version = answer(self.url + "/v2")["version"]
        return f"{built['engine']} behind Triton {version}{note}", built["engine_is_stand_in"]


@dataclass
class Vllm:
    """vLLM's OpenAI-compatible server, its adapters served beside the base model under their own names."""

    model: str
    url = "http://127.0.0.1:8000"
    ready = url + "/health"
    ports = (8000,)
    metrics = url + "/metrics"
    counts = {
        "output_tokens": "vllm:generation_tokens_total",
        "input_tokens": "vllm:prompt_tokens_total",
        "requests": "vllm:request_success_total",
    }

    def adapters(self):
        if self.model == "base":
            return {}
        made = {path.parent.parent.name: path.parent for path in results("finetune").glob("*/adapter/*_config.json")}
        if "lora" not in made:
            raise UserError(f"{results('finetune')}/lora/adapter is missing; `dvc repro finetune` makes it")
        return dict(sorted(made.items()))

    def served(self):
        return list(self.adapters().values())

    def not_built(self):
        return None

    def command(self, p):
        options = {
            "model": results("base_model") / "model",
            "served-model-name": "base",
            "host": "127.0.0.1",
            "port": self.ports[0],
            "no-enable-prefix-caching": True,
            "seed": p.seed,
        }
        words = ["python3", "-m", "vllm.entrypoints.openai.api_server", *flags(options)]
        if adapters := self.adapters():
            rank = max(read_json(folder / "adapter_config.json")["r"] for folder in adapters.values())
            allowed = max(8, 1 << (rank - 1).bit_length())  # vLLM takes powers of two from 8
            words += ["--enable-lora", *flags({"max-lora-rank": allowed, "max-loras": len(adapters)})]
            words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
        return words + p.server_options

    def client(self, p):
        return {
            "model": self.model,
            "url": self.url,
            "endpoint-type": "completions",
            "extra-inputs": ["ignore_eos:true", f"min_tokens:{p.output_tokens}", "temperature:0"],
        }

    def engine(self):
        return f"vLLM {answer(self.url + '/version')['version']}", False


SERVERS = {"triton": Triton, "vllm": Vllm}


def client_command(p, server, concurrency, work):
    """genai-perf for one point: streaming, the same prompts for every server, the output length pinned."""
    options = {
        **server.client(p),
        "streaming": True,
        "tokenizer": results("base_model") / "model",
        "concurrency": concurrency,
        "request-count": p.requests(concurrency),
        "warmup-request-count": p.warmup(concurrency),
        "input-file": work / "prompts.jsonl",
        "output-tokens-mean": p.output_tokens,
        "output-tokens-stddev": 0,
        "random-seed": p.seed,
        "artifact-dir": work / "raw" / str(concurrency),
    }
    return ["genai-perf", "profile", *flags(options)]


def read_point(folder):
    """What we report of one point, from genai-perf's JSON under `folder`; None where it has no such number."""
    found = sorted(folder.rglob("*_genai_perf.json"))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files *_genai_perf.json, want 1; genai-perf did not finish this point")
    try:
        profile = json.loads(found[0].read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{found[0]}: not whole ({error.msg}, line {error.lineno}); run the stage again") from None

    point = {}
    for name, (key, unit, statistics) in METRICS.items():
        measured = profile.get(key, {})
        if measured and measured["unit"] != unit:
            raise UserError(f"{found[0]}: {key} is in {measured['unit']!r}, want {unit!r}; is it another genai-perf?")
        for one in statistics:
            point[name if statistics == ("avg",) else f"{name}_{one}"] = measured.get(one)
    if point["requests"] is None:
        raise UserError(f"{found[0]}: request_count is missing; is it another genai-perf?")
    return {**point, "requests": int(point["requests"])}


def judged(point, asked_requests, asked_tokens):
    """The point with failed_requests, and whether it measured the work that was asked for."""
    failed = max(0, asked_requests - point["requests"])
    reasons = [f"{failed} of {asked_requests} requests failed"] if failed else []
    # genai-perf counts by tokenising the text again, and computes its throughput from that: both counts must fit.
    for who, key in (("genai-perf counted", "output_tokens"), ("the server made", "server_output_tokens")):
        if point[key] is not None and abs(point[key] / asked_tokens - 1) > LENGTH_TOLERANCE:
            reasons.append(f"{who} {point[key]:.2f} output tokens a request, {asked_tokens} were asked for")
    return {**point, "failed_requests": failed, "valid": not reasons, "invalid_reasons": reasons}
