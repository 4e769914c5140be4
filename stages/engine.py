"""
One TensorRT-LLM engine, built in its container: python -m stages.engine VARIANT IMAGE

The base model is quantised (int4 AWQ with an int8 KV cache calibrates on our own training rows, never on text from the
network) or converted, then trtllm-build compiles it for the GPU that is here. An engine runs on that kind of GPU, with
that TensorRT-LLM and that TensorRT only, so all three are its key.

in:   results/<profile>/base_model/model, results/<profile>/dataset/corrected/train.jsonl, machine.json
out:  results/<profile>/engine/VARIANT/engine/           config.json, rank<N>.engine
      results/<profile>/engine/VARIANT/engine.json       its key, what adapters it takes, commands, seconds
      results/<profile>/engine/VARIANT/provenance.json   what the image had inside
      results/<profile>/engine/VARIANT/*.log
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace

from lib.core.gpu import architecture
from lib.core.provenance import write_metrics
from lib.core.stage import (
    UserError,
    check_bounds,
    fingerprint,
    flags,
    load_yaml,
    patched,
    read_json,
    read_params,
    results,
    run,
    write_json,
)
from lib.core.work import work_dir
from lib.trtllm.adapter_format import MODULE_IDS
from lib.trtllm.images import differences, in_image, look, unknown_flags

ROUTES = ("none", "quantize", "convert_checkpoint")
QUANTIZE = "/app/examples/quantization/quantize.py"
CONVERT = "/app/examples/models/core/llama/convert_checkpoint.py"
DTYPES = ("float16", "bfloat16")
# A quantiser that finds one of these in the calibration's path takes it for that data set.
KNOWN_DATASETS = ("cnn_dailymail", "scienceqa", "science_qa")


@dataclass
class Engine:
    variants: list
    definitions: dict
    route: str
    dtype: str
    weights: str
    int8_kv_cache: bool
    calib_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    lora_target_modules: list
    max_lora_rank: int
    tp_size: int

    def __post_init__(self):
        sizes = ("calib_size", "max_batch_size", "max_input_len", "max_seq_len", "max_lora_rank", "tp_size")
        check_bounds("engine", self, dict.fromkeys(sizes, 1))
        for name, allowed in (("route", ROUTES), ("dtype", DTYPES), ("weights", ("int4_awq", "full"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"params.yaml: engine.{name} is {getattr(self, name)!r}; use {', '.join(allowed)}")
        if self.max_seq_len <= self.max_input_len:
            raise UserError(
                f"params.yaml: engine.max_seq_len is {self.max_seq_len}, which leaves nothing to answer behind "
                f"max_input_len {self.max_input_len}; it counts both"
            )
        if unknown := [name for name in self.lora_target_modules if name not in MODULE_IDS]:
            raise UserError(f"params.yaml: engine.lora_target_modules has {unknown[0]!r}; use {', '.join(MODULE_IDS)}")


def with_variant(p, variant):
    """The parameters of a variant: `corrected` is the section as it stands, any other a patch of it."""
    if variant != "corrected" and variant not in p.definitions:
        raise UserError(f"params.yaml: engine has no variant {variant!r}; use corrected, {', '.join(p.definitions)}")
    return patched(p, p.definitions.get(variant, {}), f"engine.definitions.{variant}", ("variants", "definitions"))


def with_room(p, rank):
    """The parameters with an engine.max_lora_rank that takes adapters of this rank, as lora.r gives it."""
    return replace(p, max_lora_rank=max(p.max_lora_rank, rank))


def checkpoint_command(p, model, calibration, out):
    """The words that make the checkpoint: the documented quantize.py, or the writeup's convert_checkpoint.py."""
    shared = {"model_dir": model, "output_dir": out, "dtype": p.dtype, "tp_size": p.tp_size}
    awq = p.weights == "int4_awq"
    calibrated = {"calib_size": p.calib_size, "calib_dataset": calibration} if awq or p.int8_kv_cache else {}
    if p.route == "quantize":
        form = {"qformat": "int4_awq", "awq_block_size": 128} if awq else {"qformat": "full_prec"}
        cache = {"kv_cache_dtype": "int8"} if p.int8_kv_cache else {}
        return ["python3", QUANTIZE, *flags({**shared, **form, **cache, **calibrated})]
    # Without --int8_kv_cache this script would not calibrate at all, and --per_group is read for QServe only: the
    # variant published keeps both as they were written.
    form = {"use_weight_only": True, "weight_only_precision": "int4_awq"} if awq else {}
    cache = {"int8_kv_cache": True} if p.int8_kv_cache else {}
    published = {"per_group": True} if awq else {}
    return ["python3", CONVERT, *flags({**shared, **form, **cache, **calibrated, **published})]


def build_command(p, checkpoint, out):
    """The words of trtllm-build: the writeup's, with the lengths and sizes of params.yaml."""
    words = {
        "checkpoint_dir": checkpoint, "output_dir": out, "output_timing_cache": out.parent / "model.cache",
        "gpt_attention_plugin": "auto", "gemm_plugin": "auto", "max_batch_size": p.max_batch_size,
        "max_input_len": p.max_input_len, "max_seq_len": p.max_seq_len, "max_beam_width": 1, "kv_cache_type": "paged",
        "lora_plugin": "auto", "max_lora_rank": p.max_lora_rank, "workers": p.tp_size,
    }  # fmt: skip
    return ["trtllm-build", *flags(words), "--lora_target_modules", *p.lora_target_modules]


