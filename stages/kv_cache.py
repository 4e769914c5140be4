"""
The cost of keys and values: bytes a token for each shape, by formula and counted in Transformers' own cache after a
forward pass; and the memory wasted when a sequence's cache is one piece of the greatest length, beside blocks that are
handed out as it grows (PagedAttention), over the dataset's real lengths.

in:   data/shapes/*.json, results/<profile>/base_model, results/<profile>/dataset/tokens.json
out:  results/<profile>/kv_cache/kv_cache.json
"""

from dataclasses import dataclass

from lib.analysis.roofline import kv_bytes_per_token
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, read_params, results, run
from lib.model.shapes import head_size, read_shape


@dataclass
class KvCache:
    shapes: list
    tokens: int
    block_tokens: list

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"params.yaml: kv_cache.tokens is {self.tokens}; use 1 or more")
        if wrong := [size for size in self.block_tokens if type(size) is not int or size < 1]:
            raise UserError(f"params.yaml: kv_cache.block_tokens has {wrong[0]!r}; use whole numbers from 1")


def cache_bytes(model, tokens):
    """Bytes of the keys and values that `model` holds after a forward pass of `tokens` tokens, over all layers."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def bytes_without_numbers(config, tokens):
    """cache_bytes() of a shape in bf16 with torch's fake tensors: every tensor has its size, none has memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.bfloat16).eval()
        if "num_local_experts" in config:
            for layer in model.model.layers:
                layer.mlp.forward = lambda hidden: (
                    hidden,
                    None,
                )  # who is routed where needs numbers; it caches nothing
        return cache_bytes(model, tokens)


def entry(config, counted, tokens, how):
    """The formula beside what the cache held. A layer with a sliding window keeps no more than its window."""
    return {
        "layers": config["num_hidden_layers"],
        "kv_heads": config["num_key_value_heads"],
        "head_size": head_size(config),
        "bytes_per_token": kv_bytes_per_token(config, "bf16"),
        "counted": how,
        "counted_tokens": tokens,
        "counted_bytes": counted,
        "counted_bytes_per_token": counted / tokens,
        "sliding_window": config.get("sliding_window"),
    }


def allocated(lengths, block):
    """Tokens that room is taken for when every sequence takes whole blocks: sum of ceil(length / block) x block."""
    return sum(-(-length // block) * block for length in lengths)


def policies(lengths, context, blocks, bytes_per_token):
    """Every way to hand out room, with its waste; used_tokens / allocated_tokens is what is not wasted.

    contiguous: one piece a sequence, as long as any may become: the model's context, or (as only a prophet could) the
    longest row of the dataset. paged: blocks, of which the last one is partly empty.
    """
    ways = [("contiguous", "the model's context", context), ("contiguous", "the longest row", max(lengths))]
    ways += [("paged", f"blocks of {block}", block) for block in blocks]
    used = sum(lengths)
    for policy, says, unit in ways:
        taken = allocated(lengths, unit)
        yield {
            "policy": policy,
            "says": says,
            "unit_tokens": unit,
            "used_tokens": used,
            "allocated_tokens": taken,
            "wasted_share": 1 - used / taken,
            "sequences_per_gib": 2**30 / (taken / len(lengths) * bytes_per_token),
        }


def main():
    p = read_params(KvCache)
    shapes = {name: read_shape(name, "params.yaml: kv_cache.shapes has") for name in p.shapes}
    base = read_json(results("base_model") / "metrics.json")
    folder = results("base_model") / "model"
    config = read_json(folder / "config.json")
    tokens = read_json(results("dataset") / "tokens.json")["corrected"]
    lengths = [length for part in tokens.values() for length in part]

    from transformers import AutoModelForCausalLM

    entries = {
        name: entry(shape, bytes_without_numbers(shape, p.tokens), p.tokens, "a forward pass without numbers")
        for name, shape in shapes.items()
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    entries[base["name"]] = entry(config, cache_bytes(model, p.tokens), p.tokens, "a forward pass")
    for name, counts in entries.items():
        size, counted = counts["bytes_per_token"], counts["counted_bytes_per_token"]
        print(f"kv_cache: {name}: {size} bytes a token, counted {counted:.0f}")
    ways = list(
        policies(lengths, config["max_position_embeddings"], p.block_tokens, entries[base["name"]]["bytes_per_token"])
    )
    write_metrics(
        results("kv_cache") / "kv_cache.json",
        {
            "model": base["name"],
            "rows": len(lengths),
            "tokens_per_row": sum(lengths) / len(lengths),
            "longest_row": max(lengths),
            "shapes": entries,
            "policies": ways,
        },
    )
    for way in ways:
        print(f"kv_cache: {way['policy']}, {way['says']}: {100 * way['wasted_share']:.1f} % wasted")


if __name__ == "__main__":
    run(main)
