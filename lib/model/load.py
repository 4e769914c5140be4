"""
Load the base model in bf16 or in 4 bits (NF4).
"""

import os

from lib.core.gpu import torch_device


def load_base(folder, method, attention="sdpa", sharded=False):
    """The base model of a folder in bf16 (LoRA), or in NF4 with double quantisation (QLoRA), and its tokenizer.

    sharded: in the first process's main memory, the others' are empty; the weights go to the GPUs in parts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        # FSDP cuts tensors of one type only, so what holds the 4-bit numbers is called bf16 as all others.
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )
    device = int(os.environ.get("LOCAL_RANK", 0)) if torch_device() == "cuda" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=None if sharded else {"": device},
        attn_implementation=attention,
        quantization_config=nf4 if method == "qlora" else None,
    )
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(folder)


def load_to_answer(folder, method):
    """load_base for a model that only answers: a CPU unpacks the 4-bit values once, not again at every token."""
    model, tokenizer = load_base(folder, method)
    if method == "qlora" and model.device.type == "cpu":
        model = model.dequantize()  # to the same values
    return model, tokenizer
