"""
Where the memory of fine-tuning goes, without a GPU: weights, gradients, optimiser and adapter of full fine-tuning, LoRA
and QLoRA from a model's shape alone (so for 65 B on any machine), and the peak of each fine-tuning in params.yaml, with
every arm, on an NVIDIA GPU (stages/rehearsal.py).

in:   data/shapes/*.json, results/<profile>/base_model/model/config.json, results/<profile>/dataset/tokens.json
out:  results/<profile>/vram/vram.json   bytes of every term
      results/<profile>/vram/vram.md     the same as tables, with where each term comes from
"""

import random
from dataclasses import dataclass, replace

from stages.allocator import MIB
from stages.finetune import METHODS, Finetune, Lora, with_arm
from stages.rehearsal import Batch, Rehearsal, Setting, Shape, state_sizes
from stages.shapes import head_size, linear_shapes, parameters, read_shape
from stages.stage import UserError, read_json, read_params, results, run, write_metrics

GB = 1e9  # the writeup's unit: 10^9 bytes

# Bytes a parameter.
BF16, FP32 = 2, 4
ADAM_FP32 = 8  # two fp32 moments; https://arxiv.org/abs/1910.02054, section 3.1
# Two 8-bit moments, with one fp32 scale each per 256 values; https://arxiv.org/abs/2110.02861, section 2.
ADAM_8BIT = 2 + 2 * FP32 / 256
# NF4: half a byte, an 8-bit scale per 64 values, one fp32 per 256 scales; https://arxiv.org/abs/2305.14314, section 3.
NF4_DOUBLE = 0.5 + 1 / 64 + FP32 / (64 * 256)

# What the process holds beside torch's memory: the driver's context, cuBLAS, bitsandbytes and others. The one number
# that is measured and not derived: NVML's figure less torch's reserved memory, on an H200 (driver 580, torch 2.11).
CONTEXT = 796 * MIB
# Micro-batches that are rehearsed: enough for the peak, the largest one of the epochs is always among them.
LIMIT = 64
# What a term is, and where it can be read.
WHERE = {
    "weights": "2 bytes a parameter; QLoRA: 4.127 bits in the linear layers (arXiv 2305.14314), 4 bytes in the norms",
    "adapter": "4 bytes a parameter: peft keeps the adapter of a bf16 model in fp32 (autocast_adapter_dtype)",
    "gradients": "4 bytes a trained parameter, between its first backward pass and the optimiser's step; twice over "
    "with several GPUs, whose processes exchange them in buckets",
    "optimizer": "two moments: 4 bytes each, or 1 byte and 4 for each 256 values; below 4,096 values always 4 bytes "
    "(bitsandbytes, optim/optimizer.py)",
    "activations": "what the backward pass needs of every layer; with checkpointing of one, and the input of each",
    "logits": "of the loss: vocabulary x tokens x 12 bytes in training (log-probabilities, their gradient, that of the "
    "logits), 10 in validation (transformers, loss_utils.py; TRL, compute_loss)",
    "dequantised": "a 4-bit weight in bf16, one at a time, and its block constants in fp32 (bitsandbytes, MatMul4Bit); "
    "torch.compile keeps all of them for the backward pass",
    "temporaries": "what the operation at the peak works with",
    "workspace": "cuBLAS: 32 MiB on Hopper for each of the two threads that multiply (torch, CublasHandlePool.cpp)",
    "loader": "transformers takes the model's size at once before it reads the weights, half of it for 4 bits "
    "(modeling_utils.py, caching_allocator_warmup)",
    "slack": "reserved by torch's allocator and not in use at the peak (CUDACachingAllocator.cpp); given back when "
    "memory runs short; a guess where layers are compiled and rows differ in length",
    "context": "the driver's context and the libraries: measured on an H200, not derived",
}

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


def shape_of(config):
    """The sizes of a model, from its config."""
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head=head_size(config),
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        linear=linear_shapes(config),
    )


def setting_of(method, p, lora):
    """What of a fine-tuning's parameters decides its memory."""
    given = {name: getattr(p, name) for name in Setting.__dataclass_fields__ if hasattr(p, name)}
    return Setting(method=method, rank=lora.r, dropout=lora.dropout, targets=tuple(lora.target_modules), **given)


def as_batch(lengths, padding_free):
    """Rows of these lengths as one batch: end to end, or padded to the longest."""
    if padding_free:
        return Batch(1, sum(lengths), False)
    return Batch(len(lengths), max(lengths), min(lengths) < max(lengths))


def in_batches(lengths, size, padding_free):
    return [as_batch(lengths[n : n + size], padding_free) for n in range(0, len(lengths), size)]


