"""shapes.py: the tensors of every shape in data/shapes as transformers builds the model, without their numbers."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

found = {}
for path in sorted(Path("data/shapes").glob("*.json")):
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)  # as tensors of the unquantised model
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found[path.stem] = {name: list(weight.shape) for name, weight in model.named_parameters()}
print(json.dumps(found))
