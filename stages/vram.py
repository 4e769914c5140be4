"""
Where the memory of fine-tuning goes, from the model's config alone: weights, gradients, optimiser and adapter of full
fine-tuning, LoRA and QLoRA. No model is loaded, so it answers for 65 B on any machine.

in:   data/shapes/*.json, results/<profile>/base_model/model/config.json
out:  results/<profile>/vram/vram.json   bytes of every term, with its formula
      results/<profile>/vram/vram.md     the same as a table
"""

import json
from dataclasses import dataclass
from pathlib import Path

from stages.stage import UserError, read_json, read_params, results, run, write_metrics

GB = 1e9  # the writeup's unit: 10^9 bytes

# Bytes a parameter.
BF16, FP32 = 2, 4
ADAM_FP32 = 8  # two fp32 moments; https://arxiv.org/abs/1910.02054, section 3.1
# Two 8-bit moments, with one fp32 scale each per 256 values; https://arxiv.org/abs/2110.02861, section 2.
ADAM_8BIT = 2 + 2 * FP32 / 256
# NF4: half a byte, an 8-bit scale per 64 values, one fp32 per 256 scales; https://arxiv.org/abs/2305.14314, section 3.
NF4_DOUBLE = 0.5 + 1 / 64 + FP32 / (64 * 256)


@dataclass
class Lora:
    r: int
    alpha: int
    dropout: float
    target_modules: list


@dataclass
class Vram:
    shapes: list


def linear_shapes(config):
    """{module name: (inputs, outputs)} of the linear layers in one Llama block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def parameter_counts(config):
    """Parameters by kind: {linear, embedding, norm}; tied embeddings count once."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    tables = 1 if config.get("tie_word_embeddings") else 2
    return {
        "linear": layers * sum(inputs * outputs for inputs, outputs in linear_shapes(config).values()),
        "embedding": tables * config["vocab_size"] * hidden,
        "norm": (2 * layers + 1) * hidden,
    }


def adapter_parameters(config, lora):
    """Trainable parameters of LoRA: r x (inputs + outputs) for every targeted linear layer."""
    shapes = linear_shapes(config)
    if unknown := [name for name in lora.target_modules if name not in shapes]:
        raise UserError(f"params.yaml: lora.target_modules has {unknown[0]!r}; a Llama block has {', '.join(shapes)}")
    return config["num_hidden_layers"] * sum(lora.r * sum(shapes[name]) for name in lora.target_modules)


def predict(config, lora):
    """{full, lora, qlora: {..._bytes, total_bytes, bytes_per_parameter, ...}} for one Llama-shaped config.

    Activations, temporary buffers and the CUDA context come on top: they depend on batch and length.
    """
    count = parameter_counts(config)
    total, adapter = sum(count.values()), adapter_parameters(config, lora)
    # TRL 0.25 leaves the norms in fp32 under QLoRA, embeddings and head in bf16.
    frozen_4bit = count["linear"] * NF4_DOUBLE + count["embedding"] * BF16 + count["norm"] * FP32
    methods = {
        "full": terms(total * BF16, 0, total * BF16, total * ADAM_FP32),
        # peft keeps the adapter of a bf16 model in fp32, so its gradients and moments are too.
        "lora": terms(total * BF16, adapter * FP32, adapter * FP32, adapter * ADAM_8BIT),
        "qlora": terms(frozen_4bit, adapter * FP32, adapter * FP32, adapter * ADAM_8BIT),
    }
    for name, entry in methods.items():
        trainable = total if name == "full" else adapter
        everything = total if name == "full" else total + adapter
        entry |= {
            "bytes_per_parameter": entry["total_bytes"] / total,
            "trainable_parameters": trainable,
            "all_parameters": everything,
            "trainable_percent": 100 * trainable / everything,
        }
    return {"parameters": total, **methods}


def terms(weights, adapter, gradients, optimizer):
    """The terms of one method, in bytes, and their sum."""
    parts = {
        "weights_bytes": weights,
        "adapter_bytes": adapter,
        "gradients_bytes": gradients,
        "optimizer_bytes": optimizer,
    }
    return {**parts, "total_bytes": sum(parts.values())}


def as_markdown(models):
    """The terms as a table in GB."""
    lines = [
        "| model | method | weights GB | adapter GB | gradients GB | optimiser GB | total GB | byte/parameter |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, methods in models.items():
        for method in ("full", "lora", "qlora"):
            entry = methods[method]
            cells = [f"{entry[f'{part}_bytes'] / GB:,.2f}" for part in ("weights", "adapter", "gradients", "optimizer")]
            row = [model, method, *cells, f"{entry['total_bytes'] / GB:,.2f}", f"{entry['bytes_per_parameter']:.2f}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def read_config(path):
    """A model config as JSON; UserError names the shapes there are."""
    if not path.exists():
        known = ", ".join(sorted(shape.stem for shape in Path("data/shapes").glob("*.json")))
        raise UserError(f"params.yaml: vram.shapes has {path.stem!r}; use {known}")
    return json.loads(path.read_text())


def main():
    p, lora = read_params(Vram), read_params(Lora)
    out = results("vram")
    models = {name: predict(read_config(Path("data/shapes") / f"{name}.json"), lora) for name in p.shapes}
    base = read_json(results("base_model") / "metrics.json")["name"]
    models[base] = predict(read_config(results("base_model") / "model" / "config.json"), lora)
    write_metrics(out / "vram.json", {"r": lora.r, "target_modules": lora.target_modules, "models": models})
    (out / "vram.md").write_text(as_markdown(models))
    print(as_markdown(models), end="")


if __name__ == "__main__":
    run(main)
