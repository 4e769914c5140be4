"""
The predicted memory of every variant of the fine-tuning: which of its steps lib/memory_model/step.py simulates, and the
peaks of those.
"""

import random
from dataclasses import replace

from lib.memory_model.allocator import MIB
from lib.memory_model.inputs import Batch, Setting, Shape
from lib.memory_model.step import Simulation, state_sizes
from lib.model.shapes import head_size, linear_shapes
from lib.training.config import METHODS, with_variant

# The process's memory outside torch: the driver's context, cuBLAS, bitsandbytes and others. The one number
# that is measured and not derived: process_peak_mib less torch_reserved_peak_mib, on an H200, of
# results/reference/h200-weightless/finetune/lora-published/metrics.json.
CONTEXT = 796 * MIB
# Micro-batches that are simulated: enough for the peak, the largest one of the epochs is always among them.
LIMIT = 64


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
    """The parameters of a fine-tuning that decide its memory."""
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
    """The optimiser steps that are simulated, as lists of micro-batches, in an order drawn with the run's seed (not the
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
        largest = max((batch for step in steps[left - 1 :] for batch in step), key=lambda batch: batch.tokens)
        steps[left - 1] = [*steps[left - 1][:-1], largest]
    return steps[:left]


def simulation_plan(p, rows):
    """(training steps, evaluation batches, steps after which it evaluates) of a fine-tuning on rows of these tokens."""
    lengths = {part: [min(length, p.max_tokens) for length in rows[part]] for part in ("train", "validation")}
    steps = training_steps(p, lengths["train"])
    evaluation = in_batches(lengths["validation"], max(p.micro_batch, 8), p.padding_free)
    return steps, evaluation, {n for n in range(1, len(steps) + 1) if n % p.eval_steps == 0 or n == len(steps)}


def simulate(config, lora, method, p, rows):
    """The predicted memory of one fine-tuning: {phases, peak_phase, terms, process_bytes, ...}, in bytes.

    rows: {"train": [...], "validation": [...]}, the tokens of each row. A phase's `terms` add up to what is allocated
    at its peak; those of the whole are the peak phase's, with the allocator's slack and the context.
    """
    steps, evaluation, evaluates = simulation_plan(p, rows)
    simulation, phases = Simulation(shape_of(config), setting_of(method, p, lora)), {}

    def mark(phase):
        new, old = simulation.memory.take_peak(), phases.get(phase)
        highest = old if old and old["allocated_bytes"] >= new["allocated"] else None
        phases[phase] = {
            "allocated_bytes": highest["allocated_bytes"] if highest else new["allocated"],
            "reserved_bytes": new["reserved"],
            "process_bytes": new["reserved"] + CONTEXT,
            "terms": highest["terms"] if highest else new["terms"],
        }

    simulation.load()
    mark("load")
    for number, step in enumerate(steps, start=1):
        simulation.train(step)
        mark("first_step" if number == 1 else "steady")
        if number in evaluates:
            for batch in evaluation:
                simulation.evaluate(batch)
            mark("eval")
    peak = max(phases, key=lambda phase: phases[phase]["allocated_bytes"])
    reserved = max(phase["reserved_bytes"] for phase in phases.values())
    slack = reserved - phases[peak]["allocated_bytes"]
    paged = sum(state_sizes(p.optimizer, leaf.count)[1] for leaf in simulation.weights())
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
    """{variant: prediction} of every method with every definition, variants with the same steps share one.

    All are drawn with the stage's own seed: another order of the rows is no other setting.
    """
    predictions, known = {}, {}
    for variant in [method + suffix for suffix in ("", *(f"-{name}" for name in p.definitions)) for method in METHODS]:
        method, patched = with_variant(p, variant)
        if patched.sharded:
            predictions[variant] = {"not_predicted": "each GPU holds a part of the model, for a time a whole layer"}
            continue
        if state_sizes(patched.optimizer, 1) is None:
            predictions[variant] = {
                "not_predicted": f"the state of the optimiser {patched.optimizer} is not known here"
            }
            continue
        patched, lengths = replace(patched, seed=p.seed), rows[patched.template]
        key = repr([setting_of(method, patched, lora), *simulation_plan(patched, lengths)])
        if key not in known:
            known[key] = simulate(config, lora, method, patched, lengths)
        predictions[variant] = known[key]
    return predictions
