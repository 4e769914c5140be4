"""
The command of trtllm-serve, which needs no engine: python -m stages.trtllm_serve MODEL IMAGE, MODEL base or lora

The base model is served as it is in its Hugging Face folder; adapters too: a request names one in `lora_request`.

in:   results/<profile>/base_model/model, and for MODEL=lora results/<profile>/finetune/<method>/adapter
out:  results/<profile>/trtllm_serve/MODEL/options.yaml   for --extra_llm_api_options
      results/<profile>/trtllm_serve/MODEL/serve.json     command line, adapters by number, why there is none
"""

import re
import shutil
import sys
from dataclasses import dataclass

import yaml

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, fingerprint, flags, read_json, read_params, results, run
from lib.trtllm.adapter_format import MODULES
from lib.trtllm.adapters import MODELS, adapters

# moe_config.backend by image: gpt-oss-dev is a development build between 1.0.0 and 1.1, and brought TRITON.
MOE_BACKENDS = ("CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA")
PREVIEW = "gpt-oss-dev"


@dataclass
class TrtllmServe:
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    kv_cache_free_gpu_memory_fraction: float
    moe_backend: str
    tp_size: int
    attention_dp: bool
    max_lora_rank: int

    def __post_init__(self):
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "tp_size", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: trtllm_serve.{name} is {getattr(self, name)}; use 1 or more")
        if not 0 < self.kv_cache_free_gpu_memory_fraction < 1:
            raise UserError(
                "params.yaml: trtllm_serve.kv_cache_free_gpu_memory_fraction is "
                f"{self.kv_cache_free_gpu_memory_fraction}; use a share between 0 and 1"
            )
        if self.moe_backend not in ("none", "TRITON", *MOE_BACKENDS):
            raise UserError(
                f"params.yaml: trtllm_serve.moe_backend is {self.moe_backend!r}; "
                f"use none, TRITON, {', '.join(MOE_BACKENDS)}"
            )


def experts(config):
    """How many experts a layer of the model has; 0 for a model without any."""
    return next(
        (config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(name)), 0
    )


def is_preview(image):
    return f":{PREVIEW}@" in image


def misfit_moe(p, image):
    """Why the MoE backend cannot be had in this image, in one line; None where it can."""
    if p.moe_backend != "TRITON" or is_preview(image):
        return None
    return (
        "params.yaml: trtllm_serve.moe_backend is TRITON, which TensorRT-LLM 1.0.0 rejects: its moe_config.backend "
        f"knows {', '.join(MOE_BACKENDS)}; the image release:{PREVIEW} has it, and so have releases from 1.1"
    )


def check_model(p, config, image, model):
    """UserError where this image cannot serve this model so."""
    name = config["model_type"]
    if p.moe_backend != "none" and not experts(config):
        raise UserError(f"params.yaml: trtllm_serve.moe_backend is {p.moe_backend}; {name} has no experts: use none")
    if reason := misfit_moe(p, image):
        raise UserError(reason)
    if name == "gpt_oss" and not is_preview(image):
        raise UserError(f"{image}: TensorRT-LLM 1.0.0 does not know gpt_oss yet; release:{PREVIEW} does, and 1.1")
    if model == "lora" and experts(config):
        raise UserError(f"{name}: TensorRT-LLM's sources do not say that adapters work with it; serve the base model")


def options(p, rank, count, targets):
    """The file of --extra_llm_api_options; it wins over the command line, and an unknown key is an error there."""
    settings = {
        "enable_attention_dp": p.attention_dp,
        "cuda_graph_config": {"max_batch_size": p.max_batch_size, "enable_padding": True},
        # A prompt that comes twice would be faster the second time; and /metrics stays empty without the last one.
        "kv_cache_config": {"enable_block_reuse": False},
        "enable_iter_perf_stats": True,
    }
    if p.moe_backend != "none":
        settings["moe_config"] = {"backend": p.moe_backend}
    if count:
        settings["lora_config"] = {
            "lora_target_modules": sorted(MODULES[target] for target in targets),
            "max_lora_rank": max(p.max_lora_rank, rank),
            "max_loras": count,
            "max_cpu_loras": count,
        }
    return settings


def command(p, folder, options_file):
    """The words of trtllm-serve. Its own default host, localhost, is inside the container."""
    words = {
        "host": "0.0.0.0", "port": 8000, "max_batch_size": p.max_batch_size, "max_seq_len": p.max_seq_len,
        "max_num_tokens": p.max_num_tokens,
        "kv_cache_free_gpu_memory_fraction": p.kv_cache_free_gpu_memory_fraction,
        "tp_size": p.tp_size, "trust_remote_code": True, "extra_llm_api_options": options_file,
    }  # fmt: skip
    # A server that was killed while it compiled leaves half a cache, and the next one waits for it forever.
    return [
        "sh",
        "-c",
        'rm -rf "$HOME/.cache/flashinfer"; exec "$@"',
        "sh",
        "trtllm-serve",
        "serve",
        folder,
        *flags(words),
    ]


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        raise UserError(f"usage: python -m stages.trtllm_serve MODEL IMAGE, with MODEL one of {', '.join(MODELS)}")
    model, image = sys.argv[1:]
    p = read_params(TrtllmServe)
    out = results("trtllm_serve") / model
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    reason = f"no trtllm-serve in {image}" if re.match("venv:", image) else None
    facts = {"adapters": {}, "command": None}
    if not reason:
        folder = (results("base_model") / "model").resolve()
        check_model(p, read_json(folder / "config.json"), image, model)
        served = adapters(model, results("finetune"))
        configs = [read_json(path / "adapter_config.json") for path in served.values()]
        targets = {target for config in configs for target in config["target_modules"]}
        text = options(p, max([config["r"] for config in configs], default=0), len(served), targets)
        (out / "options.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
        words = command(p, folder, (out / "options.yaml").resolve())
        facts = {"adapters": {str(task): str(path.resolve()) for task, path in served.items()},
                 "command": list(map(str, words))}  # fmt: skip
    # The benchmark depends on the adapters through these: see dvc.yaml, bench.
    folders = sorted((results("finetune")).glob("*lora/adapter")) if model == "lora" else []
    hashes = {str(path): fingerprint([], sorted(path.glob("adapter_*"))) for path in folders}
    write_metrics(out / "serve.json", {"model": model, "not_built": reason, "adapter_hashes": hashes, **facts})
    print(f"{out}: {reason or 'ready to start'}")


if __name__ == "__main__":
    run(main)
