"""
The form in which TensorRT-LLM takes a LoRA adapter, on the CPU with numpy alone: the output of hf_lora_convert.py,
and whether an engine can take it.

    model.lora_weights.npy  (1, R, W)  a row for every layer and module: A (rank x in) flattened, then B (out x rank)
                                       times lora_alpha / rank flattened, zeros up to the longest row W
    model.lora_config.npy   (1, R, 4)  int32: module id, layer, rank, is it DoRA

Formula: the scaling of LoRA (with use_rslora: lora_alpha / sqrt(rank)) is folded into B, so the server applies none.
"""

import json
import re

import numpy as np

from lib.core.stage import UserError, read_json

# TensorRT-LLM's numbers of the modules (LoraManager.LORA_MODULE_IDS).
MODULE_IDS = {"attn_qkv": 0, "attn_q": 1, "attn_k": 2, "attn_v": 3, "attn_dense": 4, "mlp_h_to_4h": 5, "mlp_4h_to_h": 6,
              "mlp_gate": 7}  # fmt: skip
# How the converter names a Llama's layers: gate_proj is mlp_h_to_4h and up_proj mlp_gate, the other way round than the
# documentation's table says. It does not matter as long as an engine has both.
MODULES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_dense",
           "gate_proj": "mlp_h_to_4h", "down_proj": "mlp_4h_to_h", "up_proj": "mlp_gate"}  # fmt: skip
KEY = re.compile(r".*\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_(A|B)\.weight")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# One rounding to 16 bits: 2^-11 of the value in fp16, 2^-8 in bf16; and numbers too small for fp16 become zero.
ROUNDING = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}
SMALLEST = 2**-24


def read_safetensors(path):
    """Every tensor of a safetensors file as float32: an 8-byte length, a JSON header, then the bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; an adapter has {', '.join(DTYPES)}")
        first, last = (start + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(content[first:last], DTYPES[entry["dtype"]])
        tensors[name] = (from_bf16(raw) if entry["dtype"] == "BF16" else raw.astype(np.float32)).reshape(entry["shape"])
    return tensors


def from_bf16(bits):
    """bfloat16, given as 16-bit words, as float32: the upper half of its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def expected(folder):
    """(module id, layer) -> (rank, A and scaled B flattened) of a PEFT adapter's folder."""
    config = read_json(folder / "adapter_config.json")
    pairs = {}
    for name, weights in read_safetensors(folder / "adapter_model.safetensors").items():
        match = KEY.fullmatch(name)
        if not match or match[2] not in MODULES:
            raise UserError(f"{folder}: {name} has no place in TensorRT-LLM's form; train {', '.join(MODULES)} only")
        pairs.setdefault((MODULE_IDS[MODULES[match[2]]], int(match[1])), {})[match[3]] = weights
    rows = {}
    for place, pair in pairs.items():
        rank = pair["A"].shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        rows[place] = (rank, np.concatenate([pair["A"].ravel(), (pair["B"] * scale).ravel()]))
    return rows


def verify(adapter, converted, dtype):
    """Hold what hf_lora_convert.py wrote in `converted` against the PEFT adapter; UserError says what differs.

    Returns {"modules", "layers", "rank", "rows", "width"}.
    """
    rows = expected(adapter)
    weights, config = (np.load(converted / f"model.lora_{name}.npy") for name in ("weights", "config"))
    shapes = {"weights": (1, len(rows), max(len(row) for _, row in rows.values())), "config": (1, len(rows), 4)}
    for name, array in (("weights", weights), ("config", config)):
        if array.shape != shapes[name]:
            raise UserError(f"{converted}: lora_{name} has the shape {array.shape}, want {shapes[name]}")
    if config.dtype != np.int32:
        raise UserError(f"{converted}: lora_config is {config.dtype}, want int32")
    written = {"bfloat16": weights.dtype.str.endswith("V2")}.get(dtype, weights.dtype.name == dtype)
    if not written:
        raise UserError(f"{converted}: lora_weights are {weights.dtype}, want {dtype}, the engine's own")
    if dtype == "bfloat16":
        weights = from_bf16(weights.view("<u2"))
    seen = set()
    for (module, layer, rank, is_dora), row in zip(config[0].tolist(), weights[0].astype(np.float32), strict=True):
        place = (module, layer)
        if place in seen or place not in rows:
            raise UserError(
                f"{converted}: module {module} of layer {layer} stands there twice, or is not the adapter's"
            )
        seen.add(place)
        wanted_rank, wanted = rows[place]
        if (rank, is_dora) != (wanted_rank, 0):
            raise UserError(
                f"{converted}: module {module} of layer {layer} has rank {rank}, want {wanted_rank}, no DoRA"
            )
        padded = np.pad(wanted, (0, len(row) - len(wanted)))
        if not np.allclose(row, padded, rtol=ROUNDING[dtype], atol=SMALLEST):
            raise UserError(f"{converted}: module {module} of layer {layer} has other weights than the adapter")
    names = {number: name for name, number in MODULE_IDS.items()}
    return {
        "modules": sorted(names[module] for module in {module for module, _ in rows}),
        "layers": len({layer for _, layer in rows}),
        "rank": max(rank for rank, _ in rows.values()),
        "rows": len(rows),
        "width": shapes["weights"][2],
    }


def misfits(targets, rank, engine_modules, max_rank):
    """Why an engine cannot take an adapter of these PEFT modules and this rank, as sentences; [] when it can.

    Not the number of modules has to match: every one of the adapter has to be in the engine, which may have more.
    """
    reasons = []
    for target in targets:
        if target not in MODULES:
            reasons.append(f"{target} has no place in TensorRT-LLM's form; it knows {', '.join(MODULES)}")
        elif MODULES[target] not in engine_modules:
            reasons.append(f"{target} is {MODULES[target]} there, which is not in engine.lora_target_modules")
    if rank > max_rank:
        reasons.append(f"rank {rank} is above engine.max_lora_rank {max_rank}")
    return reasons
