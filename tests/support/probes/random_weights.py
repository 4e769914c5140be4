"""
random_weights.py FOLDER: small models with random weights, as stages/workers/random_weights.py writes them: the bytes
of each kind of tensor, the spread of packed weights, how many experts 16 requests use at a step, and with vLLM's
dummy weights.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.workers.random_weights import write, write_weights

LLAMA = json.loads(Path("data/shapes/llama-2-7b.json").read_text()) | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
MOE = json.loads(Path("data/shapes/gpt-oss-20b.json").read_text())
MOE |= {
    "hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 4000, "layer_types": MOE["layer_types"][:4], "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
REQUESTS, STEPS = 16, 12


def made(config, weights, folder, seed=0):
    """All tensors of a model that was just written."""
    write(config, weights, folder)
    write_weights(config, weights, folder, seed)
    named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: one for file in set(named.values()) for name, one in load_file(folder / file).items()}
    assert tensors.keys() == named.keys()
    return tensors


def kinds(tensors):
    """{end of the name: bytes}."""
    found = {}
    for name, one in tensors.items():
        kind = name.rpartition("_" if name.endswith(("_blocks", "_scales")) else ".")[2]
        found[kind] = found.get(kind, 0) + one.nbytes
    return found


def unpacked(tensors, name):
    """A GPTQ matrix in numbers: ((codes less the zero point) x scale of their group), inputs x outputs."""
    codes, zeros, scales, groups = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    shifts = torch.arange(0, 32, 4)
    values = (codes[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, codes.shape[1])
    points = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1) + 1
    return (values - points[groups]) * scales[groups].float()


def experts_in_use(model):
    """Experts of a layer that some of the requests pass through, mean over layers and decode steps."""
    seen = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda module, given, out: seen.append(len(out[1].unique())))
        for layer in model.model.layers
    ]
    prompts = torch.randint(0, MOE["vocab_size"], (REQUESTS, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.generate(prompts, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    for hook in hooks:
        hook.remove()
    return statistics.mean(seen[len(hooks) :])  # the first pass reads the prompts


folder = Path(sys.argv[1])
packed = made(MOE, "mxfp4", folder / "mxfp4")
codes = [f"model.layers.0.mlp.experts.down_proj_{part}" for part in ("blocks", "scales")]
experts = convert_moe_packed_tensors(*(packed[name] for name in codes))
four_bit = made(LLAMA, "int4-g128", folder / "int4")
plain, other = made(LLAMA, "bf16", folder / "plain"), made(LLAMA, "bf16", folder / "other", seed=1)
made(MOE, "bf16", folder / "moe")
moe = AutoModelForCausalLM.from_pretrained(folder / "moe", dtype=torch.bfloat16)
found = {
    "llama": LLAMA,
    "moe": MOE,
    "bytes": {"mxfp4": kinds(packed), "int4-g128": kinds(four_bit), "bf16": kinds(plain)},
    "mxfp4": {"shape": list(experts.shape), "spread": experts.float().std().item()},
    "int4": {
        "shape": list(unpacked(four_bit, "model.layers.1.mlp.down_proj").shape),
        "spread": unpacked(four_bit, "model.layers.1.mlp.down_proj").std().item(),
    },
    "same_seed": all(made(LLAMA, "bf16", folder / "again")[name].equal(one) for name, one in plain.items()),
    "other_seed": other["lm_head.weight"].equal(plain["lm_head.weight"]),
    "experts": experts_in_use(moe),
}
with torch.no_grad():
    for weight in moe.parameters():  # as vLLM's --load-format dummy draws them
        weight.uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(1234))
found["experts_with_dummy_weights"] = experts_in_use(moe)
print(json.dumps(found))
