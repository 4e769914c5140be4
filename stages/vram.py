"""
Predicts the memory of fine-tuning without a GPU: weights, gradients, optimiser and adapter of full fine-tuning, LoRA
and QLoRA from a model's shape alone (so for 65 B on any machine), and the peak of each fine-tuning in params.yaml, with
every definition, on an NVIDIA GPU (lib/memory_model/variants.py).

in:   data/shapes/*.json, results/<profile>/base_model/model/config.json, results/<profile>/dataset/tokens.json
out:  results/<profile>/vram/vram.json   bytes of every term
      results/<profile>/vram/vram.md     the same as tables, with where each term comes from
"""

from dataclasses import dataclass

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, read_params, results, run
from lib.memory_model.tables import as_markdown
from lib.memory_model.variants import CONTEXT, predict_variants, shape_of
from lib.model.shapes import linear_shapes, parameters, read_shape
from lib.training.config import METHODS, Finetune, Lora

# Bytes a parameter.
BF16, FP32 = 2, 4
ADAM_FP32 = 8  # two fp32 moments; https://arxiv.org/abs/1910.02054, section 3.1
# Two 8-bit moments, with one fp32 scale each per 256 values; https://arxiv.org/abs/2110.02861, section 2.
ADAM_8BIT = 2 + 2 * FP32 / 256
# NF4: half a byte, an 8-bit scale per 64 values, one fp32 per 256 scales; https://arxiv.org/abs/2305.14314, section 3.
NF4_DOUBLE = 0.5 + 1 / 64 + FP32 / (64 * 256)

# The example of the ZeRO paper that the writeup cites: GPT-2 of 1.5 B parameters (https://arxiv.org/abs/1910.02054,
# section 3.2), with the published model's 25 heads.
GPT2_XL = {"layers": 48, "hidden": 1600, "heads": 25, "length": 1024, "batch": 32}


@dataclass
class Vram:
    shapes: list


def parameter_counts(config):
    """Parameters by kind: {linear, embedding, norm}; tied embeddings count once."""
    count = parameters(config)
    return {
        "linear": count["attention"] + count["mlp"],
        "embedding": count["embedding"] + count["head"],
        "norm": count["norms"],
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


def gpt_activations(layers, hidden, heads, length, batch):
    """Bytes that full 16-bit training of a GPT keeps for the backward pass: with every tensor of a layer, without the
    attention scores (flash attention), with checkpointing of each layer, and by the rule of thumb of the ZeRO paper.

    Tensor by tensor: https://arxiv.org/abs/2205.05198, section 4.1: s b h (34 + 5 a s / h) bytes a layer. The rule, 12
    numbers for each of a layer's tokens and hidden sizes: https://arxiv.org/abs/1910.02054, footnote of section 3.2.
    """
    inputs = batch * length * hidden
    layer = 34 * inputs + 5 * heads * length**2 * batch
    return {
        "whole_bytes": layers * layer,
        "flash_attention_bytes": layers * 34 * inputs,
        "checkpointed_bytes": layers * BF16 * inputs + layer,
        "rule_bytes": layers * 12 * BF16 * inputs,
    }


def kept_bytes(shape, method, lora):
    """Bytes that one layer keeps for the backward pass for a token of a batch without padding, uncompiled, when all
    seven linear layers are targets; None when they are not.

    The two norms keep their input in fp32 and 1 / rms; each adapter its dropped input (bf16), its mask (a byte) and the
    r numbers between its matrices; attention query, key, value, output and a sum a head; the inner layer gate, up and
    silu(gate), which are fp32 under QLoRA, since its norms are.
    """
    if set(lora.target_modules) != set(shape.linear):
        return None
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    inputs = 5 * shape.hidden + queries + shape.inner
    adapters = (2 + (lora.dropout > 0)) * inputs + 7 * 2 * lora.r
    norms = 2 * (4 * shape.hidden + 4)
    attention = 2 * (2 * queries + 2 * keys) + 4 * shape.heads
    return norms + adapters + attention + 3 * (4 if method == "qlora" else 2) * shape.inner


def main():
    p, lora, training = read_params(Vram), read_params(Lora), read_params(Finetune)
    out = results("vram")
    shapes = {name: read_shape(name, "params.yaml: vram.shapes has", "llama") for name in p.shapes}
    base = read_json(results("base_model") / "metrics.json")["name"]
    config = read_json(results("base_model") / "model" / "config.json")
    if "num_key_value_heads" not in config:
        raise UserError(f"{base} is a {config['model_type']}; memory is predicted for the Llama architecture alone")
    models = {name: predict(shape, lora) for name, shape in shapes.items()}
    models[base] = predict(config, lora)
    variants = predict_variants(config, lora, training, read_json(results("dataset") / "tokens.json"))
    numbers = {"r": lora.r, "target_modules": lora.target_modules, "models": models}
    numbers["activations"] = {"gpt2-xl": {**GPT2_XL, **gpt_activations(**GPT2_XL)}}
    kept = {method: kept_bytes(shape_of(config), method, lora) for method in METHODS}
    numbers["finetune"] = {
        "model": base,
        "context_bytes": CONTEXT,
        "kept_bytes_per_layer_and_token": kept,
        "variants": variants,
    }
    write_metrics(out / "vram.json", numbers)
    (out / "vram.md").write_text(as_markdown(models, variants, kept))
    print(as_markdown(models, variants, kept), end="")


if __name__ == "__main__":
    run(main)
