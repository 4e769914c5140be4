"""
LoRA adapters with random weights, in peft's format, for what depends on their number and size only:
random_lora.py MODEL_DIR OUT COUNT RANK SEED MODULE...

in:   MODEL_DIR/*.safetensors    the names and shapes of the base model's weights
out:  OUT/0, OUT/1, ...          adapter_config.json, adapter_model.safetensors (fp16)
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SCALE = 0.02  # of both factors: enough to change greedy answers, too little to break them


def adapted(model_dir, modules):
    """{name without .weight: (out, in)} of the base model's weights that the adapter changes."""
    shapes = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, "np") as weights:
            for name in weights.keys():  # noqa: SIM118  it is no dictionary
                parts = name.split(".")
                if parts[-1] == "weight" and parts[-2] in modules:
                    shapes[name.removesuffix(".weight")] = tuple(weights.get_slice(name).get_shape())
    if missing := sorted(set(modules) - {name.split(".")[-1] for name in shapes}):
        sys.exit(
            f"error: {model_dir}: no weight of the model belongs to {', '.join(missing)}; see multilora.target_modules"
        )
    return shapes


def write_adapter(folder, shapes, modules, rank, seed):
    """One adapter; the same seed gives the same bytes."""
    draw = np.random.default_rng(seed)
    weights = {}
    for name, (rows, columns) in sorted(shapes.items()):
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            values = draw.standard_normal(shape, dtype=np.float32) * SCALE
            weights[f"base_model.model.{name}.{part}.weight"] = values.astype(np.float16)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
              "bias": "none", "target_modules": sorted(modules), "inference_mode": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main():
    model_dir, out, count, rank, seed, *modules = sys.argv[1:]
    shapes = adapted(model_dir, modules)
    for number in range(int(count)):
        write_adapter(Path(out) / str(number), shapes, modules, int(rank), int(seed) + number)


if __name__ == "__main__":
    main()
