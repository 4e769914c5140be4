"""
A serving point added up from NVIDIA's measured kernels (package aiconfigurator-core), without a GPU.

The package carries the time of every matrix product, attention and expert layer of TensorRT-LLM, vLLM and SGLang on a
card, and adds them up to the steps of a continuous batch. Nothing here is a measurement of a server.
"""

import functools
import json
import logging
import tempfile
from pathlib import Path

from lib.core.stage import UserError

# Formats of matrices, experts and KV cache in the package's words; what is not here it has not measured.
WEIGHTS = {"bf16": ("bfloat16", "bfloat16"), "fp8": ("fp8", "bfloat16"), "mxfp4": ("bfloat16", "w4a16_mxfp4")}
KV = {"bf16": "bfloat16", "fp8": "fp8"}
# The package's errors that say that a card or format was not measured.
MISSING = ("PerfDataNotAvailableError", "MissingSystemFlopsError")
ENGINES = {"trtllm": "TensorRT-LLM", "vllm": "vLLM"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt_oss": "GptOssForCausalLM"}


class NotEstimated(Exception):
    """The package has no measured kernels for this point; the text says which are missing."""


def estimate_point(card, engine, config, formats, lengths, users, gpus=1):
    """A point in the form of points.json: tokens/s, tokens/s a user, ITL and TTFT; formats: (weights, KV cache)."""
    weights, kv = formats
    if weights not in WEIGHTS or kv not in KV:
        raise NotEstimated(f"no kernels for weights in {weights} with a KV cache in {kv}")
    if config["model_type"] not in ARCHITECTURES:
        raise NotEstimated(f"models of type {config['model_type']} are not estimated")
    numbers = add_up(card, engine, json.dumps(config, sort_keys=True), formats, lengths, users, gpus)
    return {
        "concurrency": users,
        "input_tokens_asked": lengths[0],
        "output_tokens_asked": lengths[1],
        "variant": "estimated",
        "valid": True,
        "output_tokens_per_second": float(numbers["tokens/s"]),
        "per_user_tokens_per_second": float(numbers["tokens/s/user"]),
        "itl_ms_avg": float(numbers["tpot"]),
        "ttft_ms_avg": float(numbers["ttft"]),
        "memory_gib": float(numbers["memory"]),
    }


def add_up(card, engine, config, formats, lengths, users, gpus):
    """The package's numbers of one point of one point; each mixed step reads one whole prompt beside the answers."""
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.config import RuntimeConfig

    measured = database(card, engine)
    load = RuntimeConfig(batch_size=users, isl=lengths[0], osl=lengths[1])
    try:
        model = build_model(card, engine, config, formats, gpus)
        summary = get_backend(engine).run_agg(model, measured, load, ctx_tokens=lengths[0])
    except Exception as error:  # the package imports where it is installed only
        if type(error).__name__ not in MISSING:
            raise
        raise NotEstimated(f"{ENGINES[engine]} {measured.version} on {card}: {missing_kernels(error)}") from None
    return summary.get_result_dict()


def missing_kernels(error):
    """The package's reason without the paths of this machine."""
    return " ".join(word for word in str(error).removeprefix("perf database error: ").split() if "/" not in word)[:200]


@functools.cache
def database(card, engine):
    """The measured kernels of an engine on a card; UserError names the cards there are."""
    from aiconfigurator_core.sdk import perf_database

    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    cards = perf_database.get_supported_databases()
    if engine not in ENGINES:
        raise UserError(f"ENGINE is {engine}; use one of {', '.join(ENGINES)}")
    if engine not in cards.get(card, {}):
        known = sorted(name for name, engines in cards.items() if engine in engines)
        raise UserError(f"CARD is {card}; {ENGINES[engine]} has measured kernels on {', '.join(known)}")
    return perf_database.get_database(card, engine, perf_database.get_latest_database_version(card, engine))


def build_model(card, engine, config, formats, gpus):
    """The package's model of a config.json, split over `gpus`."""
    from aiconfigurator_core.sdk import common
    from aiconfigurator_core.sdk.config import ModelConfig
    from aiconfigurator_core.sdk.models import get_model

    (matrices, experts), kv = WEIGHTS[formats[0]], KV[formats[1]]
    asked = ModelConfig(
        tp_size=gpus,
        moe_tp_size=gpus,
        moe_ep_size=1,
        gemm_quant_mode=common.GEMMQuantMode[matrices],
        moe_quant_mode=common.MoEQuantMode[experts],
        kvcache_quant_mode=common.KVCacheQuantMode[kv],
        fmha_quant_mode=common.FMHAQuantMode.bfloat16,
        system=card,
    )
    return get_model(str(config_folder(config)), asked, engine)


@functools.cache
def config_folder(config):
    """A folder with the config.json that the package reads; it wants the architecture's name."""
    values = json.loads(config)
    folder = Path(tempfile.mkdtemp(prefix="estimate-"))
    values.setdefault("architectures", [ARCHITECTURES[values["model_type"]]])
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def describe(card, engine):
    """The origin of an estimate, as part of a sentence: engine, version and card of the kernels."""
    return f"{ENGINES[engine]} {database(card, engine).version} on {card}"
