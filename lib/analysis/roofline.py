"""
The roofline of serving: the bytes and the operations that a load cannot do without, over the
machine's measured bandwidth and matrix rate (the roofline of https://doi.org/10.1145/1498765.1498785).

A lower bound of time, so it leaves out what a better engine might avoid: activations between layers, logits, padding,
launches, sampling, the exchange between GPUs. What stays is read or computed by every engine: each weight in use once a
step, the keys and values attended to, two operations for each weight and token.

Work is {weight_bytes, kv_bytes, flops, fp8_flops}; `flops` run in 16 bits, `fp8_flops` in the FP8 matrix units.
Mixtures of experts: routing is taken as uniform. Random weights route almost so (stages/workers/random_weights.py),
trained ones less: then fewer experts are read than is said here, and the bound is too low by that much.
"""

from lib.model.shapes import experts, head_size, parameters, windows

BF16 = 2  # bytes
# Bits of a weight of the matrices that a format quantises, scales included.
BITS = {
    "bf16": 16,
    "fp8": 8,  # one scale a matrix: nothing
    "int8": 8,  # LLM.int8: one scale a row: nothing
    "int4-g128": 4 + 16 / 128,  # GPTQ, symmetric: an fp16 scale for 128 weights
    "int4-g128-zeros": 4 + (16 + 4) / 128,  # AWQ: a zero point of 4 bits beside each scale
    "mxfp4": 4 + 8 / 32,  # an 8-bit scale for 32 weights; OCP Microscaling Formats (MX) 1.0
    "nf4": 4 + 32 / 64,  # bitsandbytes: an fp32 scale for 64 weights
    "nf4-double": 4 + 8 / 64 + 32 / (64 * 256),  # the scales quantised too; https://arxiv.org/abs/2305.14314, section 3
}
# The parts that a format quantises. vLLM and TensorRT-LLM leave embeddings, head, router, norms and biases in 16 bits;
# the published gpt-oss its attention too.
QUANTISED = {format: ("attention", "mlp", "experts") for format in BITS} | {"bf16": (), "mxfp4": ("experts",)}
KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}


def distinct_experts(config, tokens):
    """Experts of one layer that at least one of `tokens` tokens passes through, on average, if each takes k of E with
    equal chance: one token misses a given expert with chance 1 - k/E, all with (1 - k/E)^tokens; so
    E (1 - (1 - k/E)^tokens).
    """
    count, chosen = experts(config)
    return count * (1 - (1 - chosen / count) ** tokens)


def weight_bytes(config, weights, tokens):
    """Bytes of weights that one forward pass of `tokens` tokens reads, in the format `weights`.

    Every matrix once, of the experts those in use, of the embedding table one row a token (a table that is the head as
    well is read whole for the head). Sum over parts of parameters x bits / 8.
    """
    count, (total, _) = parameters(config), experts(config)
    in_use = distinct_experts(config, tokens) / total
    count["experts"] *= in_use
    count["expert_biases"] *= in_use
    if not count["head"]:
        count["head"] = count["embedding"]
    count["embedding"] = tokens * config["hidden_size"]
    count["positions"] = min(count["positions"], tokens * config["hidden_size"])
    bits = {part: BITS[weights] if part in QUANTISED[weights] else 8 * BF16 for part in count}
    return sum(count[part] * bits[part] for part in count) / 8


