"""
Names of the methods and systems that `speedups` measures.
"""

from dataclasses import dataclass

SYSTEMS = ("one", "static", "continuous", "vllm")


@dataclass
class Method:
    """A change to a Transformers model; vLLM's entry is only a name."""

    says: str
    attention: str = "sdpa"  # eager: every operation of attention by itself, as before torch 2.0
    flash_only: bool = False
    compile: bool = False  # corrected: with the static cache that CUDA graphs need
    static: bool = False
    lookup: bool = False
    weights: str = "bf16"


# In the writeup's order, then what it leaves out.
METHODS = {
    "none": Method("eager attention", attention="eager"),
    "compile": Method("torch.compile", attention="eager", compile=True),
    "flash1": Method("SDPA, flash kernel only", flash_only=True),
    "flash1-compile": Method("SDPA, flash kernel only, torch.compile", flash_only=True, compile=True),
    "flash2": Method("SDPA of torch 2.2 or newer"),
    "vllm": Method("vLLM"),
    "static": Method("SDPA, static cache", static=True),
    "lookup": Method("SDPA, prompt-lookup decoding", lookup=True),
    "int8": Method("SDPA, int8 weights (bitsandbytes)", weights="int8"),
    "int4": Method("SDPA, NF4 weights (bitsandbytes)", weights="nf4"),
}
PUBLISHED = ("none", "compile", "flash1", "flash1-compile", "flash2", "vllm")
