"""
The servers under test: how each is started, how genai-perf drives it, and what it says about itself.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from lib.core.stage import REPRO, UserError, flags, read_json, work_folder
from lib.serving.answers import URL, answer
from lib.serving.vllm_options import engine_options

ADAPTERS = ("lora", "qlora")  # variants of the fine-tuning; the first is the one that RUN=...-lora asks for
SHARED_MEMORY = "bench_triton_"  # begins the names of Triton's regions in /dev/shm
FORMATS = {"bfloat16": "bf16", "float16": "bf16"}  # what config.json calls a number: what lib/analysis/roofline.py does
OURS = ("base", "lora")  # models of this pipeline; any other is SHAPE:FORMAT


@dataclass(frozen=True)
class Inputs:
    """The folders of results/<profile>/ that servers read; a stage names those that it depends on."""

    base_model: Path
    repository: Path | None = None
    trtllm_serve: Path | None = None
    finetune: Path | None = None

    def served_model(self, model):
        """The folder that a server loads, and whose tokenizer counts: the base model's, or that of a random shape."""
        return self.base_model / "model" if model in OURS else work_folder("shapes") / model.replace(":", "-")

    def saved_format(self):
        """The number format that the base model is saved in."""
        return FORMATS.get(read_json(self.base_model / "model" / "config.json").get("dtype"))


@dataclass
class Triton:
    """A model repository behind tritonserver, driven over gRPC with the tensors of NVIDIA's inflight_batcher_llm."""

    model: str  # base or lora
    inputs: Inputs
    ready = URL + "/v2/health/ready"
    ports = (8000, 8001, 8002)
    metrics = "http://127.0.0.1:8002/metrics"
    # The stand-in reports as NVIDIA's backend does; a counter that an engine lacks stays unknown.
    counters = {
        "input_tokens": "nv_llm_input_token_len_sum",
        "output_tokens": "nv_llm_output_token_len_sum",
        "requests": "nv_llm_output_token_len_count",
    }
    gauges = {"waiting": "nv_inference_pending_request_count"}

    @property
    def served(self):
        """The results folders that this server answers from, besides the base model."""
        return [self.inputs.repository / self.model]

    @property
    def built(self):
        return read_json(self.inputs.repository / self.model / "repository.json")

    def not_built(self):
        """Why there is nothing to serve, or None."""
        return self.built["not_built"]

    def command(self, options):
        local = {f"{protocol}-address": "127.0.0.1" for protocol in ("http", "grpc", "metrics")}
        ports = dict(zip(("http-port", "grpc-port", "metrics-port"), self.ports, strict=True))
        models = self.inputs.repository / self.model / "models"
        # A client that was stopped leaves its request in flight in Triton 2.51's ensembles: do not wait long for it.
        memory = f"python,shm-region-prefix-name={SHARED_MEMORY}"
        words = {"model-repository": models, **local, **ports, "exit-timeout-secs": 10, "backend-config": memory}
        words["disable-auto-complete-config"] = True  # what config.pbtxt does not say is not guessed
        if self.built["engine_is_stand_in"]:
            # Triton has no way to hand words to a model that it loads but the environment.
            return ["env", f"VLLM_OPTIONS={shlex.join(options)}", "tritonserver", *flags(words)]
        return mpirun(words, self.built["world_size"])

    def client(self, p, output_tokens):
        """genai-perf's options for this server; a pinned length is exactly `output_tokens`, greedily."""
        adapter = ["lora_task_id:1"] if self.model == "lora" else []
        return {
            "model": "ensemble",
            "url": "127.0.0.1:8001",
            "endpoint-type": "kserve",
            "backend": "tensorrtllm",
            "extra-inputs": [*([f"min_tokens:{output_tokens}"] if p.pinned else []), *adapter],
        }

    def formats(self, options):
        """(of the weights, of keys and values), by their names in lib/analysis/roofline.py; None for other formats."""
        built = self.built
        stand_in = built["engine_is_stand_in"]  # loads the model as it is
        return (self.inputs.saved_format(),) * 2 if stand_in else (built["weights_format"], built["kv_format"])

    def engine(self):
        """(name with version, is it a stand-in) of what answers; asks the running server."""
        built = self.built
        note = f" (stand-in for {built['stands_in_for']})" if built["engine_is_stand_in"] else ""
        return f"{built['engine']} behind Triton {answer('/v2')['version']}{note}", built["engine_is_stand_in"]


