"""
vram.json as tables in GB, with where each term comes from (stages/vram.py).
"""

from lib.markdown import table

GB = 1e9  # the writeup's unit: 10^9 bytes

# The meaning of each term, and its source.
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


def as_markdown(models, variants, kept):
    """The terms as tables in GB, and where they come from."""
    return "\n\n".join([static_table(models), peak_table(variants), terms_table(kept)]) + "\n"


def peak_table(variants):
    """The predicted peak of every fine-tuning."""
    sizes = [*(f"{name} GB" for name in WHERE), "process GB"]
    rows = []
    for variant, entry in variants.items():
        if "not_predicted" in entry:
            rows.append([variant, f"not predicted: {entry['not_predicted']}", *[""] * len(sizes)])
        else:
            terms = [*(entry["terms"][name] for name in WHERE), entry["process_bytes"]]
            rows.append([variant, entry["peak_phase"], *(f"{size / GB:,.2f}" for size in terms)])
    return table(["fine-tuning", "peak in", *sizes], rows, right=sizes)


def terms_table(kept):
    """The meaning of each term; kept: {method: bytes a layer keeps of a token, or None}."""
    known = [f"{size:,} bytes under {method}" for method, size in kept.items() if size]
    each = {"activations": f" (a layer of the base model keeps of a token {', '.join(known)})"} if known else {}
    return table(["term", "what it is"], [[name, meaning + each.get(name, "")] for name, meaning in WHERE.items()])


def static_table(models):
    """The sizes that follow from a model's shape alone."""
    numbers = ["weights GB", "adapter GB", "gradients GB", "optimiser GB", "total GB", "byte/parameter"]
    rows = []
    for model, methods in models.items():
        for method in ("full", "lora", "qlora"):
            entry = methods[method]
            parts = [entry[f"{part}_bytes"] for part in ("weights", "adapter", "gradients", "optimizer", "total")]
            rows.append(
                [model, method, *(f"{part / GB:,.2f}" for part in parts), f"{entry['bytes_per_parameter']:.2f}"]
            )
    return table(["model", "method", *numbers], rows, right=numbers)