def training_steps(p, lengths):
    """The optimiser steps that are rehearsed, as lists of micro-batches, in an order drawn with the run's seed (not the
    trainer's own); cut to LIMIT micro-batches, of which the last is then the largest of all that were left out."""
    if p.packing:
        pieces = min(LIMIT, sum(lengths) // p.packing * p.epochs // p.micro_batch or 1)
        batches = [as_batch([p.packing] * p.micro_batch, p.padding_free)] * pieces
    else:
        draw, batches = random.Random(p.seed), []
        for _ in range(p.epochs):
            order = draw.sample(lengths, len(lengths))
            batches += in_batches(order, p.micro_batch, p.padding_free)
    steps = [batches[n : n + p.accumulation] for n in range(0, len(batches), p.accumulation)]
    steps = steps[: p.max_steps or None]
    left = max(1, LIMIT // p.accumulation)
    if steps[left:]:
        largest = max((one for step in steps[left - 1 :] for one in step), key=lambda batch: batch.tokens)
        steps[left - 1] = [*steps[left - 1][:-1], largest]
    return steps[:left]


def rehearsal_plan(p, rows):
    """(training steps, evaluation batches, steps after which it evaluates) of a fine-tuning on rows of these tokens."""
    lengths = {part: [min(length, p.max_tokens) for length in rows[part]] for part in ("train", "validation")}
    steps = training_steps(p, lengths["train"])
    evaluation = in_batches(lengths["validation"], max(p.micro_batch, 8), p.padding_free)
    return steps, evaluation, {n for n in range(1, len(steps) + 1) if n % p.eval_steps == 0 or n == len(steps)}


def rehearse(config, lora, method, p, rows):
    """The predicted memory of one fine-tuning: {phases, peak_phase, terms, process_bytes, ...}, in bytes.

    rows: {"train": [...], "validation": [...]}, the tokens of each row. A phase's `terms` add up to what is allocated
    at its peak; those of the whole are the peak phase's, with the allocator's slack and the context.
    """
    steps, evaluation, evaluates = rehearsal_plan(p, rows)
    rehearsal, phases = Rehearsal(shape_of(config), setting_of(method, p, lora)), {}

    def mark(phase):
        found, old = rehearsal.memory.take_peak(), phases.get(phase)
        highest = old if old and old["allocated_bytes"] >= found["allocated"] else None
        phases[phase] = {
            "allocated_bytes": highest["allocated_bytes"] if highest else found["allocated"],
            "reserved_bytes": found["reserved"],
            "process_bytes": found["reserved"] + CONTEXT,
            "terms": highest["terms"] if highest else found["terms"],
        }

    rehearsal.load()
    mark("load")
    for number, step in enumerate(steps, start=1):
        rehearsal.train(step)
        mark("first_step" if number == 1 else "steady")
        if number in evaluates:
            for batch in evaluation:
                rehearsal.evaluate(batch)
            mark("eval")
    peak = max(phases, key=lambda phase: phases[phase]["allocated_bytes"])
    reserved = max(phase["reserved_bytes"] for phase in phases.values())
    slack = reserved - phases[peak]["allocated_bytes"]
    paged = sum(state_sizes(p.optimizer, leaf.count)[1] for leaf in rehearsal.weights())
    return {
        "training_tokens": max(batch.tokens for step in steps for batch in step),
        "evaluation_tokens": max(batch.tokens for batch in evaluation),
        "phases": phases,
        "peak_phase": peak,
        "peak_allocated_bytes": phases[peak]["allocated_bytes"],
        "terms": {**phases[peak]["terms"], "slack": slack, "context": CONTEXT},
        "process_bytes": reserved + CONTEXT,
        "slack_is_a_guess": p.compile and not p.packing,
        # Moments that bitsandbytes keeps in memory shared with the CPU: on the GPU only while there is room.
        "paged_bytes": paged,
    }


def predict_variants(config, lora, p, rows):
    """{variant: prediction} of every method with every arm; those that rehearse the same steps share one.

    All are drawn with the stage's own seed: another order of the rows is no other setting.
    """
    found, known = {}, {}
    for variant in [method + arm for arm in ("", *(f"-{arm}" for arm in p.arms)) for method in METHODS]:
        method, patched = with_arm(p, variant)
        if patched.sharded:
            found[variant] = {"not_predicted": "each GPU holds a part of the model, for a time a whole layer"}
            continue
        if state_sizes(patched.optimizer, 1) is None:
            found[variant] = {"not_predicted": f"the state of the optimiser {patched.optimizer} is not known here"}
            continue
        patched, lengths = replace(patched, seed=p.seed), rows[patched.template]
        key = repr([setting_of(method, patched, lora), *rehearsal_plan(patched, lengths)])
        if key not in known:
            known[key] = rehearse(config, lora, method, patched, lengths)
        found[variant] = known[key]
    return found


def as_markdown(models, variants, kept):
    """The terms as tables in GB, and where they come from."""
    return "\n".join([static_table(models), peak_table(variants), terms_table(kept)])


def peak_table(variants):
    """The predicted peak of every fine-tuning."""
    names = list(WHERE)
    lines = [
        f"| fine-tuning | peak in | {' | '.join(f'{name} GB' for name in names)} | process GB |",
        "|---|---|" + "---:|" * (len(names) + 1),
    ]
    for variant, entry in variants.items():
        if "not_predicted" in entry:
            cells = [variant, f"not predicted: {entry['not_predicted']}", *[""] * (len(names) + 1)]
        else:
            sizes = [entry["terms"][name] for name in names]
            cells = [variant, entry["peak_phase"], *(f"{size / GB:,.2f}" for size in [*sizes, entry["process_bytes"]])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def terms_table(kept):
    """What each term is; kept: {method: bytes a layer keeps of a token, or None}."""
    known = [f"{size:,} bytes under {method}" for method, size in kept.items() if size]
    each = {"activations": f" (a layer of the base model keeps of a token {', '.join(known)})"} if known else {}
    rows = [f"| {name} | {what}{each.get(name, '')} |" for name, what in WHERE.items()]
    return "\n".join(["| term | what it is |", "|---|---|", *rows]) + "\n"


def static_table(models):
    """What a model's shape alone gives."""
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


def main():
    p, lora, training = read_params(Vram), read_params(Lora), read_params(Finetune)
    out = results("vram")
    models = {name: predict(read_shape(name, "params.yaml: vram.shapes has", "llama"), lora) for name in p.shapes}
    base = read_json(results("base_model") / "metrics.json")["name"]
    config = read_json(results("base_model") / "model" / "config.json")
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