def mpirun(words, world_size):
    """The command of launch_triton_server.py, in the foreground: one tritonserver for each GPU.

    All but the first load the engine alone; each has shared memory of its own.
    """
    command = ["mpirun", "--allow-run-as-root"]
    for rank in range(world_size):
        own = {"backend-config": f"{words['backend-config']}{rank}_"}
        only = {"model-control-mode": "explicit", "load-model": "tensorrt_llm"} if rank else {}
        command += ["-n", "1", "/opt/tritonserver/bin/tritonserver", *flags(words | own | only), ":"]
    return command


@dataclass
class Vllm:
    """vLLM's OpenAI-compatible server; the adapters are served beside the base model under their own names.

    A model that is a shape of data/shapes in a format, such as gpt-oss-20b:mxfp4, has random weights.
    """

    model: str  # base, lora, or SHAPE:FORMAT
    inputs: Inputs
    port: int = 8000
    counters = {
        "input_tokens": "vllm:prompt_tokens_total",
        "output_tokens": "vllm:generation_tokens_total",
        "requests": "vllm:request_success_total",
        "cache_hits": "vllm:prefix_cache_hits_total",
        "preemptions": "vllm:num_preemptions_total",
        "guessed": "vllm:spec_decode_num_draft_tokens_total",
        "guessed_right": "vllm:spec_decode_num_accepted_tokens_total",
    }
    gauges = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def ready(self):
        return f"{self.url}/health"

    @property
    def metrics(self):
        return f"{self.url}/metrics"

    @property
    def ports(self):
        return (self.port,)

    @property
    def served(self):
        return list(self.adapters().values())

    def adapters(self):
        """Name -> folder of the adapters there are; UserError where RUN needs one and there is none."""
        if self.model != "lora":
            return {}
        folders = {name: self.inputs.finetune / name / "adapter" for name in ADAPTERS}
        present = {name: folder for name, folder in folders.items() if (folder / "adapter_config.json").exists()}
        if self.model not in present:
            raise UserError(f"{folders[self.model]}: no adapter there; `{REPRO} finetune` makes it")
        return present

    def not_built(self):
        return None

    def command(self, options):
        words = {"model": self.inputs.served_model(self.model), "served-model-name": "base", "host": "127.0.0.1",
                 "port": self.port}  # fmt: skip
        adapters = self.adapters()
        words = [*flags(words), *engine_options(adapters.values())]
        if adapters:
            words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
        return ["python3", "-m", "vllm.entrypoints.openai.api_server", *words, *options]

    def client(self, p, output_tokens):
        pinned = ["ignore_eos:true", f"min_tokens:{output_tokens}"] if p.pinned else []
        return {
            "model": self.model if self.model in OURS else "base",
            "url": self.url,
            "endpoint-type": p.endpoint,
            "extra-inputs": [*pinned, "temperature:0"],
        }

    def formats(self, options):
        weights = self.inputs.saved_format() if self.model in OURS else self.model.split(":")[1]
        cache = "fp8" if any(word.startswith("--kv-cache-dtype=fp8") for word in options) else "bf16"
        return "fp8" if "--quantization=fp8" in options else weights, cache

    def engine(self):
        return f"vLLM {answer('/version', self.url)['version']}", False


@dataclass
class Trtllm:
    """trtllm-serve with its PyTorch backend, OpenAI-compatible; a request names its adapter in `lora_request`."""

    model: str  # base or lora
    inputs: Inputs
    ready = URL + "/health"
    ports = (8000,)
    metrics = URL + "/metrics"  # JSON, not Prometheus: no counters are read from it
    counters = {}
    gauges = {}

    @property
    def built(self):
        return read_json(self.inputs.trtllm_serve / self.model / "serve.json")

    @property
    def served(self):
        return [self.inputs.trtllm_serve / self.model, *map(Path, self.built["adapters"].values())]

    def not_built(self):
        return self.built["not_built"]

    def command(self, options):
        """`options` are vLLM's; this server's stand in params.yaml: trtllm_serve."""
        return self.built["command"]

    def client(self, p, output_tokens):
        extra = {"ignore_eos": True, "min_tokens": output_tokens} if p.pinned else {}
        if self.model == "lora":
            extra["lora_request"] = lora_request(1, self.built["adapters"]["1"])
        return {
            "model": "model",  # the name of the folder that is served
            "url": URL,
            "endpoint-type": p.endpoint,
            "extra-inputs": json.dumps(extra | {"temperature": 0}),
        }

    def formats(self, options):
        return (self.inputs.saved_format(),) * 2

    def engine(self):
        return f"TensorRT-LLM {answer('/version')['version']} (trtllm-serve)", False


def lora_request(task, folder):
    """How a request names its adapter to trtllm-serve, which keeps it under its number."""
    return {"lora_name": str(task), "lora_int_id": task, "lora_path": str(folder)}


SERVERS = {"triton": Triton, "vllm": Vllm, "trtllm": Trtllm}
