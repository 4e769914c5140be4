"""
One Triton model repository, in the layout of NVIDIA's inflight_batcher_llm: ensemble, preprocessing, postprocessing,
tensorrt_llm, tensorrt_llm_bls. What sits in the tensorrt_llm slot is the engine of params.yaml.
python -m stages.repository MODEL IMAGE, with MODEL base or lora

in:   results/<profile>/base_model/model, and for MODEL=lora results/<profile>/finetune/<method>/adapter;
      for TensorRT-LLM results/<profile>/engine, and results/<profile>/adapter instead of the latter
out:  results/<profile>/repository/MODEL/models/           for `tritonserver --model-repository`
      results/<profile>/repository/MODEL/adapters/<id>/    the adapter that answers lora_task_id <id>
      results/<profile>/repository/MODEL/repository.json   engine (and whether it is a stand-in), adapters by task id
"""

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from lib.core.gpu import architecture
from lib.core.provenance import installed, write_metrics
from lib.core.stage import REPRO, UserError, need, read_json, read_params, results, run
from lib.serving.vllm_options import engine_options
from lib.trtllm.adapters import MODELS, adapters
from lib.trtllm.images import engines, in_image, rebuild

TEMPLATES = Path("containers/triton/model_repository")
SKELETON = "/app/all_models/inflight_batcher_llm"
FILL_TEMPLATE = "/app/tools/fill_template.py"
# What engine.weights makes, by its name in lib/analysis/roofline.py; ModelOpt's AWQ has a scale and no zero for 128
# weights.
FORMATS = {"int4_awq": "int4-g128", "full": "bf16"}


