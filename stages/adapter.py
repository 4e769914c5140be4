"""
The adapters as TensorRT-LLM takes them: hf_lora_convert.py in the container, checked on the CPU:
python -m stages.adapter IMAGE

in:   results/<profile>/finetune/{lora,qlora}/adapter, results/<profile>/engine
out:  results/<profile>/adapter/<id>/model.lora_{weights,config}.npy   what lora_task_id <id> answers with, ids from 1
      results/<profile>/adapter/adapter.json                          adapters by id, and what was verified
"""

import shutil
import sys

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, flags, read_json, results, run
from lib.trtllm.adapter_format import misfits, verify
from lib.trtllm.adapters import adapters
from lib.trtllm.images import engines, in_image

SCRIPT = "/app/examples/hf_lora_convert.py"


def convert_command(adapter, out, dtype):
    return ["python3", SCRIPT, *flags({"in-file": adapter, "out-dir": out, "storage-type": dtype})]


def check(folder, built):
    """UserError when an engine cannot take the adapter; the one type that all engines have, otherwise."""
    config = read_json(folder / "adapter_config.json")
    for variant, engine in built.items():
        reasons = misfits(config["target_modules"], config["r"], engine["lora_target_modules"], engine["max_lora_rank"])
        if reasons:
            raise UserError(f"{folder}: the engine {variant} cannot take it: {'; '.join(reasons)}")
    types = sorted({engine["dtype"] for engine in built.values()})
    if len(types) > 1:
        raise UserError(f"params.yaml: engine.dtype is {' and '.join(types)}; adapters are stored in one of them")
    return types[0]


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python -m stages.adapter IMAGE")
    image, out = sys.argv[1], results("adapter")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    built, converted = engines(results("engine")), {}
    reason = None if built else "no engine is built; params.yaml: engine.route"
    for task, folder in adapters("lora", results("finetune")).items() if built else ():
        dtype = check(folder, built)
        target = out / str(task)
        in_image(image, convert_command(folder.resolve(), target.resolve(), dtype), out / f"convert-{task}.log")
        converted[str(task)] = {"adapter": str(folder), "dtype": dtype, **verify(folder, target, dtype)}
    write_metrics(out / "adapter.json", {"not_built": reason, "adapters": converted})
    print(f"{out}: {reason or 'task ids ' + ', '.join(converted)}")


if __name__ == "__main__":
    run(main)