def kv_bytes_per_token(config, kv):
    """Bytes of keys and values that one token leaves in the cache: 2 x layers x KV heads x head size x bytes of one."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size(config) * KV_BYTES[kv]


def attended(config, context):
    """The positions that the token at position `context` (counted from 1) attends to, summed over layers: itself and
    all before it, in a layer with a sliding window the last of them."""
    return sum(min(context, window or context) for window in windows(config))


def attended_by_all(config, tokens):
    """The same, summed over the first `tokens` positions: n (n + 1) / 2 in a full layer; with a window w < n,
    w (w + 1) / 2 for the first w positions and w for each other."""
    ends = [min(tokens, window or tokens) for window in windows(config)]
    return sum(end * (end + 1) // 2 + (tokens - end) * end for end in ends)


def kv_bytes(config, kv, positions):
    """Bytes of the keys and values at `positions` positions, summed over layers."""
    return positions * kv_bytes_per_token(config, kv) / config["num_hidden_layers"]


def matrix_flops(config, weights):
    """(operations in 16 bits, in FP8) that one token asks of all matrices but the head: two a weight that it meets, a
    multiplication and an addition (https://arxiv.org/abs/2001.08361, section 2.1).

    4-bit weights are multiplied in 16 bits (Marlin, Triton on Hopper); only FP8 has its own rate.
    """
    count, (total, chosen) = parameters(config), experts(config)
    met = {name: 2 * count[name] for name in ("attention", "mlp", "router")} | {
        "experts": 2 * count["experts"] * chosen / total
    }
    fast = sum(met[part] for part in met if part in QUANTISED[weights]) if weights == "fp8" else 0
    return sum(met.values()) - fast, fast


def head_flops(config):
    """Operations of the logits of one position: two for each number of the head."""
    return 2 * config["vocab_size"] * config["hidden_size"]


def attention_flops(config, positions):
    """Operations of attention over `positions` pairs: two a number of the head for query x key, two for weight x value,
    in every query head. Attention is computed in 16 bits."""
    return 4 * config["num_attention_heads"] * head_size(config) * positions


def decode_step(config, weights, kv, batch, context):
    """The work of one step that makes one token for each of `batch` requests, each the token at position `context`."""
    slow, fast = matrix_flops(config, weights)
    alone = {
        "weight_bytes": weight_bytes(config, weights, batch),
        "kv_bytes": 0,
        "flops": batch * (slow + head_flops(config)),
        "fp8_flops": batch * fast,
    }
    return attending(alone, config, kv, batch * attended(config, context))


def attending(work, config, kv, positions):
    """Some work and, besides, attention to `positions` positions, summed over layers."""
    return work | {
        "kv_bytes": work["kv_bytes"] + kv_bytes(config, kv, positions),
        "flops": work["flops"] + attention_flops(config, positions),
    }


def prefill(config, weights, kv, prompts, tokens):
    """The work of reading `prompts` prompts of `tokens` tokens in one pass, which makes the first token of each.

    Keys and values are written once; logits are needed at the last position only.
    """
    slow, fast = matrix_flops(config, weights)
    attention = attention_flops(config, prompts * attended_by_all(config, tokens))
    return {
        "weight_bytes": weight_bytes(config, weights, prompts * tokens),
        "kv_bytes": prompts * tokens * kv_bytes_per_token(config, kv),
        "flops": prompts * (tokens * slow + head_flops(config)) + attention,
        "fp8_flops": prompts * tokens * fast,
    }


def rates(limits, gpus=1):
    """{bytes_per_second, flops_per_second, fp8_flops_per_second} out of limits.json, for `gpus` of that card."""
    names = ("bytes_per_second", "flops_per_second", "fp8_flops_per_second")
    return {name: limits[name] and gpus * limits[name] for name in names}


def parts(work, machine):
    """{bytes, flops}: seconds that each takes at the machine's rates; None where FP8 is needed and was not measured."""
    if work["fp8_flops"] and not machine["fp8_flops_per_second"]:
        return None
    fast = work["fp8_flops"] / machine["fp8_flops_per_second"] if work["fp8_flops"] else 0.0
    return {
        "bytes": (work["weight_bytes"] + work["kv_bytes"]) / machine["bytes_per_second"],
        "flops": work["flops"] / machine["flops_per_second"] + fast,
    }


def seconds(work, machine):
    """The least time for some work: moving and computing may overlap, so the longer of the two; None as in parts()."""
    times = parts(work, machine)
    return times and max(times.values())


def closed_loop(config, weights, kv, machine, concurrency, input_tokens, output_tokens):
    """The limit of a closed loop: `concurrency` requests at a time of `input_tokens` tokens in and `output_tokens` out,
    a finished one replaced at once. {prefill_seconds, decode_seconds, tokens_per_second, apart_tokens_per_second}

    In the time that a request takes, every slot reads one prompt and makes output_tokens tokens, of which the prompt's
    pass makes the first: one prefill of `concurrency` prompts and output_tokens - 1 decode steps at the contexts
    input_tokens + 1, .... (The slots' contexts differ at any moment; the bytes are a sum over slots, so that their
    total is the same.)

    apart_tokens_per_second: prefill and decode one after the other, concurrency x output_tokens over the sum of both
    times: what an engine reaches that never mixes them. tokens_per_second: the limit of every engine. A step may carry
    pieces of prompts along (chunked prefill) and compute them while it reads weights for decoding. Then only the totals
    count, the longer of all bytes over the bandwidth and all operations over the matrix rate; the weights are still
    read output_tokens times, for a slot needs as many steps one after the other. None where a rate was not measured.
    """
    alone = decode_step(config, weights, kv, concurrency, 0)
    contexts = range(input_tokens + 1, input_tokens + output_tokens)
    steps = [attending(alone, config, kv, concurrency * attended(config, context)) for context in contexts]
    reading = prefill(config, weights, kv, concurrency, input_tokens)
    if parts(reading, machine) is None:
        return dict.fromkeys(("prefill_seconds", "decode_seconds", "tokens_per_second", "apart_tokens_per_second"))
    first, then = seconds(reading, machine), sum(seconds(step, machine) for step in steps)
    # The step that ends a slot's prompt also decodes for the other slots: it reads as much as a decode step.
    shared = [reading | {"weight_bytes": weight_bytes(config, weights, concurrency)}, *steps]
    moved, computed = (sum(parts(work, machine)[name] for work in shared) for name in ("bytes", "flops"))
    tokens = concurrency * output_tokens
    return {
        "prefill_seconds": first,
        "decode_seconds": then,
        "tokens_per_second": tokens / max(moved, computed),
        "apart_tokens_per_second": tokens / (first + then),
    }