@dataclass
class Repository:
    engine: str
    engine_variant: str
    max_batch_size: int
    instances: int
    streaming: bool

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise UserError(f"params.yaml: repository.engine is {self.engine!r}; use one of {', '.join(ENGINES)}")
        for name in ("max_batch_size", "instances"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: repository.{name} is {getattr(self, name)}; use 1 or more")


def render(text, values, where):
    """A template with every ${name} filled in; a name without a value is our mistake, and ends here."""
    try:
        return Template(text).substitute(values)
    except KeyError as error:
        raise UserError(f"{where}: no value for ${{{error.args[0]}}}") from None


def vllm_version(image):
    """The version of vLLM in an environment's lock file; for host:, of the one installed on this machine."""
    if image == "host:" and (version := installed("vllm")):
        return version
    name = re.fullmatch(r"venv:([\w-]+)(@\w+)?", image)
    lock = Path("containers") / (name[1] if name else "none") / "requirements.txt"
    version = re.search(r"^vllm(?:-cpu)?==(\S+)", lock.read_text() if lock.exists() else "", re.MULTILINE)
    if not version:
        raise UserError(
            f"containers/images.yaml: triton is {image!r}; repository.engine vllm wants an environment with vLLM and a "
            "tritonserver: venv:vllm, or host: on a machine that has both"
        )
    return version[1]


def write_vllm(p, out, model):
    """The templates of containers/triton, filled in, around vLLM's own engine."""
    if not p.streaming:
        raise UserError(
            "params.yaml: repository.streaming is false; the vllm engine batches only in decoupled mode: "
            "use true (a request without `stream` still gets one answer)"
        )
    version, base = vllm_version(sys.argv[2]), need(results("base_model") / "model", "base_model")
    tasks = adapters(model, results("finetune"))
    for task, folder in tasks.items():
        shutil.copytree(folder, out / "adapters" / str(task))

    in_models = out / "models" / "any"  # Triton hands a model its own folder: paths are relative to that
    values = {
        "max_batch_size": p.max_batch_size,
        "instances": p.instances,
        "model_dir": os.path.relpath(base, in_models),
        "lora_prefetch_dir": os.path.relpath(out / "adapters", in_models) if tasks else "",
        "engine_options": shlex.join(engine_options(tasks.values())),
    }
    shutil.copytree(TEMPLATES, out / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted((out / "models").glob("*/config.pbtxt")):
        path.write_text(render(path.read_text(), values, TEMPLATES / path.relative_to(out / "models")))

    return {
        "engine": f"vLLM {version}",
        "engine_is_stand_in": True,
        "stands_in_for": "TensorRT-LLM",
        "adapters": {str(task): str(folder) for task, folder in tasks.items()},
        "not_built": None,
    }


def filled(engine, tokenizer, p, prefetch):
    """{model: {placeholder: value}} for the skeleton, from what the engine says of itself."""
    batch = {"triton_max_batch_size": engine["max_batch_size"]}
    logits = {"logits_datatype": {"float16": "TYPE_FP16", "float32": "TYPE_FP32"}[engine["logits_dtype"]]}
    decoupled = {"decoupled_mode": str(p.streaming).lower()}
    return {
        "ensemble": {**batch, **logits},
        "preprocessing": {**batch, "tokenizer_dir": tokenizer, "preprocessing_instance_count": p.instances},
        "postprocessing": {
            **batch,
            "tokenizer_dir": tokenizer,
            # With more than one, the pieces of a stream come out of order.
            "postprocessing_instance_count": 1 if p.streaming else p.instances,
        },
        "tensorrt_llm": {
            **batch,
            **logits,
            **decoupled,
            "triton_backend": "tensorrtllm",
            "engine_dir": (results("engine") / p.engine_variant / "engine").resolve(),
            "batching_strategy": "inflight_fused_batching",
            "max_queue_delay_microseconds": 0,
            "max_queue_size": 0,
            "encoder_input_features_data_type": "TYPE_FP16",
            # A prompt that comes twice would be faster the second time, on one server only.
            "enable_kv_cache_reuse": "false",
            **({"lora_prefetch_dir": prefetch.resolve()} if prefetch else {}),
        },
        "tensorrt_llm_bls": {**batch, **logits, **decoupled, "bls_instance_count": p.instances},
    }


def substitutions(values):
    """fill_template.py's text, key:value with commas between: it splits, and takes backslashes away, twice."""
    pairs = (f"{key}:{escaped(value, ':')}" for key, value in values.items())
    return ",".join(escaped(pair, ",") for pair in pairs)


def escaped(text, delimiter):
    return re.sub(rf"([\\{delimiter}])", r"\\\1", str(text))


def check_filled(path):
    """UserError when a placeholder is left that Triton cannot read; inside quotes one counts as not set."""
    bare = re.sub(r'"[^"\n]*"', "", path.read_text())
    if left := sorted(set(re.findall(r"\$\{(\w+)\}", bare))):
        raise UserError(f"{path}: {', '.join(left)} not filled in; this skeleton is another than the one written for")


def write_tensorrtllm(p, out, model):
    """A fresh copy of the image's skeleton, filled in by the image's own fill_template.py."""
    image, built = sys.argv[2], engines(results("engine"))
    if p.engine_variant not in built:
        raise UserError(
            f"params.yaml: repository.engine_variant is {p.engine_variant!r}; "
            f"built are {', '.join(built) or 'none'}: engine.variants and engine.route say which"
        )
    engine = built[p.engine_variant]
    if reason := rebuild(engine, architecture(), image):
        raise UserError(f"engine {p.engine_variant}: {reason}; `{REPRO} engine@{p.engine_variant}` builds it anew")
    prefetch, tasks = None, {}
    if model == "lora":
        prefetch = results("adapter")
        tasks = {task: adapter["adapter"] for task, adapter in read_json(prefetch / "adapter.json")["adapters"].items()}
        if not tasks or any(not task.isdigit() or int(task) < 1 for task in tasks):
            raise UserError(f"{prefetch}: task ids {', '.join(tasks) or 'none'}; the server wants folders named from 1")

    log, words = out / "repository.log", []
    in_image(image, ["cp", "-r", SKELETON, (out / "models").resolve()], log)
    for name, values in filled(engine, (results("base_model") / "model").resolve(), p, prefetch).items():
        config = out / "models" / name / "config.pbtxt"
        if "${prompt_embedding_table_data_type}" in config.read_text():  # in some versions of the skeleton
            values["prompt_embedding_table_data_type"] = "TYPE_FP16"
        words += [config.resolve(), substitutions(values)]
    # All five in one start of the container.
    fill = f'while [ $# -gt 0 ]; do python3 {FILL_TEMPLATE} -i "$1" "$2" || exit; shift 2; done'
    in_image(image, ["sh", "-c", fill, FILL_TEMPLATE, *words], log, name="fill_template.py")
    for config in sorted((out / "models").glob("*/config.pbtxt")):
        check_filled(config)
    return {
        "engine": f"TensorRT-LLM {engine['tensorrt_llm']}",
        "engine_is_stand_in": False,
        "stands_in_for": None,
        "engine_variant": p.engine_variant,
        "weights_format": FORMATS[engine["key"]["flags"]["weights"]],
        "kv_format": "int8" if engine["key"]["flags"]["int8_kv_cache"] else "bf16",
        "max_batch_size": engine["max_batch_size"],
        "world_size": engine["tp_size"],
        "adapters": tasks,
        "not_built": None,
    }


def write_nothing(p, out, model):
    """Without a Triton engine the benchmark stands as not measured, with this reason."""
    return {
        "engine": None,
        "engine_is_stand_in": False,
        "stands_in_for": None,
        "adapters": {},
        "not_built": "params.yaml: repository.engine is none",
    }


ENGINES = {"vllm": write_vllm, "tensorrtllm": write_tensorrtllm, "none": write_nothing}


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        raise UserError(f"usage: python -m stages.repository MODEL IMAGE, with MODEL one of {', '.join(MODELS)}")
    model = sys.argv[1]
    p = read_params(Repository)

    out = results("repository") / model
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    facts = ENGINES[p.engine](p, out, model)
    write_metrics(out / "repository.json", {"model": model, "max_batch_size": p.max_batch_size, **facts})
    print(f"{out}: {facts['engine'] or 'nothing built'}, adapters {', '.join(facts['adapters']) or 'none'}")


if __name__ == "__main__":
    run(main)
