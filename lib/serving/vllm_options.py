"""
The command line words that every vLLM of this repo gets, alone or behind Triton: the same engine on both sides.
"""

from lib.core.stage import flags, read_json


def max_lora_rank(folders):
    """vLLM's --max-lora-rank for the adapters in `folders`: a power of two, from 8."""
    rank = max(read_json(folder / "adapter_config.json")["r"] for folder in folders)
    return max(8, 1 << (rank - 1).bit_length())


def engine_options(adapters):
    """Words for vLLM by the folders of the adapters that it serves, none for the base model alone.

    Prompts are never answered out of an earlier one's cache.
    """
    words = flags({"no-enable-prefix-caching": True})
    if adapters:
        # One slot more than adapters: on a CPU, a request without one gets the adapter of the last slot when it shares
        # a batch with others (vllm-project/vllm pull request 48421, open); with an empty one it gets none.
        words += flags({"enable-lora": True, "max-lora-rank": max_lora_rank(adapters), "max-loras": len(adapters) + 1})
    return words