def write_calibration(rows, folder):
    """A local data set as the quantiser reads one: a folder whose train split has a `text` column."""
    if known := [name for name in KNOWN_DATASETS if name in str(folder).lower()]:
        raise UserError(f"{folder}: the quantiser takes a path with {known[0]!r} in it for that data set")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    texts = [{"text": pair["prompt"] + pair["completion"]} for pair in pairs]
    (folder / "train.jsonl").write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))
    return len(texts)


def describe_engine(p, folder):
    """The adapters and requests that an engine takes, from its config.json; UserError if it is not as asked."""
    config = read_json(folder / "config.json")
    build, model = config["build_config"], config["pretrained_config"]
    lora = build["lora_config"]
    description = {
        "tensorrt_llm": config["version"],
        "dtype": model["dtype"],
        "logits_dtype": model["logits_dtype"],
        "lora_plugin": build["plugin_config"]["lora_plugin"],
        "max_batch_size": build["max_batch_size"],
        "max_input_len": build["max_input_len"],
        "max_seq_len": build["max_seq_len"],
        "max_lora_rank": lora["max_lora_rank"],
        "lora_target_modules": lora["lora_target_modules"],
        "tp_size": model["mapping"]["tp_size"],
    }
    for name in ("dtype", "max_batch_size", "max_input_len", "max_seq_len", "max_lora_rank", "tp_size"):
        if description[name] != getattr(p, name):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {description[name]}, {getattr(p, name)} was asked for"
            )
    if description["lora_plugin"] not in ("auto", p.dtype):
        raise UserError(
            f"{folder / 'config.json'}: lora_plugin is {description['lora_plugin']}, the weights are {p.dtype}"
        )
    ranks = {f"rank{rank}.engine" for rank in range(p.tp_size)}
    if missing := sorted(ranks - {path.name for path in folder.iterdir()}):
        raise UserError(f"{folder}: {', '.join(missing)} missing; trtllm-build did not finish")
    return description


def build(p, variant, image, out):
    """Checkpoint, engine and what is known of them, in `out`; a checkpoint that is finished outlives a kill."""
    gpu = architecture()
    if gpu is None:
        raise UserError(f"engine {variant}: nvidia-smi finds no GPU; an engine is built for the GPU that serves it")
    inside = look(image)
    model, rows = results("base_model") / "model", results("dataset") / "corrected" / "train.jsonl"
    settings = {name: value for name, value in asdict(p).items() if name not in ("variants", "definitions")}
    made_by = results("base_model") / "metrics.json"  # says which weights they are, and is read faster than they are
    work = work_dir(f"engine-{variant}", fingerprint([settings, image, gpu], [made_by, rows]))
    checkpoint, engine = work / "checkpoint", work / "engine"
    # From the project's root: quantize.py takes a model below a folder with "mpt" or "vila" in its name, such as
    # "attempt", for one of those families.
    commands = [checkpoint_command(p, model, work / "calibration", checkpoint), build_command(p, checkpoint, engine)]
    if unknown := unknown_flags(commands[1], inside["trtllm_build_help"]):
        raise UserError(f"{image}: its trtllm-build does not know {', '.join(unknown)}; see {out / 'provenance.json'}")

    seconds = {"checkpoint": None}  # not known when it was there already
    if not (work / "checkpoint.done").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_calibration(rows, work / "calibration")
        seconds["checkpoint"] = in_image(image, commands[0], work / "checkpoint.log")
        (work / "checkpoint.done").touch()
    shutil.rmtree(engine, ignore_errors=True)
    seconds["build"] = in_image(image, commands[1], work / "build.log")
    description = describe_engine(p, engine)

    for name in ("engine", "calibration", "checkpoint.log", "build.log"):
        shutil.move(work / name, out / name)
    write_json(out / "provenance.json", inside)
    shutil.rmtree(work)
    key = {"tensorrt_llm": description["tensorrt_llm"], "tensorrt": inside["versions"]["tensorrt"], "gpu": gpu,
           "tp_size": p.tp_size, "flags": settings, "image": image}  # fmt: skip
    other = differences("triton", inside)
    for line in other:
        print(f"{image}: {line}")
    return {
        "key": key,
        **description,
        "commands": [list(map(str, words)) for words in commands],
        "seconds": seconds,
        "differs": other,
    }


def main():
    if len(sys.argv) != 3:
        raise UserError("usage: python -m stages.engine VARIANT IMAGE")
    variant, image = sys.argv[1:]
    p = with_room(with_variant(read_params(Engine), variant), load_yaml("params.yaml")["lora"]["r"])
    out = results("engine") / variant
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if p.route == "none":
        reason = "params.yaml: engine.route is none"
        # Without commit or date: a run that builds nothing again leaves the file, and what stands on it, as they were.
        write_json(out / "engine.json", {"variant": variant, "not_built": reason})
        print(f"{out}: {reason}")
        return
    facts = build(p, variant, image, out)
    write_metrics(out / "engine.json", {"variant": variant, "not_built": None, **facts})
    print(f"{out}: built for {facts['key']['gpu']}")


if __name__ == "__main__":
    run(main)
